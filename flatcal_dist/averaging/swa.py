"""Stochastic weight averaging."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.averaging.base import AverageRule, Moment


@dataclass(frozen=True)
class SWA(AverageRule):
    """The plain average of the weights at the ends of the last epochs (Izmailov et al., UAI 2018).

    The paper keeps the learning rate high meanwhile (see the section `schedule`). It averages over
    the last quarter of training or more, and estimates the statistics of batch norm again
    (algorithm 1), which is the default here too.
    """

    name: ClassVar[str] = "swa"

    start: Annotated[
        float,
        Field(ge=0, lt=1, description="The share of training after which averaging begins."),
    ] = 0.75
    every_epochs: Annotated[
        int, Field(ge=1, le=10**6, description="Average at the end of every N-th epoch.")
    ] = 1

    def share(self, moment: Moment) -> float | None:
        """Average at the ends of epochs after `start`, and after the last step at the latest."""
        last = moment.step == moment.total_steps
        if moment.step <= self.start * moment.total_steps:
            return None
        if moment.step % (self.every_epochs * moment.epoch_steps) and not (
            last and moment.count == 0
        ):
            return None
        return 1 / (moment.count + 1)
