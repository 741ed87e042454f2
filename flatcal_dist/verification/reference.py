"""The same step without the library: the papers' formulas in a plain loop.

The reference is one process. It takes every rank's images and random stream in turn, and uses no
engine, no rule and no loss of the library, but for objectives other than cross-entropy.
"""

import copy

import torch
from torch import Tensor, nn

from flatcal_dist.objectives import CrossEntropy, LabelSmoothing, Targets
from flatcal_dist.sharpness import CSAM, GSAM, LookSAM, MomentumSAM, Rule
from flatcal_dist.sharpness.rules import Loss
from flatcal_dist.verification.laboratory import (
    MOMENTUM,
    RATE,
    STREAM,
    Laboratory,
    Weights,
    precision_of,
)

Buffers = list[dict[str, Tensor | None]]  # for each module of a network


def reference_steps(lab: Laboratory, count: int) -> Weights:
    """Return the weights after one or two steps of SGD with the configured rule.

    With count 2 the second step does not perturb, as in periodic SAM and LookSAM, or it perturbs by
    the gradient of the first step, as in Momentum-SAM.
    """
    network = copy.deepcopy(lab.plain_network).to(lab.engine.device).train()
    weights = [w for w in network.parameters() if w.requires_grad]
    buffers = {rank: _buffers(network) for rank in range(lab.world_size)}  # each rank has its own
    gradient, ascent = _descent_gradient(lab, network, buffers)
    rule = lab.step.rule
    if isinstance(rule, GSAM):
        ascent = [a / lab.samples for a in ascent]
        along = _dot(gradient, ascent) / _dot(gradient, gradient)
        across = [a - along * g for g, a in zip(gradient, ascent, strict=True)]
        gradient = [g - rule.alpha * a for g, a in zip(gradient, across, strict=True)]
    momentum = _clipped(gradient, lab.step.clip_norm)
    _move(weights, momentum)
    if count == 2:
        everyone = range(lab.world_size)
        states = _random_states(lab, network, everyone, buffers)
        pieces = [(r, p) for r in everyone for p in range(len(lab.sizes))]
        at = _copied(network)
        if isinstance(rule, MomentumSAM):
            length = rule.rho / _dot(gradient, gradient) ** 0.5
            _move([w for w in at.parameters() if w.requires_grad], gradient, length)
        plain, _ = _gradient(lab, at, pieces, states, buffers, _objective(lab))
        plain = [g / lab.samples for g in plain]
        if isinstance(rule, LookSAM):
            along = _dot(gradient, ascent) / _dot(ascent, ascent)
            kept = [g - along * a for g, a in zip(gradient, ascent, strict=True)]
            factor = rule.alpha * (_dot(plain, plain) / _dot(kept, kept)) ** 0.5
            plain = [g + factor * v for g, v in zip(plain, kept, strict=True)]
        plain = _clipped(plain, lab.step.clip_norm)
        momentum = [MOMENTUM * m + g for m, g in zip(momentum, plain, strict=True)]
        _move(weights, momentum)
    return {name: w.detach().cpu() for name, w in network.named_parameters()}


