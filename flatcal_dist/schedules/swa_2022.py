"""The schedule of SWA and FMFP in the code of their ECCV paper, which has turns of its own."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.schedules.base import Length, ShareOfPeak


@dataclass(frozen=True)
class SWA2022(ShareOfPeak):
    """A cosine that goes on beyond its end, then torch's SWALR, as the code of FMFP has it.

    Zhu et al. (ECCV 2022) publish Impression2805/FMFP. main_fmfp.py steps
    CosineAnnealingLR(T_max=100) after each of the epochs 1 to 120, and SWALR(swa_lr=0.05) after
    each later one, of 201. So for the epoch e (from 0), with T = cosine_epochs, s = start_epoch,
    n = anneal_epochs, c(e) = (1 + cos(pi e / T)) / 2 and a = (1 - cos(pi min(1, (e - s) / n))) / 2:

        e <= s:  c(e)                        a peak of 0.1 falls to 0 at e = 100, and climbs again
        e > s:   a * rate + (1 - a) * c(s)   from 0.00955 at e = 120 to 0.05 at e = 130, and stays

    The epoch e = s is the first whose weights are averaged, and it has the last rate of the cosine.
    The paper only says that SWA begins at epoch 120 with a rate of 0.05. The rate changes once per
    epoch, as in that code.
    """

    name: ClassVar[str] = "swa_2022"

    cosine_epochs: Annotated[
        int, Field(ge=1, le=10**6, description="After how many epochs the cosine is at 0.")
    ] = 100
    start_epoch: Annotated[
        int,
        Field(
            ge=1,
            le=10**6,
            description="After how many epochs SWA begins: the same number as average.start_epoch.",
        ),
    ] = 120
    anneal_epochs: Annotated[
        int,
        Field(
            ge=1,
            le=10**6,
            description="In how many epochs of SWA the rate goes over to SWA's rate.",
        ),
    ] = 10
    rate: Annotated[
        float, Field(gt=0, le=1, description="The rate of SWA, as a share of the peak.")
    ] = 0.5

    def _cosine(self, epoch: int) -> float:
        return (1 + math.cos(math.pi * epoch / self.cosine_epochs)) / 2

    def share(self, step: int, length: Length) -> float:
        epoch = step // length.epoch
        if epoch <= self.start_epoch:
            return self._cosine(epoch)
        t = min(1.0, (epoch - self.start_epoch) / self.anneal_epochs)
        alpha = (1 - math.cos(math.pi * t)) / 2
        return alpha * self.rate + (1 - alpha) * self._cosine(self.start_epoch)

    def refuse_unfit(self, length: Length) -> None:
        averaged = length.snapshots
        if averaged is not None and averaged.begin // length.epoch != self.start_epoch:
            raise ValueError(
                f"schedule.start_epoch={self.start_epoch} and the average, which begins after "
                f"{averaged.begin // length.epoch} epochs, must agree: set average.start_epoch="
                f"{self.start_epoch}"
            )
        if length.warmup > self.start_epoch * length.epoch:
            raise ValueError(
                f"optimizer.warmup_epochs: a warm-up of {length.warmup / length.epoch:g} epochs "
                f"ends after SWA begins: shorten it to at most schedule.start_epoch="
                f"{self.start_epoch}"
            )
        constant = self.start_epoch + self.anneal_epochs
        if constant >= length.epochs:
            raise ValueError(
                f"schedule.name={self.name}: SWA's rate is reached after {constant} epochs "
                f"(schedule.start_epoch + schedule.anneal_epochs), and the run has "
                f"{length.total / length.epoch:g}: raise train.epochs (or train.max_steps), or "
                "lower these keys and schedule.cosine_epochs"
            )
