import numpy as np
import pytest

from flatcal_dist.data import DataError, steps_per_epoch
from flatcal_dist.data.order import (
    epoch_order,
    evaluation_batches,
    global_batch,
    micro_batch_count,
    micro_batches,
    rank_share,
    sample_seed,
)

LENGTHS = [7, 5, 9, 1, 8, 6]

GOLDEN = {
    "0, 0, all": [66, 0, 54, 43, 69, 38, 102, 21],
    "7, 3, all": [65, 72, 2, 23, 105, 62, 34, 102],
    "7, 3, 45": [22, 29, 100, 62, 19, 111, 59, 95],
    "paired, all": [16, 86, 24, 101, 87, 73, 56, 0],
    "paired, 45": [16, 93, 3, 80, 10, 24, 112, 14],
    "seed 0, 0, 0": 2558736989570252433,
    "seed 7, 3, 1234567": 11149018351726439046,
}


@pytest.mark.parametrize("window", [None, 1, 10, 20, 1000])
def test_order_is_a_permutation_that_seed_and_epoch_decide(window):
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            order = epoch_order(LENGTHS, seed, epoch, window)
            assert order.dtype == np.int64
            assert sorted(order.tolist()) == list(range(sum(LENGTHS)))
            assert np.array_equal(order, epoch_order(np.array(LENGTHS), seed, epoch, window))
            orders[seed, epoch] = tuple(order.tolist())
    assert len(set(orders.values())) == 9


def test_order_never_changes_silently():
    """Runs in progress resume by it: a change of these numbers is a breaking change."""
    assert epoch_order([50, 30, 40], 0, 0)[:8].tolist() == GOLDEN["0, 0, all"]
    assert epoch_order([50, 30, 40], 7, 3)[:8].tolist() == GOLDEN["7, 3, all"]
    assert epoch_order([50, 30, 40], 7, 3, 45)[:8].tolist() == GOLDEN["7, 3, 45"]
    assert sample_seed(0, 0, 0) == GOLDEN["seed 0, 0, 0"]
    assert sample_seed(7, 3, 1234567) == GOLDEN["seed 7, 3, 1234567"]


def test_windows_are_respected():
    shard_of = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for epoch in range(20):
        shards = shard_of[epoch_order(LENGTHS, 0, epoch, window=10)]
        first = {s: int(np.flatnonzero(shards == s)[0]) for s in range(len(LENGTHS))}
        last = {s: int(np.flatnonzero(shards == s)[-1]) for s in range(len(LENGTHS))}
        # Cut where no shard is open: between the cuts lie windows, or unions of them.
        cuts = [0] + [
            i + 1
            for i in range(len(shards))
            if all(not first[s] <= i < last[s] for s in range(len(LENGTHS)))
        ]
        sizes = np.diff(cuts)
        assert len(sizes) >= 2  # 36 samples are never one window of at least 10
        # A window ends with the shard that fills it; the rest may join the last one.
        assert sizes.max() < 10 + max(LENGTHS) + 10


def test_window_sizes_by_hand():
    from flatcal_dist.data.order import _windows

    lengths = np.array([4, 4, 4, 4, 4])
    assert _windows(np.array([3, 1, 4, 0, 2]), lengths, 8) == [[3, 1], [4, 0, 2]]
    assert _windows(np.array([3, 1, 4, 0, 2]), lengths, 9) == [[3, 1, 4, 0, 2]]
    assert _windows(np.array([3, 1, 4, 0, 2]), lengths, 4) == [[3], [1], [4], [0], [2]]
    assert _windows(np.array([3, 1, 4, 0, 2]), lengths, 100) == [[3, 1, 4, 0, 2]]


def test_perfect_shuffle_is_uniform():
    """Where sample 0 lands over many epochs: chi-squared against the uniform distribution."""
    counts = np.zeros(10)
    for epoch in range(2000):
        counts[np.flatnonzero(epoch_order([4, 6], 1, epoch) == 0)[0]] += 1
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # the 0.999 quantile for 9 degrees of freedom


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [15, 16, 17])
def test_shares_make_up_the_batch(world_size, size):
    batch = global_batch(np.arange(100, 200), 2, size)
    assert batch.tolist() == list(range(100 + 2 * size, 100 + 3 * size))
    shares = [rank_share(batch, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), batch)
    for micro in (2, 4, 100):
        count = micro_batch_count(size, micro, world_size)
        for share in shares:
            parts = micro_batches(share, count)
            assert len(parts) == count
            assert np.array_equal(np.concatenate(parts), share)
            sizes = [len(part) for part in parts]
            assert min(sizes) > 0
            assert max(sizes) <= min(micro, min(sizes) + 1)


def test_batches_that_starve_a_rank_are_refused():
    assert micro_batch_count(4, 1, 4) == 1
    with pytest.raises(DataError, match="leaves a rank with 0 samples"):
        micro_batch_count(3, 8, 4)
    with pytest.raises(DataError, match="leaves a rank with 2 samples for 3 micro-batches"):
        micro_batch_count(5, 1, 2)


