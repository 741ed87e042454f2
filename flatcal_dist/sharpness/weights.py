"""Which weights a rule perturbs, and a descent that goes past the optimizer."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.rules import Memory, Rule, Shards

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_weights(network: nn.Module) -> set[str]:
    """Return the names of the parameters of norm layers: their weights and biases.

    Norm layers are torch's, those derived from them (timm's), and modules without inner modules
    whose class has "norm" in its name, as in other libraries.
    """
    return {
        f"{layer}.{name}" if layer else name
        for layer, module in network.named_modules()
        if _is_norm(module)
        for name, _ in module.named_parameters(recurse=False)
    }


def _is_norm(module: nn.Module) -> bool:
    alone = next(module.children(), None) is None
    return isinstance(module, NORMS) or (alone and "norm" in type(module).__name__.lower())


def selection(rule: Rule, network: nn.Module) -> Callable[[str], bool]:
    """Return whether a rule perturbs the parameter of a name.

    Raises StepError if only norm layers are to be perturbed and none has a trained parameter.
    """
    if rule.select == "all":
        return rule.selects
    norms = norm_weights(network)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    if not norms & trained:
        raise StepError(
            "select='norms' perturbs the weights of norm layers only, and the network has no norm "
            "layer with trained weights: nothing would be perturbed. Use select='all'"
        )
    return lambda name: name in norms and rule.selects(name)


def add_decay_(shards: Shards, decays: dict[str, float]) -> None:
    """Add (weight decay) * w to the gradients of a mean loss, in their scale.

    Args:
        shards: The weights and the gradients.
        decays: The weight decay of each weight, by name.
    """
    scale = shards.loss_scale * shards.weight
    for (name, gradient), weight in zip(shards.by_name(), shards.weights, strict=True):
        if decays[name]:
            gradient.add_(weight.detach() * (decays[name] * scale))


@torch.no_grad()
def descend(engine: Engine, direction: Memory | None) -> None:
    """Move each weight by -(its learning rate) times its direction. Called by all ranks.

    Called after the optimizer's step. The direction holds this rank's parts, by name, or is None
    in a step without one.
    """
    if direction is None:
        return
    rates = engine.learning_rates()
    for name, master in engine.masters().items():
        if name in direction:
            master.sub_(direction[name].view_as(master), alpha=rates[name])
    engine.rewritten()
