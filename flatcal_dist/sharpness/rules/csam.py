"""Calibrated SAM."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from flatcal_dist.objectives.csam import csam_loss
from flatcal_dist.sharpness.rules.base import Loss
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class CSAM(SAM):
    """Calibrated SAM (Tan et al., ICLR 2026, arXiv 2505.23866).

    The perturbation is SAM's, from plain cross-entropy. The descent gradient is the gradient of
    `csam_loss` at w + e. With gamma 0 the rule is SAM.
    """

    name: ClassVar[str] = "csam"
    own_loss: ClassVar[bool] = True

    gamma: Annotated[
        float,
        Field(ge=0, le=2, description="How much less a confident sample weighs. 0 is SAM."),
    ] = 1.0

    def descent_loss(self, loss: Loss) -> Loss:
        if self.gamma == 0:
            return loss
        return partial(csam_loss, gamma=self.gamma, reduction="none")
