"""Residual networks with activations before convolutions: PreAct-ResNet and WRN.

Both are timm's `ResNetV2` of basic blocks, with a convolution of 3 x 3 in place of its stem. All
take `drop_path_rate` (stochastic depth) and `drop_rate` (dropout before the last layer).
"""

from collections import OrderedDict
from typing import Any

from timm.layers import BatchNormAct2d, ClassifierHead, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn

from flatcal_dist.networks.small_images.building import registered, reset_as_he

STEM = 16  # channels after the first convolution, in both papers


@registered
def preact_resnet110(**options: Any) -> nn.Module:
    """Build PreAct-ResNet-110 (He et al., Identity Mappings, ECCV 2016, section 3).

    It has 3 x 18 basic blocks of widths 16, 32 and 64. He et al. (CVPR 2016, table 6) give 1.7 M
    parameters for ResNet-110; with 10 classes this one has 1,730,522, as in FMFP. As in FMFP, a
    shortcut between widths is a convolution of 1 x 1 behind the first norm and ReLU of the block.
    The paper's has no parameters (2,560 fewer).
    """
    return _preact([18, 18, 18], 1, **options)


@registered
def preact_resnet20(**options: Any) -> nn.Module:
    """Build PreAct-ResNet-20, which has 3 x 3 blocks and is else as `preact_resnet110`.

    He et al. (CVPR 2016, table 6) give 0.27 M parameters for ResNet-20; with 10 classes this one
    has 272,282, as in FMFP.
    """
    return _preact([3, 3, 3], 1, **options)


@registered
def wrn_28_10(**options: Any) -> nn.Module:
    """Build WRN-28-10 (Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, section 2).

    It has 3 x 4 basic blocks of widths 160, 320 and 640. Table 4 of the paper gives 36.5 M
    parameters; with 10 classes it has 36,479,194, as in FMFP. There is no dropout inside of blocks,
    which the paper tries too and FMFP leaves out.

    The Wide-ResNet of Mukhoti et al. (NeurIPS 2020) is another network: 26-10, with norms behind
    the convolutions, and in the shortcuts too.
    """
    return _preact([4, 4, 4], 10, **options)


def _preact(
    depths: list[int], factor: int, /, num_classes: int = 10, in_chans: int = 3, **options: Any
) -> ResNetV2:
    """Build a network with three stages of basic blocks.

    Args:
        depths: The number of blocks of each stage.
        factor: The factor of the widths 16, 32 and 64.
        num_classes: The number of logits.
        in_chans: The number of channels of an image.
        options: Other arguments of timm's `ResNetV2`.
    """
    network = ResNetV2(
        depths,
        channels=(16 * factor, 32 * factor, 64 * factor),
        num_classes=num_classes,
        in_chans=in_chans,
        stem_chs=STEM,
        basic=True,
        bottle_ratio=1.0,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
        **options,
    )
    stem = nn.Conv2d(in_chans, STEM, 3, padding=1, bias=False)
    network.stem = nn.Sequential(OrderedDict(conv=stem))
    network.head = ClassifierHead(network.num_features, num_classes, drop_rate=network.drop_rate)
    reset_as_he(network)
    return network
