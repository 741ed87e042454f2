"""Stochastic weight averaging."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.averaging.base import AverageRule, Moment, Snapshots


@dataclass(frozen=True)
class SWA(AverageRule):
    """The plain average of the weights at the ends of the last epochs (Izmailov et al., UAI 2018).

    The paper keeps the learning rate high meanwhile (see the section `schedule`). It averages over
    the last quarter of training or more, and estimates the statistics of batch norm again
    (algorithm 1), which is the default here too.

    Algorithm 1 also counts the weights that averaging begins with. The authors' code (`swa_start`),
    torch's AveragedModel and this class do not: the first weights are those of the end of the first
    epoch after `start`.
    """

    name: ClassVar[str] = "swa"

    start: Annotated[
        float,
        Field(ge=0, lt=1, description="The share of training after which averaging begins."),
    ] = 0.75
    start_epoch: Annotated[
        int | None,
        Field(
            ge=0,
            le=10**6,
            description="The number of epochs after which averaging begins, in place of "
            "average.start: with 120 the weights after epochs 121, 122 and so on are averaged.",
        ),
    ] = None
    every_epochs: Annotated[
        int, Field(ge=1, le=10**6, description="Average at the end of every N-th epoch.")
    ] = 1

    def snapshots(self, epoch_steps: int, total_steps: int) -> Snapshots:
        if self.start_epoch is not None:
            return Snapshots(self.start_epoch * epoch_steps, self.every_epochs)
        # 0.7 * 1400 is a little less than 980 here, which must not add a snapshot.
        return Snapshots(math.floor(round(self.start * total_steps, 6)), self.every_epochs)

    def share(self, moment: Moment) -> float | None:
        """Average at the ends of epochs after `start`, and after the last step at the latest."""
        last = moment.step == moment.total_steps
        snapshots = self.snapshots(moment.epoch_steps, moment.total_steps)
        if moment.step <= snapshots.begin:
            return None
        if moment.step % (self.every_epochs * moment.epoch_steps) and not (
            last and moment.count == 0
        ):
            return None
        return 1 / (moment.count + 1)
