"""Learning-rate schedules: linear warm-up, then one of timm's.

A schedule is a function of the step's number: it has no state, so there is nothing to resume.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from flatcal_dist.choices import check


@dataclass(frozen=True)
class Length:
    """Of a run, in optimizer steps: of the warm-up, of an epoch, and of all."""

    warmup: int
    epoch: int
    total: int


@dataclass(frozen=True)
class Schedule(ABC):
    """How the learning rate goes on after the warm-up.

    A new schedule is one class here: its `name` is what a configuration calls it, and its fields
    are keys of the configuration's section `schedule`. Raises ValueError for a field outside its
    bounds.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def scheduler(self, optimizer: Optimizer, peak: float, length: Length) -> Scheduler:
        """Return the scheduler whose `step_update(step)` sets the rate of that step.

        Args:
            optimizer: Its learning rates are set.
            peak: The learning rate at the end of the warm-up.
            length: Of the run.
        """


def _in_steps(peak: float, length: Length) -> dict:
    return {
        "warmup_t": length.warmup,
        "warmup_prefix": True,
        "warmup_lr_init": peak / max(length.warmup, 1),
        "t_in_epochs": False,
    }


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `final` times the peak (Loshchilov and Hutter, ICLR 2017)."""

    name: ClassVar[str] = "cosine"

    final: Annotated[
        float, Field(ge=0, le=1, description="The last learning rate, as a share of the peak.")
    ] = 0.0

    def scheduler(self, optimizer: Optimizer, peak: float, length: Length) -> Scheduler:
        return CosineLRScheduler(
            optimizer,
            t_initial=length.total - length.warmup,
            lr_min=self.final * peak,
            **_in_steps(peak, length),
        )


@dataclass(frozen=True)
class MultiStep(Schedule):
    """The peak, times `factor` at each milestone (He et al., CVPR 2016, section 4)."""

    name: ClassVar[str] = "multi_step"

    milestones: Annotated[
        list[Annotated[float, Field(gt=0, le=1e6)]],
        Field(
            min_length=1,
            max_length=1000,
            description="The epochs after which the learning rate falls, counted from the start.",
        ),
    ] = field(default_factory=lambda: [30.0, 60.0])
    factor: Annotated[
        float, Field(gt=0, le=1, description="What the learning rate is multiplied by.")
    ] = 0.1

    def scheduler(self, optimizer: Optimizer, peak: float, length: Length) -> Scheduler:
        # timm lets a milestone hold one step early.
        at = [round(epochs * length.epoch) - length.warmup + 1 for epochs in self.milestones]
        return MultiStepLRScheduler(
            optimizer, decay_t=sorted(at), decay_rate=self.factor, **_in_steps(peak, length)
        )


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak throughout."""

    name: ClassVar[str] = "constant"

    def scheduler(self, optimizer: Optimizer, peak: float, length: Length) -> Scheduler:
        return MultiStepLRScheduler(optimizer, decay_t=[], **_in_steps(peak, length))
