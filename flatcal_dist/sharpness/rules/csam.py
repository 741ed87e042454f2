"""Calibrated SAM."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from flatcal_dist.objectives.csam import csam_loss
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.rules.base import Loss
from flatcal_dist.sharpness.rules.sam import SAM


@dataclass(frozen=True)
class CSAM(SAM):
    """Calibrated SAM (Tan et al., ICLR 2026, arXiv 2505.23866).

    The perturbation is SAM's, from plain cross-entropy. The descent gradient is that of `csam_loss`
    at w + e. With gamma 0 it is SAM. Raises StepError for gamma outside [0, 2].
    """

    gamma: float = 1.0
    own_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 2:
            raise StepError(f"gamma must lie in [0, 2], got {self.gamma}")

    def descent_loss(self, loss: Loss) -> Loss:
        if self.gamma == 0:
            return loss
        return partial(csam_loss, gamma=self.gamma, reduction="none")
