"""DenseNet-BC for small images."""

from typing import Any

from timm.models.densenet import DenseNet
from torch import nn

from flatcal_dist.networks.small_images.building import registered, reset_as_he


@registered
def densenet_bc_100(num_classes: int = 10, in_chans: int = 3, **options: Any) -> nn.Module:
    """Build DenseNet-BC of depth 100 with growth rate 12 (Huang et al., CVPR 2017, section 3).

    It has 3 blocks of 16 layers, bottlenecks of 48 channels, and transitions that halve the
    channels. Table 2 of the paper gives 0.8 M parameters; with 10 classes it has 769,162, as in
    FMFP. It is timm's `DenseNet` with a convolution of 3 x 3 as stem. There is no residual, so
    there is no stochastic depth; the dropout of the paper is `proj_drop_rate`, 0 by default as in
    FMFP.

    The DenseNet of Mukhoti et al. (NeurIPS 2020) is another one, DenseNet-121 with growth rate 32.

    Args:
        num_classes: The number of logits.
        in_chans: The number of channels of an image.
        options: Other arguments of timm's `DenseNet`.
    """
    growth = 12
    network = DenseNet(growth, (16, 16, 16), num_classes=num_classes, in_chans=in_chans, **options)
    network.features.conv0 = nn.Conv2d(in_chans, 2 * growth, 3, padding=1, bias=False)
    network.features.norm0 = nn.Identity()
    network.features.pool0 = nn.Identity()
    reset_as_he(network)
    return network
