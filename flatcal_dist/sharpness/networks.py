"""Networks that an engine cannot hold are refused with the name of the layer or parameter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from flatcal_dist.sharpness.errors import StepError

if TYPE_CHECKING:
    from flatcal_dist.sharpness.engines.base import Engine

SPARSE = (
    "the gradient {}is sparse, which has no perturbation: call the function that reads this weight "
    "with sparse=False"
)


def refuse_unheld(network: nn.Module, by: str | None = None) -> None:
    """Refuse a network that no engine can hold. Called on every rank before an engine takes it.

    Args:
        network: The network as the user built it.
        by: The library that cuts parameters into parts, for a message. None where ranks hold
            parameters whole.

    Raises:
        StepError: The network has parameters or buffers without a shape yet, layers whose
            gradients are sparse or that change their weights in a forward pass, or parameters that
            cannot be cut.
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
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise StepError(
                f"the layer {name} has max_norm={module.max_norm}, and so changes its weights in "
                "each forward pass, perturbed or not: build it without, and shorten its output, or "
                "its weights after the step"
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


class Parameters:
    """The parameters of a network and of its optimizer, as they were when a step was built."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.parameters, self.trained, self.held = self._now()

    def _now(self) -> tuple[list[nn.Parameter], list[bool], list[Tensor]]:
        """Return the parameters, whether each is trained, and what the optimizer holds."""
        parameters = self.engine.all_parameters()
        groups = self.engine.optimizer.param_groups
        held = [weight for group in groups for weight in group["params"]]
        return parameters, [w.requires_grad for w in parameters], held

    def refuse_changed(self) -> None:
        """Raise StepError if network or optimizer have other parameters now."""
        parameters, trained, held = self._now()
        what = None
        if not _same(self.parameters, parameters):
            what = "parameters of the network were added, removed or replaced"
        elif self.trained != trained:
            what = "parameters were frozen or thawed"
        elif not _same(self.held, held):
            what = "parameters of the optimizer were added, removed or replaced"
        if what:
            raise StepError(
                f"{what} after the step was built: build engine, optimizer and step again"
            )


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class FrozenWeights:
    """A watch for networks whose forward pass changes weights that are not trained.

    Momentum encoders do so, as in MoCo and BYOL. Both passes of a step would change them, each by
    other weights, and the second would see another function than the first. Only the first few
    passes are watched, since every look reads all frozen weights. One pass is not enough: the very
    first may change nothing, when the two encoders are still equal. Where ranks hold parts of
    weights (ZeRO-3, FSDP2), changes to the whole weights that a pass gathers are not seen.
    """

    LOOKS = 3  # first passes

    def __init__(self, network: nn.Module) -> None:
        # ZeRO-3's are empty but while they are gathered, and small ones stay so from a pass on.
        self.frozen = {
            name: weight
            for name, weight in network.named_parameters()
            if not weight.requires_grad and not hasattr(weight, "ds_id")
        }
        self.looks = self.LOOKS

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch a first pass. Raises StepError with the name of a frozen weight that it changes."""
        if not self.looks:
            yield
            return
        self.looks -= 1
        before = {name: _squares(weight) for name, weight in self.frozen.items()}
        yield
        for name, weight in self.frozen.items():
            if not torch.equal(_squares(weight), before[name]):
                raise StepError(
                    f"the forward pass changes the frozen weight {name}, as momentum encoders do: "
                    "both passes of a step would change it, and see other weights. Make it a "
                    "buffer (register_buffer), which both passes get alike, or change it after "
                    "the step"
                )


@torch.no_grad()
def _squares(weight: Tensor) -> Tensor:
    """Return a number that changes when the weight changes."""
    weight = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    weight = torch.view_as_real(weight.resolve_conj()) if weight.is_complex() else weight
    return weight.double().square().sum().nan_to_num()


def refuse_sparse(name: str, gradient: Tensor) -> None:
    """Raise StepError for a gradient that a function made sparse."""
    if gradient.layout != torch.strided:
        raise StepError(SPARSE.format(f"of {name} "))


@contextmanager
def sparse_refused() -> Iterator[None]:
    """Raise StepError where a backward pass inside fails at a sparse gradient.

    Libraries that pack gradients raise errors without the name of the gradient.
    """
    try:
        yield
    except RuntimeError as error:
        if "sparse" not in str(error).lower():
            raise
        raise StepError(SPARSE.format("of a weight ")) from error
