"""What an average of the weights is: how much the weights of each step count."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from flatcal_dist.choices import check


@dataclass(frozen=True)
class Moment:
    """Where a run stands after a step.

    Args:
        step: The number of optimizer steps that were taken.
        skipped: Whether the last step moved nothing.
        epoch_steps: The number of steps in an epoch.
        total_steps: The number of steps in the whole run.
        count: How often weights were averaged so far. Checkpoints keep this number.
    """

    step: int
    skipped: bool
    epoch_steps: int
    total_steps: int
    count: int


@dataclass(frozen=True)
class Snapshots:
    """The moments at which weights are averaged, if averaging begins in the course of training.

    Args:
        begin: The number of optimizer steps after which averaging begins.
        every_epochs: The weights at the end of every N-th epoch after it are averaged. Epochs are
            counted from the start of training.
    """

    begin: int
    every_epochs: int

    def count(self, epoch_steps: int, total_steps: int) -> int:
        """Return how often weights are averaged at the ends of epochs in a run of this length."""
        every = self.every_epochs * epoch_steps
        return max(total_steps // every - self.begin // every, 0)


@dataclass(frozen=True)
class AverageRule(ABC):
    """Average <- average + share * (weights - average), whenever there is a share.

    Until the first time there is no average, and the network is evaluated as it is. The average is
    what is validated, kept as best, reported and exported. A new average is one file with one
    class. Its `name` is the value of `average.name` in a configuration, and its fields are keys of
    the section `average`.

    Raises:
        ValueError: A field is outside its bounds.
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

    def snapshots(self, epoch_steps: int, total_steps: int) -> Snapshots | None:
        """Return when weights are averaged in a run of this length.

        None stands for an average of all weights, from the first step on.
        """
        return None

    @abstractmethod
    def share(self, moment: Moment) -> float | None:
        """Return how much the present weights count in the new average, in (0, 1].

        None means that they are not averaged now.
        """
