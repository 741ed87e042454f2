"""Networks that an engine cannot hold, refused by the name of what is in the way."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flatcal_dist.sharpness.errors import StepError

SPARSE = (
    "the gradient {}is sparse, which has no perturbation: call the function that reads this weight "
    "with sparse=False"
)


def refuse_unheld(network: nn.Module, by: str | None = None) -> None:
    """Called before an engine takes the network, on every rank.

    Args:
        network: The network as the user built it.
        by: The library that cuts parameters into parts, for a message. None where ranks hold
            parameters whole.

    Raises:
        StepError: The network has parameters or buffers without a shape yet, layers whose
            gradients are sparse, or parameters that cannot be cut.
    """
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if is_lazy(tensor):
            raise StepError(
                f"{name} has no shape yet, as its layer is a lazy one: call the network on one "
                "batch of inputs first, then build optimizer and engine"
            )
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise StepError(
                f"the layer {name} has sparse gradients, which have no perturbation: build it "
                "with sparse=False"
            )
    for name, weight in network.named_parameters() if by else ():
        if weight.dim() == 0:
            raise StepError(
                f"{by} cannot hold parameters without a dimension, such as {name}: give it the "
                "shape [1], or use DDP"
            )
        if weight.numel() == 0:
            raise StepError(
                f"{by} cannot hold parameters without values, such as {name} of shape "
                f"{list(weight.shape)}: leave it out of the network, or use DDP"
            )


def refuse_sparse(name: str, gradient: Tensor) -> None:
    """Raises StepError for a gradient that a function made sparse."""
    if gradient.layout != torch.strided:
        raise StepError(SPARSE.format(f"of {name} "))


@contextmanager
def sparse_refused() -> Iterator[None]:
    """Around a backward pass: libraries that pack gradients fail at a sparse one, without its name.

    Raises StepError in place of their error.
    """
    try:
        yield
    except RuntimeError as error:
        if "sparse" not in str(error).lower():
            raise
        raise StepError(SPARSE.format("of a weight ")) from error
