"""Networks by name: the networks of timm, of torchvision and of this package."""

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from typing import Any

import timm
import torchvision.models
from torch import nn

import flatcal_dist.networks
from flatcal_dist.errors import ConfigError

UNEXPECTED = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'.*")
SET_BY_OTHER_KEYS = (
    "self", "pretrained", "weights", "progress", "num_classes", "in_chans", "img_size", "device",
    "dtype",
)  # fmt: skip


@cache
def _import_networks() -> None:
    """Import all modules of this package, so that their networks are registered with timm."""
    prefix = f"{flatcal_dist.networks.__name__}."
    for module in pkgutil.walk_packages(flatcal_dist.networks.__path__, prefix):
        importlib.import_module(module.name)


def is_registered(name: str) -> bool:
    """Tell whether a network of timm or of this package has this name, which may end in a tag."""
    _import_networks()
    return bool(timm.is_model(name))


def build(
    name: str, num_classes: int, channels: int, image_size: int, options: dict[str, Any]
) -> nn.Module:
    """Build a network for images [N, channels, image_size, image_size].

    Args:
        name: NAME or timm:NAME for a network of timm or of this package, or torchvision:NAME.
        num_classes: The number of logits.
        channels: The number of channels of an image.
        image_size: The height and the width of an image in pixels.
        options: Further arguments of the network.

    Raises:
        ConfigError: The name is unknown, or the network does not take the options.
    """
    try:
        library, own = split_library(name)
        if library == "torchvision":
            return _torchvision(own.partition(".")[0], num_classes, channels, options)
        if not is_registered(own):
            near = difflib.get_close_matches(own, timm.list_models(), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"model.name={name} is no network of timm or of this package{hint}")
        _refuse_no_share(options)
        sized = "img_size" in inspect.signature(timm.model_entrypoint(own)).parameters
        if sized and options.get("img_size", image_size) != image_size:
            raise ConfigError(
                f"model.options.img_size={options['img_size']} is another size than that of the "
                f"images, data.image_size={image_size}: leave it out"
            )
        arguments = ({"img_size": image_size} if sized else {}) | options
        return timm.create_model(own, num_classes=num_classes, in_chans=channels, **arguments)
    except ConfigError:
        raise
    except Exception as error:  # builders check little, and raise different errors
        if unknown := UNEXPECTED.fullmatch(str(error)):
            raise ConfigError(_no_such_option(name, *unknown.groups())) from None
        raise ConfigError(
            f"model.options={options} or the number of classes, channels or pixels does not fit "
            f"model.name={name}: {type(error).__name__}: {error}"
        ) from None


def _no_such_option(name: str, builder: str, option: str) -> str:
    """Say that a network has no such option, and which it has, as far as its builder tells."""
    library, own = split_library(name)
    own = own.partition(".")[0]
    entry = (
        torchvision.models.get_model_builder(own)
        if library == "torchvision"
        else timm.model_entrypoint(own)
    )
    function = getattr(sys.modules[entry.__module__], builder, entry)
    known = [
        key
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and key not in SET_BY_OTHER_KEYS
    ]
    near = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else "."
    return (
        f"model.options.{option}: model.name={name} has no such option{hint} It has "
        f"{', '.join(known) or 'none'}"
    )


def _refuse_no_share(options: dict[str, Any]) -> None:
    """Raise ConfigError for a rate of dropout or stochastic depth that is no share below 1."""
    for key, value in options.items():
        if not key.endswith("drop_rate") and key != "drop_path_rate":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(
                f"model.options.{key}={value!r} is no share of values to leave out: expected a "
                "number from 0 on and below 1"
            )


def split_library(name: str) -> tuple[str, str]:
    """Split "timm:NAME", "torchvision:NAME" or NAME into (library, NAME).

    The library is timm where none is named. Raises ConfigError for another library.
    """
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
    """Tell whether a network of torchvision gives several outputs in training by default."""
    built = inspect.signature(torchvision.models.get_model_builder(name)).return_annotation
    return "aux_logits" in inspect.signature(built).parameters


def parameter_count(model: nn.Module) -> int:
    """Return the number of all parameters, frozen ones included."""
    return sum(weight.numel() for weight in model.parameters())
