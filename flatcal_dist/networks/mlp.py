"""A multilayer perceptron, as a network of timm."""

from itertools import pairwise
from typing import Any

from timm.models import register_model
from torch import Tensor, nn


class MLP(nn.Module):
    """A multilayer perceptron on flattened pixels with GELU, which is smooth in its weights."""

    def __init__(
        self,
        in_chans: int,
        img_size: int,
        num_classes: int,
        width: int = 512,
        depth: int = 2,
        drop_rate: float = 0.0,
    ) -> None:
        """Initialise the layers.

        Args:
            in_chans: The number of channels of an image.
            img_size: The height and the width of an image in pixels.
            num_classes: The number of logits.
            width: The number of outputs of a hidden layer.
            depth: The number of hidden layers.
            drop_rate: The share of the outputs of each hidden layer that dropout sets to zero in
                training.

        Raises:
            ValueError: A number is out of range.
        """
        super().__init__()
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate={drop_rate} has to be 0 or more, and less than 1")
        self.drop_rate = float(drop_rate)
        if not all(isinstance(n, int) and n >= 1 for n in (width, depth)):
            raise ValueError(f"width={width!r} and depth={depth!r} have to be positive numbers")
        sizes = [in_chans * img_size**2] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [N, K] of images [N, C, H, W]."""
        x = images.flatten(1)
        for layer in self.hidden:
            x = nn.functional.gelu(layer(x))
            if self.drop_rate:  # else no random number is drawn
                x = nn.functional.dropout(x, self.drop_rate, self.training)
        return self.head(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return which parameters are of which layer, from the input on, as timm asks for it."""
        return {"hidden": r"^hidden\.(\d+)"}


@register_model
def mlp(
    pretrained: bool = False,
    *,
    img_size: int,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **options: Any,
) -> MLP:
    """Build an `MLP`.

    Args:
        pretrained: It has to be False.
        img_size: The height and the width of an image in pixels.
        pretrained_cfg: It is not used. timm passes this argument and the next two to each network.
        pretrained_cfg_overlay: It is not used.
        cache_dir: It is not used.
        options: Other arguments of `MLP`.

    Raises:
        RuntimeError: There are no pretrained weights.
    """
    if pretrained:
        raise RuntimeError("mlp has no published weights")
    return MLP(img_size=img_size, **options)
