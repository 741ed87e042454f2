"""Which micro-batches a rank asks its workers for, from where a run begins to its end."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from flatcal_dist.data.loading.plan import BatchPlan
from flatcal_dist.data.order import (
    epoch_order,
    global_batch,
    micro_batches,
    rank_share,
    steps_per_epoch,
)
from flatcal_dist.data.shards.index import Index


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: one micro-batch of training."""

    samples: np.ndarray
    epoch: int
    step: int
    last: bool
    ahead: np.ndarray | None = None  # samples that the same worker will be asked for next


class Schedule:
    """All micro-batches of a rank, from the start of its plan to the end."""

    def __init__(self, plan: BatchPlan, index: Index) -> None:
        """The constructor raises DataError if the data and the plan do not fit together."""
        self._plan, self._lengths = plan, index.lengths
        self._paired_by = index.label if plan.same_class else None
        self._count = plan.micro_batches
        self._steps = steps_per_epoch(len(index), plan.global_batch_size)
        self._left = plan.steps_left(self._steps)

    def __len__(self) -> int:
        return len(self._left) * self._count

    def __iter__(self) -> Iterator[Request]:
        plan, ordered = self._plan, None
        for done in self._left:
            epoch, step = divmod(done, self._steps)
            if epoch != ordered:
                order = epoch_order(self._lengths, plan.seed, epoch, plan.window, self._paired_by)
                ordered = epoch
            batch = global_batch(order, step, plan.global_batch_size)
            parts = micro_batches(rank_share(batch, plan.rank, plan.world_size), self._count)
            for i, samples in enumerate(parts):
                yield Request(samples, epoch, step, last=i == len(parts) - 1)


@dataclass(frozen=True)
class Ahead:
    """The same requests, each with the samples of the request that its worker will get next.

    DataLoader deals requests to its workers in turn, so the next one is `workers` further on.
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
                if number < 2 * self.workers:  # the first of its worker: nobody announced it
                    ahead.insert(0, earlier.samples)
                yield replace(earlier, ahead=np.concatenate(ahead))
        yield from waiting
