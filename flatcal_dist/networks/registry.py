"""Networks by name: the literature's small ones, and all of timm's and torchvision's."""

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import timm
import torchvision.models
from torch import Tensor, nn

from flatcal_dist.errors import ConfigError
from flatcal_dist.sharpness.replay import SameFunctionTwice


class MLP(nn.Module):
    """A multilayer perceptron on flattened pixels, with GELU: smooth in its weights.

    drop_rate: the share of each hidden layer's outputs that dropout makes zero in training.
    """

    def __init__(
        self,
        in_chans: int,
        image_size: int,
        num_classes: int,
        width: int = 512,
        depth: int = 2,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate} has to be 0 or more, and less than 1")
        self.drop_rate = float(drop_rate)
        if not all(isinstance(n, int) and n >= 1 for n in (width, depth)):
            raise ValueError(f"width={width!r} and depth={depth!r} have to be positive numbers")
        sizes = [in_chans * image_size**2] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] to logits [N, K]."""
        x = images.flatten(1)
        for layer in self.hidden:
            x = nn.functional.gelu(layer(x))
            if self.drop_rate:  # else no random number is drawn
                x = nn.functional.dropout(x, self.drop_rate, self.training)
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
        library, own = split_library(name)
        if library == "torchvision":
            return _torchvision(own.partition(".")[0], num_classes, channels, options)
        if not timm.is_model(own):
            near = difflib.get_close_matches(own, ["mlp", *timm.list_models()], n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"model.name={name} is neither 'mlp' nor a network of timm{hint}")
        return timm.create_model(own, num_classes=num_classes, in_chans=channels, **options)
    except ConfigError:
        raise
    except Exception as error:  # the builders of the libraries check little, each in its own way
        raise ConfigError(
            f"model.options={options} or the number of classes, channels or pixels does not fit "
            f"model.name={name}: {type(error).__name__}: {error}"
        ) from None


def split_library(name: str) -> tuple[str, str]:
    """ "timm:NAME", "torchvision:NAME" or NAME as (library, NAME); timm where none is named."""
    library, colon, own = name.rpartition(":")
    if colon and library not in ("timm", "torchvision"):
        raise ConfigError(f"model.name={name}: expected NAME, timm:NAME or torchvision:NAME")
    return (library or "timm"), own


def check_torchvision(name: str) -> None:
    """Raise ConfigError unless torchvision has this classification network."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"model.name: torchvision has no classification network {name!r}{hint}")


def _torchvision(name: str, num_classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    check_torchvision(name)
    if channels != 3:
        raise ConfigError(f"torchvision's networks take 3 channels, not data.channels={channels}")
    if has_auxiliary_heads(name):
        if options.get("aux_logits"):
            raise ConfigError(
                f"model.options.aux_logits=true gives {name} several outputs in training, and the "
                "loss takes one tensor of logits: leave it out"
            )
        options = {"aux_logits": False, "init_weights": True} | options
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)


def has_auxiliary_heads(name: str) -> bool:
    """Whether torchvision's network gives several outputs in training, unless told not to."""
    built = inspect.signature(torchvision.models.get_model_builder(name)).return_annotation
    return "aux_logits" in inspect.signature(built).parameters


def parameter_count(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; then all as if it had not been, so that training goes on the same.

    Each module gets back the mode that it had, frozen layers included. Buffers and random numbers
    are put back too: there are networks that count, or draw a dropout, in either mode.
    """
    modes = {module: module.training for module in model.modules()}
    passes = SameFunctionTwice(model, next(model.parameters()).device)
    model.eval()
    with passes:
        passes.begin()
        try:
            yield
        finally:
            passes.forget()
            for module, training in modes.items():
                module.training = training
