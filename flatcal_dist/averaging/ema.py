"""The exponential moving average."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.averaging.base import AverageRule, Moment


@dataclass(frozen=True)
class EMA(AverageRule):
    """The exponential moving average, from the initial weights on.

    Each step sets average <- decay * average + (1 - decay) * weights.

    Polyak and Juditsky (1992) average iterates. This form is used by timm and by Tarvainen and
    Valpola (NeurIPS 2017).
    """

    name: ClassVar[str] = "ema"

    decay: Annotated[
        float, Field(ge=0, lt=1, description="How much the old average counts in each step.")
    ] = 0.9999

    def share(self, moment: Moment) -> float | None:
        return None if moment.skipped else 1 - self.decay
