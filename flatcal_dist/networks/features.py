"""The features of a network, which are the input of its last layer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flatcal_dist.config import ConfigError

Watch = Callable[[Tensor], Tensor]


@contextmanager
def watching_features(module: nn.Module, name: str, classes: int) -> Iterator[Watch]:
    """Watch the forward passes of a network for its features.

    Inside, the function that is yielded takes the logits [N, K] of the last pass and returns the
    features [N, D] float32 of that pass. Features are the input of the last layer, which is the
    linear layer or convolution whose output is the logits. They are the same as those of
    `forward_head(x, pre_logits=True)` in timm. They are found in the same way in networks of
    torchvision and of users, also where an engine holds the weights in parts.

    The function raises ConfigError if the logits are not the output of such a layer (they are the
    mean of two heads, or cosines), or if that layer sees a map or a sequence that is pooled
    afterwards.

    Args:
        module: The network.
        name: What errors call the network.
        classes: The number of logits.
    """
    calls: dict[str, tuple[Tensor, Tensor]] = {}  # input and output of the last call of each layer

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
    """Tell whether the logits are this output, also flattened or in another precision."""
    if output.numel() != logits.numel() or output.shape[0] != logits.shape[0]:
        return False
    flat = output.flatten(1)
    return flat.data_ptr() == logits.data_ptr() or bool((flat.to(logits.dtype) == logits).all())
