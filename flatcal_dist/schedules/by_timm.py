"""The schedules that are timm's: linear warm-up, then a cosine, milestones, or the peak.

timm is imported where a scheduler is built.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from flatcal_dist.schedules.base import Length, Schedule

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from torch.optim import Optimizer


def _in_steps(peak: float, length: Length) -> dict[str, Any]:
    return {
        "warmup_t": length.warmup,
        "warmup_prefix": True,
        "warmup_lr_init": peak / max(length.warmup, 1),
        "t_in_epochs": False,
    }


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from the peak to `final` times it (Loshchilov and Hutter, ICLR 2017)."""

    name: ClassVar[str] = "cosine"

    final: Annotated[
        float, Field(ge=0, le=1, description="The last learning rate, as a share of the peak.")
    ] = 0.0

    def scheduler(self, optimizer: "Optimizer", peak: float, length: Length) -> "Scheduler":
        from timm.scheduler import CosineLRScheduler

        return CosineLRScheduler(
            optimizer,
            t_initial=length.total - length.warmup,
            lr_min=self.final * peak,
            **_in_steps(peak, length),
        )


@dataclass(frozen=True)
class MultiStep(Schedule):
    """The peak, multiplied by `factor` at each milestone (He et al., CVPR 2016, section 4)."""

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

    def scheduler(self, optimizer: "Optimizer", peak: float, length: Length) -> "Scheduler":
        from timm.scheduler import MultiStepLRScheduler

        # timm lets a milestone hold one step early.
        at = [round(epochs * length.epoch) - length.warmup + 1 for epochs in self.milestones]
        return MultiStepLRScheduler(
            optimizer, decay_t=sorted(at), decay_rate=self.factor, **_in_steps(peak, length)
        )


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak in every step after the warm-up."""

    name: ClassVar[str] = "constant"

    def scheduler(self, optimizer: "Optimizer", peak: float, length: Length) -> "Scheduler":
        from timm.scheduler import MultiStepLRScheduler

        return MultiStepLRScheduler(optimizer, decay_t=[], **_in_steps(peak, length))
