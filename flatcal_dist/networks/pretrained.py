"""Networks with the weights that timm or torchvision publish for them.

    timm:resnet50.a1_in1k                  the name of timm, with or without the tag of the weights
    torchvision:resnet50.IMAGENET1K_V1     the name of torchvision; the tag may be left out, too

Both libraries download the weights once, into their caches.
"""

import math
from typing import Any

import numpy as np
import timm
import torchvision.models
from torch import nn

from flatcal_dist.config import ConfigError
from flatcal_dist.networks.registry import check_torchvision, is_registered, split_library
from flatcal_dist.networks.weights import WeightsError


def build_pretrained(name: str, channels: int, options: dict[str, Any]) -> nn.Module:
    """Build a network with its published weights.

    Args:
        name: timm:NAME or torchvision:NAME, with or without a tag.
        channels: The number of channels of an image.
        options: Further arguments of the network.

    Raises:
        WeightsError: The weights cannot be downloaded, or there are none.
    """
    library, own = split_library(name)
    try:
        if library == "torchvision":
            weights = _torchvision_weights(own)
            return torchvision.models.get_model(own.partition(".")[0], weights=weights, **options)
        return timm.create_model(own, pretrained=True, in_chans=channels, **options)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise WeightsError(
            f"the published weights of {name} cannot be had: {reason[0]}\nThey are fetched over "
            "the network once. Where there is none, give a file with --weights, or point "
            f"{'TORCH_HOME' if library == 'torchvision' else 'HF_HOME'} to a cache that holds them"
        ) from None


def settings(name: str, published: bool) -> list[str]:
    """Return how the library evaluates a network, as overrides of the configuration.

    There are none for networks of neither library. If the published weights are used, the overrides
    include their number of classes. Raises ConfigError for an unknown name and for a preprocessing
    that is not supported.
    """
    library, own = split_library(name)
    if library == "torchvision":
        return _torchvision_settings(own, published)
    if not is_registered(own):
        return []
    cfg = timm.get_pretrained_cfg(own)
    if cfg is None:
        return []
    if cfg.crop_mode != "center":
        raise ConfigError(
            f"timm evaluates {own} with crop mode '{cfg.crop_mode}', which is not supported: its "
            "figures would not be the network's; choose a network evaluated on a centre crop"
        )
    size = (cfg.test_input_size or cfg.input_size)[-1]
    classes = [f"model.num_classes={cfg.num_classes}"] if published else []
    return [
        f"data.image_size={size}",
        f"data.mean={list(cfg.mean)}",
        f"data.std={list(cfg.std)}",
        f"data.crop_pct={min(cfg.test_crop_pct or cfg.crop_pct, 1.0)}",
        f"data.interpolation={cfg.interpolation}",
        *classes,
    ]


def _torchvision_settings(name: str, published: bool) -> list[str]:
    weights = _torchvision_weights(name)
    how = weights.transforms()
    (size,), (resized,) = how.crop_size, how.resize_size
    classes = len(weights.meta["categories"])
    return [
        f"data.image_size={size}",
        f"data.mean={list(how.mean)}",
        f"data.std={list(how.std)}",
        f"data.crop_pct={crop_share(size, resized)}",
        f"data.interpolation={how.interpolation.value}",
        *([f"model.num_classes={classes}"] if published else []),
    ]


def crop_share(size: int, resized: int) -> float:
    """Return the share c with floor(size / c) == resized, which size / resized may miss."""
    share = size / resized
    while math.floor(size / share) < resized:
        share = float(np.nextafter(share, 0))
    return share


def _torchvision_weights(name: str) -> Any:
    own, _, tag = name.partition(".")
    check_torchvision(own)
    weights = torchvision.models.get_model_weights(own)
    tags = [member.name for member in weights]
    if tag and tag not in tags:
        raise ConfigError(f"torchvision has no weights {tag!r} of {own}, only {', '.join(tags)}")
    return weights[tag] if tag else weights.DEFAULT
