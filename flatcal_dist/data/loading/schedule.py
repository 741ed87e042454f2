"""Which micro-batches a rank asks its workers for, from where a run begins to its end."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.order import Position, epoch_order, global_batch, micro_batches, rank_share


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: one micro-batch of training."""

    samples: np.ndarray
    epoch: int
    step: int
    last: bool
    ahead: np.ndarray | None = None  # samples that the same worker will be asked for next


@dataclass(frozen=True)
class Schedule:
    """All micro-batches of this rank from `start` on."""

    shard_lengths: np.ndarray
    seed: int
    global_batch_size: int
    count: int  # micro-batches per optimizer step
    rank: int
    world_size: int
    window: int | None
    start: Position
    steps: int  # per epoch
    epochs: int
    max_steps: int | None
    paired_by: np.ndarray | None = None  # labels of all samples: see `epoch_order`

    def __post_init__(self) -> None:
        if not 0 <= self.start.step <= self.steps or self.start.epoch < 0:
            raise DataError(
                f"Training cannot start at step {self.start.step} of epoch {self.start.epoch}: an "
                f"epoch of this data has {self.steps} steps. Resume with the data and the "
                "data.global_batch_size that the run began with."
            )

    def _range(self) -> range:
        end = self.epochs * self.steps if self.max_steps is None else self.max_steps
        return range(self.start.epoch * self.steps + self.start.step, end)

    def __len__(self) -> int:
        return len(self._range()) * self.count

    def __iter__(self) -> Iterator[Request]:
        ordered = None
        for done in self._range():
            epoch, step = divmod(done, self.steps)
            if epoch != ordered:
                order = epoch_order(
                    self.shard_lengths, self.seed, epoch, self.window, self.paired_by
                )
                ordered = epoch
            batch = global_batch(order, step, self.global_batch_size)
            parts = micro_batches(rank_share(batch, self.rank, self.world_size), self.count)
            for i, samples in enumerate(parts):
                yield Request(samples, epoch, step, last=i == len(parts) - 1)


@dataclass(frozen=True)
class Ahead:
    """The same requests, each with the samples of the one that its worker will get next.

    DataLoader deals requests to its workers in turn: that is the one `workers` further on.
    """

    schedule: Schedule | list[Request]
    workers: int

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[Request]:
        waiting: deque[Request] = deque()
        for number, request in enumerate(self.schedule):
            waiting.append(request)
            if number >= self.workers:
                earlier = waiting.popleft()
                ahead = [request.samples]
                if number < 2 * self.workers:  # its worker's first: nobody announced that
                    ahead.insert(0, earlier.samples)
                yield replace(earlier, ahead=np.concatenate(ahead))
        yield from waiting
