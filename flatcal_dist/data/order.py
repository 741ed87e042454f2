"""The order of the data: pure functions of (seed, epoch), cut the same way for every world size.

An epoch is a permutation of all samples; step t takes samples [t G, (t + 1) G) of it as its
global batch of G; rank r takes a contiguous share of that; a share falls into micro-batches. So
(epoch, step) is the whole state of the data: a run resumes there exactly, on any number of ranks
and workers.

Randomness is the raw output of numpy's counter-based Philox generator, sorted: raw streams are
promised never to change between numpy versions, whereas `permutation` may.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flatcal_dist.data.errors import DataError


@dataclass(frozen=True, order=True)
class Position:
    """The optimizer step that comes next: `step` steps of `epoch` are done, both count from 0."""

    epoch: int = 0
    step: int = 0


def shuffled(n: int, generator: np.random.Philox) -> np.ndarray:
    """A random permutation [n] int64 of 0..n-1."""
    return np.argsort(generator.random_raw(n), kind="stable").astype(np.int64, copy=False)


def epoch_order(
    shard_lengths: Sequence[int] | np.ndarray, seed: int, epoch: int, window: int | None = None
) -> np.ndarray:
    """The permutation [n] int64 of all samples that one epoch visits.

    Shards are permuted, consecutive ones are joined into windows of at least `window` samples,
    and samples are permuted inside each window: reading touches few shards at a time, as slow
    or remote disks want. `None` is one window over everything, a perfect shuffle.
    """
    lengths = np.asarray(shard_lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    if window is None:
        return shuffled(int(lengths.sum()), generator)
    order = []
    for shards in _windows(shuffled(len(lengths), generator), lengths, window):
        samples = np.concatenate([np.arange(starts[s], starts[s] + lengths[s]) for s in shards])
        order.append(samples[shuffled(len(samples), generator)])
    return np.concatenate(order)


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
    """Whole global batches in an epoch; the partial last one is dropped.

    Raises DataError if there is not even one.
    """
    if samples < global_batch_size:
        raise DataError(
            f"The training data holds {samples} samples, fewer than one global batch of "
            f"{global_batch_size}. Lower data.global_batch_size or name more shards."
        )
    return samples // global_batch_size


def global_batch(order: np.ndarray, step: int, size: int) -> np.ndarray:
    """The samples [size] of one step of an epoch."""
    return order[step * size : (step + 1) * size]


def rank_share(batch: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    """The contiguous share of one rank; the shares differ by one sample at most."""
    return np.array_split(batch, world_size)[rank]


def micro_batch_count(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches per optimizer step, the same on every rank: the largest share decides.

    Raises DataError if a rank would be left with an empty micro-batch.
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
    """A rank's share cut into `count` contiguous micro-batches that differ by one at most."""
    return np.array_split(share, count)


def evaluation_batches(
    samples: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """This rank's batches of samples 0..n-1 as (samples [batch_size] int64, how many count).

    Batch b always holds samples [b B, (b + 1) B) and goes whole to rank b % world_size, so that
    a record does not depend on the world size. The rest of a batch repeats the last sample and
    does not count. Every rank gets the same number of batches, for engines that communicate in
    the forward pass: a surplus one counts 0 samples.
    """
    batches = -(-samples // batch_size)
    rounds = -(-batches // world_size)
    for b in range(rank, rounds * world_size, world_size):
        numbers = np.arange(b * batch_size, (b + 1) * batch_size, dtype=np.int64)
        yield np.minimum(numbers, samples - 1), int((numbers < samples).sum())


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """A well-mixed 64-bit seed for the augmentation of one sample in one epoch."""
    return _mix(_mix(_mix(seed) ^ epoch) ^ sample)


def substitutes(seed: int, epoch: int, sample: int, samples: int) -> Iterator[int]:
    """Samples out of 0..samples-1 to try, one after the other, in place of a bad one."""
    state = sample_seed(seed, epoch, sample) ^ 0xB5AD4ECEDA1CE2A9  # another stream than its crops
    while True:
        state = _mix(state)
        yield state % samples


def _mix(x: int) -> int:
    """One output of the splitmix64 generator (Steele, Lea and Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
