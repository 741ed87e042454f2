"""The schedule of stochastic weight averaging with a constant rate, as its authors' code has it."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.schedules.base import Length, ShareOfPeak

WHERE = "average.start or average.start_epoch (schedule.start, if no average begins)"


@dataclass(frozen=True)
class BeforeAveraging(ShareOfPeak):
    """A schedule that anneals the rate until SWA begins, which its average says.

    Izmailov et al. train with a rate that falls from the peak to that of SWA. Their code
    (timgaripov/swa, train.py, `schedule`) has, for the epoch e (from 0) and the epoch `first` (from
    1) whose weights are the first to be averaged (its `swa_start`), with t = e / first:

        t <= 0.5:        the peak
        0.5 < t <= 0.9:  linear in t, from the peak to the rate of SWA
        0.9 < t:         the rate of SWA

    So SWA's rate is reached before averaging begins. The rate changes once per epoch.
    """

    start: Annotated[
        float | None,
        Field(
            ge=0,
            lt=1,
            description="The share of training after which SWA begins. Default: where the average "
            "begins, which it may not contradict.",
        ),
    ] = None

    def begin(self, length: Length) -> int:
        """Return the number of steps after which SWA begins.

        Raises:
            ValueError: Nothing says where, or two keys say different things.
        """
        averaged = length.snapshots
        if self.start is None:
            if averaged is None:
                raise ValueError(
                    f"schedule.name={self.name} follows an average that begins in the course of "
                    "training, and there is none: set average.name=swa, or say by schedule.start "
                    "after which share of training the rate of SWA begins"
                )
            return averaged.begin
        own = math.floor(round(self.start * length.total, 6))
        if averaged is not None and own // length.epoch != averaged.begin // length.epoch:
            raise ValueError(
                f"schedule.start={self.start} begins SWA after {own // length.epoch} epochs, and "
                f"the average begins after {averaged.begin // length.epoch}: leave schedule.start "
                "out, so that the schedule follows the average"
            )
        return own

    def annealed(self, epoch: int, begin: int, to: float) -> float:
        """Return the rate of an epoch (from 0) before SWA, as a share of the peak.

        Args:
            epoch: The number of the epoch.
            begin: The number of whole epochs after which SWA begins.
            to: The rate at the end, as a share of the peak.
        """
        t = epoch / (begin + 1)
        if t <= 0.5:
            return 1.0
        if t <= 0.9:
            return 1.0 - (1.0 - to) * (t - 0.5) / 0.4
        return to

    def refuse_early(self, begin: int, length: Length) -> None:
        """Raise ValueError unless peak and decay have an epoch each before SWA begins.

        Args:
            begin: The number of whole epochs after which SWA begins.
            length: The length of the run.
        """
        falls = (begin + 1) // 2 + 1  # the first epoch, from 0, with t > 0.5
        if falls > 9 * (begin + 1) // 10:  # the last one with t <= 0.9
            raise ValueError(
                f"schedule.name={self.name}: SWA begins after {begin} epochs, which leaves none in "
                f"which the rate falls: raise {WHERE}, so that it begins after 2 epochs or more"
            )
        if length.warmup > falls * length.epoch:
            raise ValueError(
                f"optimizer.warmup_epochs: a warm-up of {length.warmup / length.epoch:g} epochs "
                f"ends after the rate of schedule.name={self.name} begins to fall, which is after "
                f"{falls} epochs: shorten the warm-up, or raise {WHERE}"
            )


@dataclass(frozen=True)
class SWAConstant(BeforeAveraging):
    """The peak, a linear decay, then SWA's constant rate (Izmailov et al., UAI 2018, their code).

    With SWA from epoch `first` on: the peak until first / 2, linear until 0.9 * first, then
    constant. Their code changes the rate once per epoch, and so does this.
    """

    name: ClassVar[str] = "swa_constant"

    rate: Annotated[
        float, Field(gt=0, le=1, description="The rate of SWA, as a share of the peak.")
    ] = 0.5

    def share(self, step: int, length: Length) -> float:
        begin = self.begin(length) // length.epoch
        return self.annealed(step // length.epoch, begin, self.rate)

    def refuse_unfit(self, length: Length) -> None:
        begin = self.begin(length) // length.epoch
        self.refuse_early(begin, length)
        constant = 9 * (begin + 1) // 10 + 1  # the first epoch, from 0, with t > 0.9
        if constant >= length.epochs:
            raise ValueError(
                f"schedule.name={self.name}: the constant rate begins after {constant} epochs, and "
                f"the run has {length.total / length.epoch:g}: raise train.epochs (or "
                f"train.max_steps), or lower {WHERE}"
            )
