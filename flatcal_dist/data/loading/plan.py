"""How training is cut into batches, and how the processes that load them work."""

from dataclasses import dataclass, field

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.order import Position, micro_batch_count

PREFETCH = 2  # batches that a worker holds ready, unless asked otherwise


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The plan of all batches of a run, as one rank sees it.

    Training lasts `epochs` epochs, or `max_steps` optimizer steps where that is given. Both are
    counted from the beginning of the run, also where `start` lies later.
    """

    seed: int
    global_batch_size: int  # images of an optimizer step, over all ranks
    micro_batch_size: int  # images of a forward pass on a rank, at most
    epochs: int
    max_steps: int | None = None
    start: Position = field(default_factory=Position)
    rank: int = 0
    world_size: int = 1
    window: int | None = None  # samples that are shuffled together: see `epoch_order`
    same_class: bool = False  # whether images of one class are paired: see `epoch_order`

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of an optimizer step. It is the same on every rank.

        It raises DataError if a rank would be left with an empty micro-batch.
        """
        return micro_batch_count(self.global_batch_size, self.micro_batch_size, self.world_size)

    def steps_left(self, steps: int) -> range:
        """The optimizer steps from `start` to the end, counted from the beginning of the run.

        `steps` is the number of optimizer steps of an epoch. The method raises DataError if an
        epoch has no step at which `start` could lie.
        """
        if not 0 <= self.start.step <= steps or self.start.epoch < 0:
            raise DataError(
                f"Training cannot start at step {self.start.step} of epoch {self.start.epoch}: an "
                f"epoch of this data has {steps} steps. Resume with the data and the "
                "data.global_batch_size that the run began with."
            )
        end = self.epochs * steps if self.max_steps is None else self.max_steps
        return range(self.start.epoch * steps + self.start.step, end)


@dataclass(frozen=True)
class Workers:
    """The processes that load batches."""

    count: int = 0  # 0: the main process loads them itself
    prefetch: int = PREFETCH  # batches that each worker holds ready
    pin_memory: bool = False
    context: str | None = None  # how processes are started; None is the default of the system

    @property
    def readers(self) -> int:
        """The number of processes that read, which is at least one."""
        return max(self.count, 1)
