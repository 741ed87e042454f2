"""The exponential moving average of the weights, kept by each engine on its own parts, in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flatcal_dist.sharpness.engines import Engine


class Average:
    """average <- decay * average + (1 - decay) * weights, from the initial weights on.

    Of the trained weights; buffers (running statistics are averages already) stay the network's,
    as torch.optim.swa_utils.AveragedModel does by default. One copy of this rank's fp32 weights.
    """

    @torch.no_grad()
    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.weights = {name: w.detach().clone() for name, w in engine.masters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """After a step that moved the weights; between steps they are never perturbed."""
        now = self.engine.masters()
        if self.weights:  # a rank of ZeRO may hold none
            torch._foreach_lerp_(
                list(self.weights.values()), [now[name] for name in self.weights], 1 - self.decay
            )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network has the average's weights inside; its own, bit for bit, after. All ranks."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, master in self.engine.masters().items():
            own = master.clone()
            master.copy_(self.weights[name])
            self.weights[name].copy_(own)
        self.engine.rewritten()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """This rank's part of a saved average, by name."""
        for name, average in self.weights.items():
            average.copy_(weights[name].view(average.shape))
