"""What engines share whose optimizer holds the parameters of the network themselves.

They are one process, DDP and FSDP2. DeepSpeed's optimizer holds flat parts, and scales by itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flatcal_dist.sharpness.engines.base import Arrangement, rates_by_name, stack
from flatcal_dist.sharpness.engines.loss_scale import LossScale


class OfParameters(ABC):
    """The part of the `Engine` protocol that needs weights, optimizer and loss scale alone."""

    weights: Mapping[str, nn.Parameter]  # the trained ones, by name
    optimizer: torch.optim.Optimizer
    scale: LossScale
    device: torch.device

    @abstractmethod
    def zero_gradients(self) -> None: ...

    @abstractmethod
    def over_ranks(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def arrangement(self) -> Arrangement: ...

    @property
    def loss_scale(self) -> float:
        return self.scale.value

    @property
    def scales_losses(self) -> bool:
        return self.scale.enabled

    def set_loss_scale(self, value: float) -> None:
        self.scale.value = value

    def skip(self) -> None:
        self.zero_gradients()
        self.scale.update(skipped=True)

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        return self.over_ranks(stack(values, self.device)).tolist()

    def fill_gradients(self, names: Iterable[str]) -> None:
        for weight in map(self.weights.__getitem__, names):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)

    def learning_rates(self) -> dict[str, float]:
        return rates_by_name(self.optimizer, self.arrangement()["slots"])

    def weight_decays(self) -> dict[str, float]:
        decays = {
            id(w): float(group.get("weight_decay", 0.0))
            for group in self.optimizer.param_groups
            for w in group["params"]
        }
        return {name: decays[id(weight)] for name, weight in self.weights.items()}
