"""The same step without the library: the papers' formulas in a plain loop.

The reference is one process. It takes every rank's images and random stream in turn, and uses no
engine, no rule and no loss of the library, but for objectives other than cross-entropy.
"""

import copy
import math

import torch
from torch import Tensor, nn

from flatcal_dist.objectives import CrossEntropy, LabelSmoothing, Targets
from flatcal_dist.sharpness import Rule
from flatcal_dist.sharpness.rules import Loss
from flatcal_dist.verification.formulas import combined, dot, loss_at, perturb, perturb_from_memory
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
    """Return the weights after so many steps of SGD with the configured rule."""
    network = copy.deepcopy(lab.plain_network).to(lab.engine.device).train()
    weights = [w for w in network.parameters() if w.requires_grad]
    buffers = {rank: _buffers(network) for rank in range(lab.world_size)}  # each rank has its own
    momentum = [torch.zeros_like(w) for w in weights]
    kept: list[Tensor] = []
    rule = lab.step.rule
    for number in range(count):
        perturbs = rule is not None and number % rule.every == 0
        gradient, ascent = _descent_gradient(
            lab, network, buffers, rule if perturbs else None, kept
        )
        gradient, kept, beside = combined(rule, gradient, ascent, kept)
        gradient = _clipped(gradient, lab.step.clip_norm)
        momentum = [MOMENTUM * m + g for m, g in zip(momentum, gradient, strict=True)]
        _move(weights, momentum)
        if beside:
            _move(weights, beside)
    return {name: w.detach().cpu() for name, w in network.named_parameters()}


def _descent_gradient(
    lab: Laboratory,
    network: nn.Module,
    buffers: dict[int, Buffers],
    rule: Rule | None,
    kept: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the mean gradient over all samples, and the ascent gradient of the last group.

    Each group of ranks takes its gradient at its own w + e.

    Args:
        lab: The laboratory.
        network: The network at w.
        buffers: The buffers of each rank. They become what one clean pass leaves.
        rule: The rule, or None in a step that does not perturb.
        kept: What the rule remembers, or nothing.
    """
    step, loss = lab.step, _objective(lab)
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
            if rule is None or not rule.ascent_share:
                if rule is not None:
                    perturb_from_memory(moved, kept, rule)
                gradient, after = _gradient(lab, moved, pieces, states, buffers, loss)
            else:
                share = rule.ascent_share
                heads = (
                    states if share == 1 else _random_states(lab, network, group, buffers, share)
                )
                seen: list[Tensor] = []
                own, after = _gradient(lab, network, pieces, heads, buffers, loss, share, seen)
                samples = sum(lab.sizes[p] for _, p in pieces)
                ascent = [a / samples for a in own]
                perturb(moved, ascent, rule, kept)
                followed = loss_at(rule, loss, seen)
                gradient, _ = _gradient(lab, moved, pieces, states, buffers, followed)
            buffers |= after
            for t, g in zip(total, gradient, strict=True):
                t += g / lab.samples
    return total, ascent


def _clipped(gradient: list[Tensor], clip_norm: float | None) -> list[Tensor]:
    norm = dot(gradient, gradient) ** 0.5
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
    lab: Laboratory,
    network: nn.Module,
    group: range,
    buffers: dict[int, Buffers],
    share: float = 1.0,
) -> dict[tuple[int, int], list[Tensor]]:
    """Return the random state in which each rank meets this share of each of its micro-batches."""
    states = {}
    scratch = _copied(network)
    for rank in group:
        _put(scratch, buffers[rank])
        torch.manual_seed(STREAM + rank)
        for part, (images, _) in enumerate(lab.batches[rank]):
            states[rank, part] = _state(lab)
            with torch.no_grad(), precision_of(lab):
                scratch(images[: _head(lab, len(images), share)])
    return states


def _gradient(
    lab: Laboratory,
    network: nn.Module,
    pieces: list[tuple[int, int]],
    states: dict[tuple[int, int], list[Tensor]],
    buffers: dict[int, Buffers],
    loss: Loss,
    share: float = 1.0,
    seen: list[Tensor] | None = None,
) -> tuple[list[Tensor], dict[int, Buffers]]:
    """Return the gradient of the summed losses of some pieces, and the buffers after them.

    Args:
        lab: The laboratory.
        network: The network, at w or at w + e.
        pieces: Pairs of a rank and the place of one of its micro-batches.
        states: The random state of each piece.
        buffers: The buffers that each rank starts from.
        loss: The loss, summed over samples.
        share: The share of each piece whose samples stand for all of it.
        seen: Gets the logits of each piece, in order.
    """
    weights = [w for w in network.parameters() if w.requires_grad]
    total = [torch.zeros_like(w) for w in weights]
    after: dict[int, Buffers] = {}
    for rank, part in pieces:
        _put(network, after.get(rank, buffers[rank]))
        images, targets = lab.batches[rank][part]
        head = _head(lab, len(images), share)
        _set_state(lab, states[rank, part])
        with precision_of(lab):
            logits = network(images[:head])
        if seen is not None:
            seen.append(logits.detach())
        summed = loss(logits, targets[:head]) * (len(images) / head)
        gradients = torch.autograd.grad(summed, weights, allow_unused=True)
        for t, g in zip(total, gradients, strict=True):
            if g is not None:
                t += g
        after[rank] = _buffers(network)
    return total, after


def _head(lab: Laboratory, samples: int, share: float) -> int:
    """Return how many samples of a micro-batch are a share of it: even where they are pairs."""
    head = math.ceil(samples * share)
    return head + head % 2 if lab.step.loss.pairs != "none" else head


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


def _state(lab: Laboratory) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if lab.engine.device.type == "cuda":
        state.append(torch.cuda.get_rng_state(lab.engine.device))
    return state


def _set_state(lab: Laboratory, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], lab.engine.device)
