"""Networks by name: the networks of timm, of torchvision and of this package."""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import timm
import torch
import torchvision.models
from torch import nn

import flatcal_dist.networks
from flatcal_dist.errors import ConfigError
from flatcal_dist.networks.options import (
    UNEXPECTED,
    no_such_option,
    reason,
    refuse_no_share,
    refuse_set_elsewhere,
)


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
        refuse_set_elsewhere(options)
        if library == "torchvision":
            return _torchvision(own.partition(".")[0], num_classes, channels, options)
        if not is_registered(own):
            near = difflib.get_close_matches(own, timm.list_models(), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"model.name={name} is no network of timm or of this package{hint}")
        refuse_no_share(options)
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
            raise ConfigError(no_such_option(name, _entry(name), *unknown.groups())) from None
        raise ConfigError(
            f"model.options={options} or the number of classes, channels or pixels does not fit "
            f"model.name={name}: {reason(error)}"
        ) from None


def check_images(
    name: str, num_classes: int, channels: int, image_size: int, options: dict[str, Any]
) -> None:
    """Raise ConfigError if the network cannot take images of this size.

    Two images are tried without values, and with values where that fails. The arguments are those
    of `build`.
    """

    def tried(device: str) -> None:
        with torch.device(device), torch.no_grad():
            network = build(name, num_classes, channels, image_size, own).eval()
            takes.extend(inspect.signature(type(network)).parameters)
            network(torch.zeros(2, channels, image_size, image_size))

    takes: list[str] = []
    own = {key: value for key, value in options.items() if key != "pretrained"}  # no download
    with torch.random.fork_rng(devices=[]):
        try:
            with suppress(Exception):  # some networks look at values, which then are not there
                tried("meta")
                return
            tried("cpu")
        except ConfigError:
            raise
        except NotImplementedError:  # a kernel that only a GPU has
            return
        except Exception as error:
            hint = f"; model.options={{img_size: {image_size}}} may mend it" * ("img_size" in takes)
            raise ConfigError(
                f"model.name={name} with model.options={options} does not take images of "
                f"data.image_size={image_size} pixels and data.channels={channels} channels: "
                f"{reason(error)}{hint}"
            ) from None


def _entry(name: str) -> Callable[..., nn.Module]:
    """Return the function that builds a network of this name."""
    library, own = split_library(name)
    own = own.partition(".")[0]
    if library == "torchvision":
        return torchvision.models.get_model_builder(own)
    return timm.model_entrypoint(own)


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
