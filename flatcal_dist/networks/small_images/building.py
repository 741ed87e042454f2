"""What the networks for small images share: registration, initial weights, and a plain chain."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn


def registered(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register a builder with timm under its name, as a network without published weights.

    The builder gets `num_classes`, `in_chans` and `model.options`. What it returns raises
    RuntimeError if it is asked for pretrained weights.
    """

    @wraps(build)
    def entry(
        pretrained: bool = False,
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise RuntimeError(f"{build.__name__} has no published weights")
        return build(**options)

    return register_model(entry)


def reset_as_torch(network: nn.Module) -> None:
    """Draw the initial weights of all layers as torch does by default."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.reset_parameters()


@torch.no_grad()
def reset_as_he(network: nn.Module) -> None:
    """Draw convolutions from a normal distribution of variance 2 / (kernel area * channels out).

    This is the rule of He et al. (ICCV 2015, section 2.2, the backward case) as torchvision's first
    ResNets and FMFP have it: `channels out` counts all groups. Other layers are as in torch. The
    biases of convolutions are 0.
    """
    reset_as_torch(network)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            area = layer.kernel_size[0] * layer.kernel_size[1]
            layer.weight.normal_(0, (2 / (area * layer.out_channels)) ** 0.5)
            if layer.bias is not None:
                layer.bias.zero_()


class Chain(nn.Module):
    """A network of three parts in a row, with the methods that timm's networks have.

    Args:
        features: Gives a map [N, C, H, W]. Each of its modules is a layer for layer-wise decay.
        neck: Makes a list of numbers [N, D] of it.
        head: Gives the logits [N, K].
    """

    def __init__(self, features: nn.Sequential, neck: nn.Sequential, head: nn.Linear) -> None:
        super().__init__()
        self.features, self.neck, self.head = features, neck, head
        self.num_classes = head.out_features
        self.num_features = self.head_hidden_size = head.in_features

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [N, K] of images [N, C, H, W]."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map [N, C, H, W]."""
        return self.features(images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a map, or the input [N, D] of the last layer if `pre_logits`."""
        x = self.neck(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """Return the last layer."""
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return which parameters are of which layer, from the input on, as timm asks for it."""
        return {"stem": r"^features\.0\.", "blocks": r"^features\.(\d+)", "neck": r"^neck\.(\d+)"}