def test_steps_per_epoch():
    assert steps_per_epoch(100, 32) == 3
    assert steps_per_epoch(32, 32) == 1
    with pytest.raises(DataError, match="31 samples, fewer than one global batch of 32"):
        steps_per_epoch(31, 32)


@pytest.mark.parametrize("samples", [1, 8, 9, 31, 32])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_evaluation_counts_every_sample_once(samples, world_size):
    alone = [(b.tolist(), v) for b, v in evaluation_batches(samples, 8, 0, 1)]
    dealt = [list(evaluation_batches(samples, 8, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in dealt}) == 1  # nobody waits for a missing batch
    counted = []
    for batches in dealt:
        for batch, valid in batches:
            assert batch.shape == (8,)
            assert batch.max() < samples
            assert valid == 0 or (batch.tolist(), valid) in alone
            counted += batch[:valid].tolist()
    assert sorted(counted) == list(range(samples))


def test_sample_seeds_are_distinct_and_mixed():
    seeds = np.array(
        [sample_seed(s, e, i) for s in range(5) for e in range(5) for i in range(2000)], np.uint64
    )
    assert len(np.unique(seeds)) == len(seeds)
    # torch's CPU generator looks at 32 bits: a birthday among 50,000 gives 0.3 collisions.
    assert len(np.unique(seeds & np.uint64(0xFFFFFFFF))) >= len(seeds) - 5
    bits = (seeds[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02


def labelled(counts: list[int], seed: int = 0) -> np.ndarray:
    """Labels of as many samples of each class, in some order."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels[np.random.default_rng(seed).permutation(len(labels))]


@pytest.mark.parametrize("window", [None, 10, 40])
@pytest.mark.parametrize(
    "counts",
    [[18, 18], [9, 9, 9, 9], [7, 7, 7, 7, 8], [36], [1] * 36, [35, 1], [3] * 12, [0, 5, 0, 31]],
    ids=str,
)
def test_pairs_are_of_one_class_and_nothing_is_left_out(counts, window):
    labels = labelled(counts)
    for epoch in range(5):
        order = epoch_order(LENGTHS, 3, epoch, window, labels)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(sum(LENGTHS)))
        assert np.array_equal(order, epoch_order(LENGTHS, 3, epoch, window, labels))
        assert not np.array_equal(order, epoch_order(LENGTHS, 3, epoch + 1, window, labels))
        pairs = labels[order].reshape(-1, 2)
        unequal = pairs[pairs[:, 0] != pairs[:, 1]]
        if window is None:
            assert len(unequal) == sum(count % 2 for count in counts) // 2
            assert len(set(unequal.flatten().tolist())) == unequal.size, "one of a class"


def test_an_odd_number_of_samples_ends_with_one_alone():
    labels = labelled([5, 4, 3, 1])
    for window in (None, 3, 5):
        order = epoch_order([4, 1, 3, 5], 1, 0, window, labels)
        assert sorted(order.tolist()) == list(range(13))
    order = epoch_order([13], 1, 0, None, labels)
    pairs = labels[order[:12]].reshape(-1, 2)
    assert (pairs[:, 0] == pairs[:, 1]).sum() == 5
    assert epoch_order([], 0, 0, None, np.empty(0, np.int64)).tolist() == []


def test_pairs_and_their_places_are_drawn_anew_and_evenly():
    """Of 6 samples of a class, partners are any two; the odd one and the last pair are any, too."""
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1])
    partner, last, alone = np.zeros((6, 6)), np.zeros(9), np.zeros(9)
    for epoch in range(3000):
        order = epoch_order([9], 0, epoch, None, labels)
        alone[order[8]] += 1
        last[order[6:8]] += 1
        for a, b in order[:8].reshape(-1, 2):
            if labels[a] == 0:
                partner[a, b] += 1
    # Standard errors: 0.006, 0.008 and 0.009 at most; bounds of 5.
    assert np.abs(partner[~np.eye(6, dtype=bool)] / 3000 - 0.1).max() < 0.03
    assert np.abs(last[:6] / 3000 - 1 / 4).max() < 0.04
    assert np.abs(last[6:] / 3000 - 1 / 6).max() < 0.045
    assert np.abs(alone[6:] / 3000 - 1 / 3).max() < 0.045


def test_paired_order_never_changes_silently():
    labels = np.arange(120) % 7
    assert epoch_order([50, 30, 40], 7, 3, None, labels)[:8].tolist() == GOLDEN["paired, all"]
    assert epoch_order([50, 30, 40], 7, 3, 45, labels)[:8].tolist() == GOLDEN["paired, 45"]


def test_ranks_and_micro_batches_keep_pairs():
    labels = labelled([50, 30, 40])
    order = epoch_order([50, 30, 40], 1, 2, None, labels)
    batch = global_batch(order, 1, 48)
    pairs = {frozenset(pair) for pair in batch.reshape(-1, 2).tolist()}
    for world_size in (1, 2, 3, 4, 6):
        shares = [rank_share(batch, rank, world_size) for rank in range(world_size)]
        for count in (1, 2):
            parts = [part for share in shares for part in micro_batches(share, count)]
            found = {frozenset(pair) for part in parts for pair in part.reshape(-1, 2).tolist()}
            assert found == pairs
