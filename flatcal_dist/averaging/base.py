"""What an average of the weights is: how much the weights of a step count in it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flatcal_dist.choices import check


@dataclass(frozen=True)
class Moment:
    """Where a run stands after a step.

    step: optimizer steps done. skipped: the last one moved nothing. epoch_steps: steps of an epoch.
    total_steps: of the whole run. count: how often weights were averaged so far; an average keeps
    this number in checkpoints.
    """

    step: int
    skipped: bool
    epoch_steps: int
    total_steps: int
    count: int


@dataclass(frozen=True)
class AverageRule(ABC):
    """Average <- average + share * (weights - average), whenever there is a share.

    Until the first time there is no average, and the network is evaluated as it is. A new average
    is one file with one class: its `name` is what a configuration calls it, and its fields are keys
    of the configuration's section `average`. The average is what is validated, kept as best,
    reported and exported. Raises ValueError for a field outside its bounds.
    """

    name: ClassVar[str]

    norm_statistics: Annotated[
        Literal["reestimate", "average"],
        Field(
            description="Where the average's statistics of batch norm come from. reestimate: from "
            "training images, for each average that is evaluated. average: they are averaged as "
            "the weights are, which is cheaper and less exact."
        ),
    ] = "reestimate"

    def __post_init__(self) -> None:
        check(self)

    @abstractmethod
    def share(self, moment: Moment) -> float | None:
        """How much the present weights count in the new average, in (0, 1]; None: not now."""
