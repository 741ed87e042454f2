"""ResNets (He et al., Deep Residual Learning, CVPR 2016) for small images."""

from typing import Any

import torch
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from flatcal_dist.networks.small_images.building import (
    Chain,
    registered,
    reset_as_he,
    reset_as_torch,
)


@registered
def resnet18_cifar(**options: Any) -> nn.Module:
    """Build ResNet-18 with a stem for small images: 3 x 3, stride 1, without pooling.

    With 10 classes it has 11,173,962 parameters, as in FMFP. That is timm's `resnet18` with 10
    classes but for the stem, which has 40 weights fewer for each of 3 x 64 pairs of channels.
    Initial weights are torch's default, as there. `model.options` are those of timm's `ResNet`,
    such as `drop_path_rate`.
    """
    return _with_small_stem(BasicBlock, (2, 2, 2, 2), **options)


@registered
def resnet50_cifar(**options: Any) -> nn.Module:
    """Build ResNet-50 with the stem of `resnet18_cifar`.

    With 10 classes it has 23,520,842 parameters, as in the code of Mukhoti et al. (Calibrating Deep
    Neural Networks using Focal Loss, NeurIPS 2020). Their network for Tiny-ImageNet averages the
    last map to 2 x 2 and not to one pixel, and has four times as many weights in its last layer.
    """
    return _with_small_stem(Bottleneck, (3, 4, 6, 3), **options)


def _with_small_stem(
    block: Any,
    depths: tuple[int, ...],
    /,
    num_classes: int = 10,
    in_chans: int = 3,
    **options: Any,
) -> ResNet:
    network = ResNet(block, depths, num_classes=num_classes, in_chans=in_chans, **options)
    network.add_module("conv1", nn.Conv2d(in_chans, 64, 3, padding=1, bias=False))
    network.add_module("maxpool", nn.Identity())
    reset_as_torch(network)
    return network


class PadChannels(nn.Module):
    """A shortcut without parameters: every second pixel, and channels of zeros (option A)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a map [N, 2 C, H / 2, W / 2] of a map [N, C, H, W]."""
        x = x[:, :, ::2, ::2]
        zeros = torch.zeros_like(x[:, : x.shape[1] // 2])
        return torch.cat([zeros, x, zeros], dim=1)


def _projection(channels: int, norm: type[nn.Module]) -> nn.Sequential:
    """Return the shortcut with parameters (option B)."""
    conv = nn.Conv2d(channels // 2, channels, 1, stride=2, bias=False)
    return nn.Sequential(conv, norm(channels))


@registered
def resnet20_cifar(
    num_classes: int = 10,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    projection: bool = False,
    blocks: int = 3,
    width: int = 16,
    batch_norm: bool = True,
) -> nn.Module:
    """Build ResNet-20 (section 4.2 of the paper): 3 x 3 basic blocks of widths 16, 32 and 64.

    Table 6 gives 0.27 M parameters; with 10 classes it has 269,722. Shortcuts between widths have
    no parameters. With `projection` they are convolutions of 1 x 1 with a norm (272,474), as in the
    class `ResNet_Cifar` of FMFP. Other numbers of blocks are the paper's other depths: n blocks at
    each width make 6 n + 2 layers, so that blocks=1 is ResNet-8 and blocks=9 is ResNet-56.

    Args:
        num_classes: The number of logits.
        in_chans: The number of channels of an image.
        drop_rate: The dropout before the last layer.
        drop_path_rate: The rate of stochastic depth in the last block. It falls linearly to 0 in
            the first (Huang et al., ECCV 2016, section 3).
        projection: Whether shortcuts between widths have parameters.
        blocks: The number of blocks at each of the three widths.
        width: The channels of the first width. The second has twice as many, the third four times.
        batch_norm: Whether there are norms. Convolutions have no bias in either case.

    Raises:
        ValueError: `blocks` or `width` is no positive whole number.
    """
    for name, value in (("blocks", blocks), ("width", width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is a whole number from 1 on, not {value!r}")
    norm = nn.BatchNorm2d if batch_norm else nn.Identity
    stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
    layers: list[nn.Module] = [nn.Sequential(stem, norm(width), nn.ReLU(inplace=True))]
    widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
    for number, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
        wider = after != before
        shortcut = _projection(after, norm) if projection else PadChannels()
        drop_path = DropPath(drop_path_rate * number / (len(widths) - 1))
        layers.append(
            BasicBlock(
                before,
                after,
                stride=2 if wider else 1,
                downsample=shortcut if wider else None,
                norm_layer=norm,
                drop_path=drop_path if drop_path.drop_prob else None,
            )
        )
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop_rate))
    network = Chain(nn.Sequential(*layers), pool, nn.Linear(4 * width, num_classes))
    reset_as_he(network)
    return network