def _descent_gradient(
    lab: Laboratory, network: nn.Module, buffers: dict[int, Buffers]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the mean gradient over all samples, and the ascent gradient of the last group.

    Each group of ranks takes its gradient at its own w + e. `buffers` holds the buffers of each
    rank, and becomes what one clean pass leaves.
    """
    step, rule = lab.step, lab.step.rule
    total = [torch.zeros_like(w) for w in network.parameters() if w.requires_grad]
    ascent: list[Tensor] = []
    for first in range(0, lab.world_size, step.scope.ranks):
        group = range(first, first + step.scope.ranks)
        states = _random_states(lab, network, group, buffers)
        parts = range(len(lab.sizes))
        units = [[p] for p in parts] if step.per_micro_batch else [list(parts)]
        for unit in units:
            pieces = [(r, p) for r in group for p in unit]
            moved = _copied(network)
            gradient, after = _gradient(lab, network, pieces, states, buffers, _objective(lab))
            if rule is not None and rule.ascent_share:  # else there is nothing to perturb by yet
                ascent = gradient
                _perturb(moved, ascent, rule)
                loss = _csam(rule.gamma) if isinstance(rule, CSAM) else _objective(lab)
                gradient, _ = _gradient(lab, moved, pieces, states, buffers, loss)
            buffers |= after
            for t, g in zip(total, gradient, strict=True):
                t += g / lab.samples
    return total, ascent


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _clipped(gradient: list[Tensor], clip_norm: float | None) -> list[Tensor]:
    norm = _dot(gradient, gradient) ** 0.5
    factor = min(1.0, (clip_norm or float("inf")) / (norm + 1e-6))
    return [g * factor for g in gradient]


@torch.no_grad()
def _move(weights: list[nn.Parameter], by: list[Tensor], rate: float = RATE) -> None:
    for w, b in zip(weights, by, strict=True):
        w.sub_(rate * b)


def _copied(network: nn.Module) -> nn.Module:
    """Return a deep copy, even if a forward pass left a weight that it computed as an attribute."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()
    return copy.deepcopy(network)


def _buffers(network: nn.Module) -> Buffers:
    return [copy.deepcopy(dict(module._buffers)) for module in network.modules()]


def _put(network: nn.Module, buffers: Buffers) -> None:
    for module, own in zip(network.modules(), buffers, strict=True):
        module._buffers.clear()
        module._buffers.update(copy.deepcopy(own))


def _random_states(
    lab: Laboratory, network: nn.Module, group: range, buffers: dict[int, Buffers]
) -> dict[tuple[int, int], list[Tensor]]:
    """Return the random state in which each rank meets each of its micro-batches."""
    states = {}
    scratch = _copied(network)
    for rank in group:
        _put(scratch, buffers[rank])
        torch.manual_seed(STREAM + rank)
        for part, (images, _) in enumerate(lab.batches[rank]):
            states[rank, part] = _state(lab)
            with torch.no_grad(), precision_of(lab):
                scratch(images)
    return states


def _gradient(
    lab: Laboratory,
    network: nn.Module,
    pieces: list[tuple[int, int]],
    states: dict[tuple[int, int], list[Tensor]],
    buffers: dict[int, Buffers],
    loss: Loss,
) -> tuple[list[Tensor], dict[int, Buffers]]:
    """Return the gradient of the summed losses of some pieces, and the buffers after them.

    Args:
        lab: The laboratory.
        network: The network, at w or at w + e.
        pieces: Pairs of a rank and the place of one of its micro-batches.
        states: The random state of each piece.
        buffers: The buffers that each rank starts from.
        loss: The loss, summed over samples.
    """
    weights = [w for w in network.parameters() if w.requires_grad]
    total = [torch.zeros_like(w) for w in weights]
    after: dict[int, Buffers] = {}
    for rank, part in pieces:
        _put(network, after.get(rank, buffers[rank]))
        images, targets = lab.batches[rank][part]
        _set_state(lab, states[rank, part])
        with precision_of(lab):
            logits = network(images)
        gradients = torch.autograd.grad(loss(logits, targets), weights, allow_unused=True)
        for t, g in zip(total, gradients, strict=True):
            if g is not None:
                t += g
        after[rank] = _buffers(network)
    return total, after


@torch.no_grad()
def _perturb(network: nn.Module, gradient: list[Tensor], rule: Rule) -> None:
    named = [(n, w) for n, w in network.named_parameters() if w.requires_grad]
    eta = getattr(rule, "eta", None)
    stretch = [w.abs() + eta if eta is not None and "weight" in n else 1.0 for n, w in named]
    scaled = [t * g for t, g in zip(stretch, gradient, strict=True)]
    norm = torch.stack([(s.double() ** 2).sum() for s in scaled]).sum().sqrt()
    for (_, w), t, s in zip(named, stretch, scaled, strict=True):
        w.add_((rule.rho / norm * (t * s)).to(w.dtype))


def _objective(lab: Laboratory) -> Loss:
    """Return the configured objective, summed over samples.

    Cross-entropy is written out here. Another objective is taken from the library.
    """
    objective = lab.config.objective.build()
    if not isinstance(objective, CrossEntropy | LabelSmoothing):
        objective.begin(lab.samples, lab.engine.device)
        return lambda logits, targets: objective(logits.float(), targets).sum()
    smoothing = getattr(objective, "smoothing", 0.0)
    over_others = getattr(objective, "spread", "all") == "others"

    def loss(logits: Tensor, targets: Targets) -> Tensor:
        log_p = logits.float().log_softmax(1)
        own = log_p.gather(1, targets.labels[:, None])[:, 0]
        spread = log_p.mean(1)
        if over_others:
            spread = (log_p.sum(1) - own) / (log_p.shape[1] - 1)
        return -((1 - smoothing) * own + smoothing * spread).sum()

    return loss


def _csam(gamma: float) -> Loss:
    def loss(logits: Tensor, targets: Targets) -> Tensor:
        p = logits.float().softmax(1).gather(1, targets.labels[:, None])[:, 0]
        return torch.where(p <= 0.5, -p.log(), -((1 + p) ** -gamma) * p.log()).sum()

    return loss


def _state(lab: Laboratory) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if lab.engine.device.type == "cuda":
        state.append(torch.cuda.get_rng_state(lab.engine.device))
    return state


def _set_state(lab: Laboratory, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], lab.engine.device)
