"""The order of the data, as pure functions of (seed, epoch) that hold for every world size.

An epoch is a permutation of all samples. Step t takes the samples [t G, (t + 1) G) of it as its
global batch of G samples. Each rank takes a contiguous share of the global batch, and cuts it into
micro-batches. So (epoch, step) is the whole state of the data: a run resumes there exactly, on any
number of ranks and workers.

Permutations sort the raw output of numpy's counter-based generator Philox. numpy promises that raw
streams never change between versions, but `permutation` may change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flatcal_dist.data.errors import DataError


@dataclass(frozen=True, order=True)
class Position:
    """The optimizer step that comes next. `step` steps of `epoch` are done; both count from 0."""

    epoch: int = 0
    step: int = 0


def shuffled(n: int, generator: np.random.Philox) -> np.ndarray:
    """Return a random permutation [n] int64 of 0..n-1."""
    return np.argsort(generator.random_raw(n), kind="stable").astype(np.int64, copy=False)


def epoch_order(
    shard_lengths: Sequence[int] | np.ndarray,
    seed: int,
    epoch: int,
    window: int | None = None,
    paired_by: np.ndarray | None = None,
) -> np.ndarray:
    """Return the permutation [n] int64 of all samples that one epoch visits.

    Shards are permuted. Consecutive shards are joined into windows of at least `window` samples,
    and samples are permuted inside each window. So reading touches few shards at a time, which
    suits slow or remote disks.

    Args:
        shard_lengths: The number of samples in each shard.
        seed: The seed of the run.
        epoch: The number of the epoch, from 0.
        window: The least number of samples in a window. None is one window over everything, which
            is a perfect shuffle.
        paired_by: The labels of all samples [n], if samples of one class are to be paired. The
            samples at places 2i and 2i + 1 then have one class, and are drawn at random within a
            window by `class_pairs`. A sample that is left over goes to the next window. The last
            one ends the epoch.
    """
    lengths = np.asarray(shard_lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    windows = [np.arange(lengths.sum())]
    if window is not None:
        windows = [
            np.concatenate([np.arange(starts[s], starts[s] + lengths[s]) for s in shards])
            for shards in _windows(shuffled(len(lengths), generator), lengths, window)
        ]
    order, left = [], np.empty(0, np.int64)
    for samples in windows:
        samples = samples[shuffled(len(samples), generator)]
        if paired_by is not None:
            samples, left = class_pairs(np.append(left, samples), paired_by, generator)
        order.append(samples)
    return np.concatenate([*order, left])


def class_pairs(
    samples: np.ndarray, labels: np.ndarray, generator: np.random.Philox
) -> tuple[np.ndarray, np.ndarray]:
    """Pair shuffled samples of one class.

    In a class with an odd number of samples, one sample has no partner. Such samples are paired
    with each other, so that no sample is left out or comes twice. An objective recognises these
    pairs by their labels.

    Args:
        samples: The samples in random order, which decides who is paired with whom.
        labels: The class of every sample of the data, by its number.
        generator: The source of the order of pairs.

    Returns:
        The samples of the pairs, whose order is random, and the sample that is left over, [0] or
        [1].
    """
    by_class = samples[np.argsort(labels[samples], kind="stable")]
    classes = labels[by_class]
    first = np.append(True, classes[1:] != classes[:-1])[: len(classes)]
    starts = np.flatnonzero(first)
    place = np.arange(len(classes)) - np.repeat(starts, np.diff(np.append(starts, len(classes))))
    last = np.append(first[1:], True)[: len(classes)]
    single = last & (place % 2 == 0)
    singles = by_class[single]
    singles = singles[shuffled(len(singles), generator)]
    even = len(singles) // 2 * 2
    pairs = np.append(by_class[~single], singles[:even]).reshape(-1, 2)
    return pairs[shuffled(len(pairs), generator)].reshape(-1), singles[even:]


def _windows(shards: np.ndarray, lengths: np.ndarray, window: int) -> list[list[int]]:
    windows: list[list[int]] = [[]]
    filled = 0
    for shard in shards.tolist():
        if filled >= window:
            windows.append([])
            filled = 0
        windows[-1].append(shard)
        filled += int(lengths[shard])
    if filled < window and len(windows) > 1:  # the rest joins the window before it
        rest = windows.pop()
        windows[-1] += rest
    return windows


def steps_per_epoch(samples: int, global_batch_size: int) -> int:
    """Return the number of whole global batches in an epoch; a partial last one is dropped.

    Raises DataError if there is not even one.
    """
    if samples < global_batch_size:
        raise DataError(
            f"The training data holds {samples} samples, fewer than one global batch of "
            f"{global_batch_size}. Lower data.global_batch_size or name more shards."
        )
    return samples // global_batch_size


def global_batch(order: np.ndarray, step: int, size: int) -> np.ndarray:
    """Return the samples [size] of one step of an epoch.

    Args:
        order: The permutation of all samples.
        step: The number of the step in the epoch, from 0.
        size: The number of samples of a global batch.
    """
    return order[step * size : (step + 1) * size]


def rank_share(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """Return the contiguous share of one rank. Shares differ by one sample at most.

    Args:
        batch: The samples of a global batch.
        rank: The number of the rank.
        world_size: The number of ranks.
    """
    return np.array_split(batch, world_size)[rank]


def micro_batch_count(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches of an optimizer step, which is the same on every rank.

    The largest share decides.

    Args:
        global_batch_size: The number of samples of an optimizer step, over all ranks.
        micro_batch_size: The most samples of a forward pass on a rank.
        world_size: The number of ranks.

    Raises:
        DataError: A rank would be left with an empty micro-batch.
    """
    largest = -(-global_batch_size // world_size)
    smallest = global_batch_size // world_size
    count = -(-largest // micro_batch_size)
    if smallest < count:
        raise DataError(
            f"A global batch of {global_batch_size} over {world_size} ranks in micro-batches of "
            f"{micro_batch_size} leaves a rank with {smallest} samples for {count} micro-batches. "
            "Make data.global_batch_size a multiple of the number of ranks."
        )
    return count


def micro_batches(share: np.ndarray, count: int) -> list[np.ndarray]:
    """Cut the share of a rank into contiguous micro-batches that differ by one sample at most."""
    return np.array_split(share, count)


def evaluation_batches(
    samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the batches of one rank as (samples [batch_size] int64, how many of them count).

    Batch b always holds the samples [b B, (b + 1) B) and goes whole to rank b % world_size, so a
    record does not depend on the world size. The rest of a batch repeats the last sample and does
    not count. Every rank gets the same number of batches, because some engines communicate in the
    forward pass. In a surplus batch no sample counts.

    Args:
        samples: The number of samples.
        batch_size: The number of samples in each batch, B.
        rank: The number of this rank.
        world_size: The number of ranks.
    """
    batches = -(-samples // batch_size)
    rounds = -(-batches // world_size)
    for b in range(rank, rounds * world_size, world_size):
        numbers = np.arange(b * batch_size, (b + 1) * batch_size, dtype=np.int64)
        yield np.minimum(numbers, samples - 1), int((numbers < samples).sum())


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """Return a well-mixed 64-bit seed for the augmentation of one sample in one epoch.

    Args:
        seed: The seed of the run.
        epoch: The number of the epoch, from 0.
        sample: The number of the sample.
    """
    return _mix(_mix(_mix(seed) ^ epoch) ^ sample)


def sample_seeds(seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """Return `sample_seed` of many samples, [n] uint64.

    Args:
        seed: The seed of the run.
        epoch: The number of the epoch, from 0.
        samples: The numbers of the samples, [n] int64.
    """
    return mixed(np.uint64(_mix(_mix(seed) ^ epoch)) ^ samples.astype(np.uint64))


def substitutes(seed: int, epoch: int, sample: int, samples: int) -> Iterator[int]:
    """Yield samples to try, one after the other, in place of a bad one.

    Args:
        seed: The seed of the run.
        epoch: The number of the epoch, from 0.
        sample: The bad sample.
        samples: The number of all samples.
    """
    state = sample_seed(seed, epoch, sample) ^ 0xB5AD4ECEDA1CE2A9  # another stream than its crops
    while True:
        state = _mix(state)
        yield state % samples


def _mix(x: int) -> int:
    """Return one output of the generator splitmix64 (Steele, Lea and Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def mixed(x: np.ndarray) -> np.ndarray:
    """Return one output of the same generator for each state, [n] uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # unsigned numbers wrap around
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
