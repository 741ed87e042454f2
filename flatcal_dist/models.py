"""Networks by name: the literature's small ones, and all of timm's."""

import difflib
from itertools import pairwise
from typing import Any

import timm
from torch import Tensor, nn

from flatcal_dist.config import ConfigError


class MLP(nn.Module):
    """A multilayer perceptron on flattened pixels, with GELU: smooth in its weights."""

    def __init__(
        self, in_chans: int, image_size: int, num_classes: int, width: int = 512, depth: int = 2
    ) -> None:
        super().__init__()
        sizes = [in_chans * image_size**2] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        x = images.flatten(1)
        for layer in self.hidden:
            x = nn.functional.gelu(layer(x))
        return self.head(x)


def build(
    name: str, num_classes: int, channels: int, image_size: int, options: dict[str, Any]
) -> nn.Module:
    """The network `name`, for images [N, channels, image_size, image_size].

    Raises ConfigError for an unknown name or options that the network does not take.
    """
    try:
        if name == "mlp":
            return MLP(channels, image_size, num_classes, **options)
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, ["mlp", *timm.list_models()], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"model.name={name} is neither 'mlp' nor a network of timm{hint}")
        return timm.create_model(name, num_classes=num_classes, in_chans=channels, **options)
    except TypeError as error:
        raise ConfigError(
            f"model.options={options} does not fit model.name={name}: {error}"
        ) from None


def parameter_count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
