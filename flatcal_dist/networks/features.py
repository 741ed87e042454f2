"""The features of a network: what its last layer makes its logits of."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flatcal_dist.config import ConfigError

Watch = Callable[[Tensor], Tensor]


@contextmanager
def watching_features(module: nn.Module, name: str, classes: int) -> Iterator[Watch]:
    """Inside, a function gives the features [N, D] float32 that the last forward pass used.

    It takes the logits [N, K] of that pass. Features are the input of the last layer: the linear
    layer, or convolution, whose output is the logits. They are what timm's
    `forward_head(x, pre_logits=True)` gives, and are found in the same way in networks of
    torchvision and in your own, also where an engine holds their weights in parts.

    The function raises ConfigError, with the `name` of the network, where the logits are the output
    of no such layer (they are a mean of two heads, or cosines), or where that layer sees a map or a
    sequence that is pooled after it.
    """
    calls: dict[str, tuple[Tensor, Tensor]] = {}  # the last one of each layer

    def watch(place: str, layer: nn.Module) -> Any:
        def remember(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                calls[place] = inputs[0], output

        return layer.register_forward_hook(remember)

    def features(logits: Tensor) -> Tensor:
        seen = [(place, given) for place, (given, made) in calls.items() if _same(made, logits)]
        calls.clear()
        if not seen:
            raise ConfigError(
                f"{name} has no features that a confidence score could use: its logits are not the "
                f"output of a linear layer with {classes} outputs. Leave scores of features out of "
                "evaluate.confidence"
            )
        place, inputs = seen[-1]
        flat = inputs.flatten(1)
        if inputs.dim() != 2 and flat.shape[1] != inputs.shape[1]:
            raise ConfigError(
                f"{name} has no features that a confidence score could use: its last layer "
                f"{place} sees {list(inputs.shape[1:])} values of an image and not a list of them. "
                "Leave scores of features out of evaluate.confidence"
            )
        return flat.float()

    with ExitStack() as hooks:
        for place, layer in module.named_modules():
            if _outputs(layer) == classes:
                handle = watch(place, layer)
                hooks.callback(handle.remove)
        yield features


def _outputs(layer: nn.Module) -> int | None:
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return layer.out_channels if isinstance(layer, _ConvNd) else None


def _same(output: Tensor, logits: Tensor) -> bool:
    """Whether the logits are this output, as it is or flattened or in another precision."""
    if output.numel() != logits.numel() or output.shape[0] != logits.shape[0]:
        return False
    flat = output.flatten(1)
    return flat.data_ptr() == logits.data_ptr() or bool((flat.to(logits.dtype) == logits).all())
