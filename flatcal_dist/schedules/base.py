"""What a schedule of the learning rate is.

A schedule is a function of the step's number. It has no state, so a checkpoint need not hold it.
timm is imported where a scheduler is built, because that takes a second.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar

from flatcal_dist.averaging import Snapshots
from flatcal_dist.choices import check

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Length:
    """How many optimizer steps the warm-up, an epoch, and the whole run have.

    Attributes:
        warmup: The number of steps of the warm-up.
        epoch: The number of steps of an epoch.
        total: The number of steps of the run.
        snapshots: When weights are averaged, if the average begins in the course of training.
    """

    warmup: int
    epoch: int
    total: int
    snapshots: Snapshots | None = None

    @property
    def epochs(self) -> int:
        """The number of epochs, the last of which may be a part of one."""
        return -(-self.total // self.epoch)


@dataclass(frozen=True)
class Schedule(ABC):
    """How the learning rate goes on after the warm-up.

    A new schedule is one file here with one class. Its `name` is the value of `schedule.name` in a
    configuration, and its fields are keys of the section `schedule`.

    Raises:
        ValueError: A field is outside its bounds.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check(self)

    def refuse_unfit(self, length: Length) -> None:
        """Raise ValueError if a phase of this schedule would never begin in such a run."""
        return None

    @abstractmethod
    def scheduler(self, optimizer: "Optimizer", peak: float, length: Length) -> "Scheduler":
        """Return the scheduler whose `step_update(step)` sets the rate of that step.

        Args:
            optimizer: The optimizer whose learning rates are set.
            peak: The learning rate at the end of the warm-up.
            length: The length of the run and its parts.
        """


@dataclass(frozen=True)
class ShareOfPeak(Schedule):
    """A schedule that is written as a function: the rate of each step as a share of the peak.

    A warm-up takes the place of the first steps. All else is counted from the start of training.
    """

    @abstractmethod
    def share(self, step: int, length: Length) -> float:
        """Return the rate of a step as a share of the peak. The first step has the number 0."""

    def scheduler(self, optimizer: "Optimizer", peak: float, length: Length) -> "Scheduler":
        return _by_step()(optimizer, partial(self._warmed_up, length=length))

    def _warmed_up(self, step: int, length: Length) -> float:
        """Return the share, which rises linearly to 1 in the warm-up, as timm's schedules do."""
        if step >= length.warmup:
            return self.share(step, length)
        first = 1 / length.warmup
        return first + step * (1 - first) / length.warmup


@cache
def _by_step() -> "Callable[[Optimizer, Callable[[int], float]], Scheduler]":
    """Return timm's scheduler for any function of the step's number."""
    from timm.scheduler.scheduler import Scheduler

    class ByStep(Scheduler):
        """Sets the rate of each step, as a share of the rate that the optimizer began with."""

        def __init__(self, optimizer: "Optimizer", share: Callable[[int], float]) -> None:
            super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
            self.share = share

        def _get_lr(self, t: int) -> list[float]:
            return [self.share(t) * base for base in self.base_values]

    return ByStep
