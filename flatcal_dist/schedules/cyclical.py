"""The cyclical schedule of stochastic weight averaging, as the paper has it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.schedules.base import Length
from flatcal_dist.schedules.swa_constant import WHERE, BeforeAveraging


@dataclass(frozen=True)
class Cyclical(BeforeAveraging):
    """The rate falls from `high` to `low` in each cycle (Izmailov et al., UAI 2018, section 3.2).

    For the step i of a cycle of c steps, counted from 1: t = i / c and the rate is
    (1 - t) * high + t * low, so that the last step of a cycle has the rate low. It changes in every
    step. The weights at the ends of cycles are averaged (average.every_epochs=cycle_epochs).

    Cycles end where the number of epochs is a multiple of `cycle_epochs`. The first cycle is the
    one in which SWA begins. Before it the rate falls from the peak to `high` as in `swa_constant`,
    where the paper says only that training is conventional.
    """

    name: ClassVar[str] = "cyclical"

    cycle_epochs: Annotated[
        int, Field(ge=1, le=10**6, description="The number of epochs of a cycle.")
    ] = 1
    high: Annotated[
        float,
        Field(gt=0, le=1, description="The rate before a cycle, as a share of the peak."),
    ] = 0.5
    low: Annotated[
        float,
        Field(ge=0, le=1, description="The rate at the end of a cycle, as a share of the peak."),
    ] = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ValueError(
                f"schedule.low={self.low} is above schedule.high={self.high}: the rate falls from "
                "the second to the first in each cycle"
            )

    def _first_cycle(self, length: Length) -> int:
        """Return after how many epochs the first cycle begins."""
        return self.begin(length) // (self.cycle_epochs * length.epoch) * self.cycle_epochs

    def share(self, step: int, length: Length) -> float:
        begin, cycle = self._first_cycle(length), self.cycle_epochs * length.epoch
        if step < begin * length.epoch:
            return self.annealed(step // length.epoch, begin, self.high)
        t = (step % cycle + 1) / cycle
        return (1 - t) * self.high + t * self.low

    def refuse_unfit(self, length: Length) -> None:
        begin, averaged = self._first_cycle(length), length.snapshots
        if averaged is not None and averaged.every_epochs != self.cycle_epochs:
            raise ValueError(
                f"schedule.cycle_epochs={self.cycle_epochs} and average.every_epochs="
                f"{averaged.every_epochs} must be equal: weights are averaged where a cycle ends"
            )
        self.refuse_early(begin, length)
        if (begin + self.cycle_epochs) * length.epoch > length.total:
            raise ValueError(
                f"schedule.cycle_epochs={self.cycle_epochs}: the first cycle begins after {begin} "
                f"epochs, and would not end in a run of {length.total / length.epoch:g}: raise "
                f"train.epochs (or train.max_steps), lower {WHERE}, or shorten the cycle"
            )
