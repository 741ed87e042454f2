"""ConvMixer for small images."""

from collections import OrderedDict
from typing import Any

from timm.layers import DropPath
from timm.models.convmixer import ConvMixer
from torch import nn

from flatcal_dist.networks.small_images.building import registered


@registered
def convmixer_256_16(
    num_classes: int = 10, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any
) -> nn.Module:
    """Build ConvMixer-256/16 (Trockman and Kolter, Patches Are All You Need?, TMLR 2023).

    Patches are single pixels and kernels 8 x 8, as in FMFP. Figure 2 of the paper has the layers:
    h (d (k^2 + h + 6) + c p^2 + K + 3) + K parameters for width h, depth d, kernel k, patch p, c
    channels and K classes. With 10 classes these are 1,339,402, as in FMFP. Initial weights are
    torch's default, as there.

    Args:
        num_classes: The number of logits.
        in_chans: The number of channels of an image.
        drop_path_rate: The rate of stochastic depth in the last residual. It falls linearly to 0 in
            the first. timm's ConvMixer has none.
        options: Other arguments of timm's `ConvMixer`.
    """
    depth = 16
    network = ConvMixer(
        256,
        depth,
        kernel_size=8,
        patch_size=1,
        num_classes=num_classes,
        in_chans=in_chans,
        **options,
    )
    for number, block in enumerate(network.blocks):
        rate = drop_path_rate * number / (depth - 1)
        residual = block.get_submodule("0")
        residual.fn = _residual(residual.get_submodule("fn"), rate)
    return network


def _residual(layers: nn.Module, drop_path: float) -> nn.Sequential:
    """Return the layers of a residual, with stochastic depth of this rate at the end.

    They keep their names. Padding has a layer of its own: it is that of torch's "same", which warns
    about even kernels.
    """
    conv, activation, norm = layers.children()
    assert isinstance(conv, nn.Conv2d)
    conv.padding = (0, 0)
    named = {"pad": nn.ZeroPad2d((3, 4, 3, 4)), "0": conv, "1": activation, "2": norm}
    if drop_path:
        named["drop_path"] = DropPath(drop_path)
    return nn.Sequential(OrderedDict(named))
