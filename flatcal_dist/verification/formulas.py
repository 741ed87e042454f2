"""The rules' formulas once more, on lists of whole tensors, for `reference.py`.

`perturb` says what e is, `loss_at` which loss is followed at w + e, and `combined` what becomes of
the gradient. Nothing here calls a rule: only its numbers are read.
"""

import math

import torch
from torch import Tensor, nn

from flatcal_dist.objectives import Targets
from flatcal_dist.sharpness import (
    ASAM,
    CSAM,
    GSAM,
    LESAM,
    SSAM,
    WSAM,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    Rule,
    StaleSAM,
)
from flatcal_dist.sharpness.rules import Loss
from flatcal_dist.verification.laboratory import PROGRESS

Gradient = list[Tensor]


@torch.no_grad()
def perturb(network: nn.Module, gradient: Gradient, rule: Rule, kept: Gradient) -> None:
    """Move the weights of a network by e.

    Args:
        network: The network, at w.
        gradient: The ascent gradient, of the mean loss of the samples that perturb together.
        rule: The rule.
        kept: What the rule remembers, or nothing.
    """
    named = [(n, w) for n, w in network.named_parameters() if w.requires_grad]
    if isinstance(rule, FriendlySAM) and kept:
        gradient = [g - rule.sigma * m for g, m in zip(gradient, kept, strict=True)]
    if rule.select == "norms":
        norms = _of_norms(network)
        gradient = [g * (n in norms) for (n, _), g in zip(named, gradient, strict=True)]
    eta = rule.eta if isinstance(rule, ASAM) else None
    stretch = [w.abs() + eta if eta is not None and "weight" in n else 1.0 for n, w in named]
    scaled = [t * g for t, g in zip(stretch, gradient, strict=True)]
    norm = dot(scaled, scaled) ** 0.5
    rho = min(rule.rho, _budget(rule) / norm) if isinstance(rule, LESAM) else rule.rho
    for (_, w), t, s in zip(named, stretch, scaled, strict=True):
        w.add_((rho / norm * (t * s)).to(w.dtype))


@torch.no_grad()
def perturb_from_memory(network: nn.Module, kept: Gradient, rule: Rule) -> None:
    """Move the weights by the e of a rule without an ascent pass, as far as it remembers."""
    sign = 1 if isinstance(rule, StaleSAM) else -1
    length = dot(kept, kept) ** 0.5
    weights = [w for w in network.parameters() if w.requires_grad]
    for w, v in zip(weights, kept, strict=False):  # in the first step there is nothing
        w.add_((sign * rule.rho / length * v).to(w.dtype))


def loss_at(rule: Rule, loss: Loss, seen: list[Tensor]) -> Loss:
    """Return the loss that is followed at w + e, summed over samples.

    Args:
        rule: The rule.
        loss: The objective, summed over samples.
        seen: The logits at w of each piece, in the order in which the loss is called.
    """
    if isinstance(rule, CSAM):
        return _csam(rule.gamma)
    if not isinstance(rule, FunctionalSAM):
        return loss
    clean = iter(seen)

    def slopes_times_logits(logits: Tensor, targets: Targets) -> Tensor:
        at_w = next(clean).float().requires_grad_()
        (slopes,) = torch.autograd.grad(loss(at_w, targets), at_w)
        return (slopes * logits).sum()

    return slopes_times_logits


def combined(
    rule: Rule | None, gradient: Gradient, ascent: Gradient, kept: Gradient
) -> tuple[Gradient, Gradient, Gradient]:
    """Return what the optimizer gets, what the rule remembers, and what moves weights beside it.

    Args:
        rule: The rule, or None.
        gradient: The descent gradient.
        ascent: The ascent gradient, or nothing in a step without one.
        kept: What the rule remembers, or nothing.
    """
    if isinstance(rule, MomentumSAM):
        old = kept or [torch.zeros_like(g) for g in gradient]
        kept = [rule.momentum * v + g for v, g in zip(old, gradient, strict=True)]
    elif isinstance(rule, StaleSAM):
        kept = gradient
    elif isinstance(rule, LookSAM) and not ascent:
        factor = rule.alpha * (dot(gradient, gradient) / dot(kept, kept)) ** 0.5
        gradient = [g + factor * v for g, v in zip(gradient, kept, strict=True)]
    elif ascent:
        return _compared(rule, gradient, ascent, kept)
    return gradient, kept, []


def _compared(
    rule: Rule | None, gradient: Gradient, ascent: Gradient, kept: Gradient
) -> tuple[Gradient, Gradient, Gradient]:
    """As `combined`, in a step with both gradients."""
    pairs = list(zip(gradient, ascent, strict=True))
    along = dot(gradient, ascent)
    if isinstance(rule, GSAM):
        factor = along / dot(gradient, gradient)
        gradient = [g - rule.alpha * (a - factor * g) for g, a in pairs]
    elif isinstance(rule, LookSAM):
        kept = [g - along / dot(ascent, ascent) * a for g, a in pairs]
    elif isinstance(rule, FriendlySAM):
        old = kept or ascent
        kept = [rule.decay * m + (1 - rule.decay) * a for m, a in zip(old, ascent, strict=True)]
    elif isinstance(rule, SSAM):
        factor = (dot(ascent, ascent) / dot(gradient, gradient)) ** 0.5
        gradient = [factor * g for g in gradient]
    elif isinstance(rule, WSAM):
        weight = rule.gamma / (1 - rule.gamma)
        sharpness = [weight * (g - a) for g, a in pairs]
        if rule.decouple:
            return ascent, kept, sharpness
        gradient = [a + s for a, s in zip(ascent, sharpness, strict=True)]
    return gradient, kept, []


def dot(a: Gradient, b: Gradient) -> float:
    """Return the sum of the products of all elements."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _budget(rule: LESAM) -> float:
    over = max(0.0, PROGRESS - rule.anneal_from) / max(1 - rule.anneal_from, 1e-12)
    return rule.budget * (1 + math.cos(math.pi * over)) / 2


def _of_norms(network: nn.Module) -> set[str]:
    """Return the names of the parameters of modules that have "norm" in the name of their class."""
    layers = {n for n, m in network.named_modules() if "norm" in type(m).__name__.lower()}
    return {n for n, _ in network.named_parameters() if n.rpartition(".")[0] in layers}


def _csam(gamma: float) -> Loss:
    def loss(logits: Tensor, targets: Targets) -> Tensor:
        p = logits.float().softmax(1).gather(1, targets.labels[:, None])[:, 0]
        return torch.where(p <= 0.5, -p.log(), -((1 + p) ** -gamma) * p.log()).sum()

    return loss
