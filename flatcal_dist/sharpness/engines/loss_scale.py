"""Dynamic loss scaling for fp16 (Micikevicius et al., ICLR 2018), one decision per step.

torch.amp.GradScaler decides on each rank alone what is not finite, and only in the pass that it
unscales. Here the step decides, for both passes and all ranks. The scale is a power of two, so that
it changes no bit of a gradient that stays in range.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000  # steps in a row without a skip, then twice the scale
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The factor of losses. It is halved after a skipped step and doubled after many clean ones."""

    enabled: bool = False
    value: float = 1.0
    clean_steps: int = 0

    @classmethod
    def start(cls, dtype: torch.dtype) -> "LossScale":
        """Return a scale for float16, and none for types with the range of float32."""
        return cls(True, 2.0**16) if dtype == torch.float16 else cls()

    def unscale_(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled and gradients:
            torch._foreach_mul_(list(gradients), 1 / self.value)

    def update(self, skipped: bool) -> None:
        """Take note of a step. Called once per step."""
        if not self.enabled:
            return
        self.clean_steps = 0 if skipped else self.clean_steps + 1
        if skipped:
            self.value = max(self.value / 2, 1.0)
        elif self.clean_steps == GROWTH_INTERVAL:
            self.value, self.clean_steps = min(self.value * 2, LARGEST), 0
