"""The step as the papers have it, in one process and by a plain loop; and what it is compared on.

Nothing here calls the package but for the numbers in a rule. The network is sure of most samples
from the first step on, so that CSAM is not SAM; no sample may come near CSAM's jump at p = 1/2,
where rounding decides between two losses.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from flatcal_dist.sharpness import (
    ASAM,
    CSAM,
    GSAM,
    LESAM,
    SAM,
    SSAM,
    WSAM,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    Rule,
    StaleSAM,
)

SAMPLES, STEPS, CLASSES = 24, 5, 5
RULES = {
    "none": None,
    "sam": SAM(0.1),
    "csam": CSAM(0.1, gamma=1.0),
    "asam": ASAM(0.5),
    "looksam": LookSAM(0.1, every=2),
    "gsam": GSAM(0.1, alpha=0.4),
    "momentum_sam": MomentumSAM(0.3, momentum=0.8),
    "wsam": WSAM(0.1, gamma=0.8),
    "wsam_not_decoupled": WSAM(0.1, gamma=0.8, decouple=False),
    "friendly_sam": FriendlySAM(0.1, sigma=0.8, decay=0.6),
    "ssam": SSAM(0.1),
    "le_sam": LESAM(0.2, budget=0.2, anneal_from=0.2),
    "stale_sam": StaleSAM(0.1),
    "functional_sam": FunctionalSAM(0.1),
    "sam_norms": SAM(0.1, select="norms"),
    "sam_share": SAM(0.1, share=0.5),
}
NEW = tuple(RULES)[7:]

# Rounding of float32 sums in another order, relative to the largest weight: measured up to 3e-7
# over these steps; a wrong scope, scale, loss or restore is off by 1e-3 or more.
CLOSE = 1e-6
JUMP = 1e-4  # nearer to p = 1/2 than this, a comparison would be one of rounding

Pairs = Sequence[tuple[Tensor, Tensor]]


def make_network(noise: float = 0.0, norm: bool = False) -> nn.Sequential:
    """noise: the probability of dropout, and that of drop-path. norm: with batch norm."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.GELU()]
    network = nn.Sequential(*layers, nn.Dropout(noise), DropPath(noise), nn.Linear(16, CLASSES))
    with torch.no_grad():
        network[-1].weight.mul_(12)
    return network


def network_of(rule: Rule | None) -> nn.Sequential:
    """The network on which a rule is compared: with a layer norm if the rule asks for norm layers.

    Batch norm would make results depend on ranks and micro-batches.
    """
    network = make_network()
    if rule is not None and rule.select == "norms":
        network[1] = nn.LayerNorm(16)
    return network


def make_batch(number: int) -> tuple[Tensor, Tensor]:
    """Three of four labels are what the network says before training, the others by chance."""
    generator = torch.Generator().manual_seed(100 + number)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    target = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        own = make_network()(inputs).argmax(1)
    return inputs, torch.where(torch.arange(SAMPLES) % 4 > 0, own, target)


def make_optimizer(network: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    weights = [w for w in network.parameters() if w.requires_grad]
    return torch.optim.SGD(weights, lr=lr, momentum=0.9, weight_decay=1e-3)


def my_part(rank: int, world_size: int, number: int, micro_batches=1, batch=make_batch) -> Pairs:
    """A rank's micro-batches of a batch; 24 samples do not divide by 5."""
    inputs, target = (t.tensor_split(world_size)[rank] for t in batch(number))
    parts = inputs.tensor_split(micro_batches), target.tensor_split(micro_batches)
    return list(zip(*parts, strict=True))


def train(
    step, rank, world_size, micro_batches=1, numbers=range(STEPS), measure=False, batch=make_batch
) -> list:
    """Our step on this rank's parts; what it reports. Training has STEPS steps."""
    return [
        step(
            my_part(rank, world_size, number, micro_batches, batch),
            measure=measure,
            progress=min(number / STEPS, 1.0),
        )
        for number in numbers
    ]


def reference(
    rule: Rule | None,
    ranks: int = 1,
    scope: int | None = None,
    micro_batches: int = 1,
    *,
    network: Callable[[], nn.Module] = make_network,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = make_optimizer,
    batch: Callable[[int], tuple[Tensor, Tensor]] = make_batch,
    numbers: Iterable[int] = range(STEPS),
    per_micro_batch: bool = False,
    clip_norm: float | None = None,
    seen: list[Tensor] | None = None,
) -> list[dict[str, Tensor]]:
    """The state_dict of each rank after these steps.

    `scope` consecutive ranks perturb together, all when None. Each rank has batch statistics, and a
    random stream (seeded 1 + rank), of its own. seen: gets p of the true class at w + e, by step.
    """
    copies = [network() for _ in range(ranks)]
    optimizers = [optimizer(own) for own in copies]
    streams = [torch.Generator().manual_seed(1 + rank).get_state() for rank in range(ranks)]
    kept: list[Tensor] = []
    for step, number in enumerate(numbers):
        parts = [my_part(rank, ranks, number, micro_batches, batch) for rank in range(ranks)]
        samples = len(batch(number)[1])
        units = zip(*parts, strict=True) if per_micro_batch else [parts]
        total, g = None, []
        perturbs = rule is not None and step % rule.every == 0
        for unit in units:
            batches = [[pairs] if per_micro_batch else pairs for pairs in unit]
            if not perturbs:
                found, streams = _gradient(copies, batches, F.cross_entropy, streams, samples)
            else:
                found, g, streams = _sharp(
                    rule, copies, batches, streams, samples, scope or ranks, seen, kept, number
                )
            total = found if total is None else add(total, found)
        total, kept, beside = _combined(rule, perturbs, total, g, kept, trained(copies[0]))
        for own, optimizer in zip(copies, optimizers, strict=True):
            for w, x in zip(trained(own), total, strict=True):
                w.grad = None if x is None else x.clone()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(own.parameters(), clip_norm)
            optimizer.step()
            rates = {
                id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]
            }
            for w, x in zip(trained(own), beside or [None] * len(trained(own)), strict=True):
                if x is not None:
                    w.data -= rates[id(w)] * x
    return [own.state_dict() for own in copies]


def _sharp(rule, copies, batches, streams, samples, scope, seen, kept, number):
    """The gradient at w + e; that at w, of the last group; the streams after one pass."""
    if isinstance(rule, MomentumSAM | StaleSAM):
        moved = [duplicate(network) for network in copies]
        length = norm(kept) * (1 if isinstance(rule, StaleSAM) else -1)
        for other in moved:
            for w, v in zip(trained(other), kept or [None] * len(trained(other)), strict=True):
                if v is not None:
                    w.data += rule.rho * v / length
        g_s, streams = _gradient(moved, batches, F.cross_entropy, streams, samples)
        for network, other in zip(copies, moved, strict=True):
            count_on(other, network)
            for own, its in zip(network.buffers(), other.buffers(), strict=True):
                own.copy_(its)
        return g_s, [], streams
    moves, logits = [], []
    moved = [duplicate(network) for network in copies]  # with the buffers of before the pass
    for first in range(0, len(copies), scope):
        group = slice(first, first + scope)
        own = samples
        if isinstance(rule, LESAM):  # the length of g counts: of the mean over the group's samples
            own = sum(len(y) for pairs in batches[group] for _, y in pairs)
        g, _ = _gradient(
            copies[group], batches[group], F.cross_entropy, streams[group], own,
            getattr(rule, "share", 1), logits,
        )  # fmt: skip
        names = [n for n, w in copies[first].named_parameters() if w.requires_grad]
        along = g
        if isinstance(rule, FriendlySAM) and kept:
            along = add(g, [None if m is None else -rule.sigma * m for m in kept])
        if rule.select == "norms":
            norms = names_of_norms(copies[first])
            along = [x if n in norms else None for n, x in zip(names, along, strict=True)]
        e = perturbation(rule, names, trained(copies[first]), along, number / STEPS)
        moves += [e] * scope
    # Each rank's buffers are now those of one clean pass, and its stream is still that before it.
    for network, other, move in zip(copies, moved, moves, strict=True):
        count_on(network, other)
        with torch.no_grad():
            for w, e in zip(trained(other), move, strict=True):
                w += e
    confidences: list[Tensor] = []
    loss = F.cross_entropy
    if isinstance(rule, CSAM):

        def loss(logits, target, reduction):
            return literal_csam(logits, target, rule.gamma, confidences)

    if isinstance(rule, FunctionalSAM):
        clean = iter(logits)

        def loss(logits, target, reduction):
            slopes = F.softmax(next(clean), dim=1) - F.one_hot(target, logits.shape[1])
            return (slopes * logits).sum(1)

    g_s, streams = _gradient(moved, batches, loss, streams, samples)
    for network, other in zip(copies, moved, strict=True):
        count_on(other, network)
    if seen is not None:
        seen.append(torch.cat(confidences))
    return g_s, g, streams


def _combined(rule, perturbs, total, g, kept, weights):
    """What the optimizer gets, what the rule keeps, and what moves weights beside the optimizer."""
    zeros = [None] * len(total)
    beside: list[Tensor | None] = []
    if isinstance(rule, MomentumSAM):
        kept = add(total, [None if v is None else rule.momentum * v for v in kept or zeros])
    if isinstance(rule, StaleSAM):
        kept = total
    if isinstance(rule, LookSAM) and not perturbs:
        ratio = rule.alpha * norm(total) / norm(kept)
        total = [None if x is None else x + ratio * v for x, v in zip(total, kept, strict=True)]
    if not perturbs:
        return total, kept, beside
    if isinstance(rule, FriendlySAM):
        new = [None if x is None else (1 - rule.decay) * x for x in g]
        old = [None if m is None else rule.decay * m for m in kept]
        kept = add(new, old) if kept else g
    if isinstance(rule, SSAM):
        longer = norm(g) / norm(total)
        total = [None if x is None else longer * x for x in total]
    if isinstance(rule, WSAM):
        weight = rule.gamma / (1 - rule.gamma)
        sharpness = add(total, [None if x is None else -x for x in g])
        beside = [None if x is None else weight * x for x in sharpness]
        # A parameter with a gradient in the second pass alone has one, of zero, in the first.
        clean = [x if x is not None or b is None else 0 * b for x, b in zip(g, total, strict=True)]
        if rule.decouple:
            return clean, kept, beside
        return add(clean, beside), kept, []
    if isinstance(rule, GSAM):
        product = sum(
            float((a.double() * b).sum())
            for a, b in zip(total, g, strict=True)
            if a is not None and b is not None
        )
        factor = product / norm(total) ** 2
        total = [
            b if a is None else -rule.alpha * a if b is None else b - rule.alpha * (a - factor * b)
            for a, b in zip(g, total, strict=True)
        ]
    if isinstance(rule, LookSAM):
        g, full = (
            [torch.zeros_like(w) if x is None else x for w, x in zip(weights, some, strict=True)]
            for some in (g, total)
        )
        product = sum(float((a.double() * b).sum()) for a, b in zip(full, g, strict=True))
        kept = [a - product / norm(g) ** 2 * b for a, b in zip(full, g, strict=True)]
    return total, kept, beside


def _gradient(copies, batches, loss, streams, samples, share=1, logits=None):
    """Of the losses of these ranks, over so many samples; and each rank's stream after.

    share: of each micro-batch, whose first samples then stand for all. logits: gets those of each.
    """
    total, after = None, []
    for own, pairs, stream in zip(copies, batches, streams, strict=True):
        own.zero_grad(set_to_none=True)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(stream)
            for x, y in pairs:  # backward and not autograd.grad, which some checkpointing refuses
                n = math.ceil(len(y) * share)
                z, stand_for = own(x[:n]), len(y) / max(n, 1)
                (loss(z, y[:n], reduction="none").sum() * stand_for / samples).backward()
                if logits is not None:
                    logits.append(z.detach())
            after.append(torch.get_rng_state())
        g = [None if w.grad is None else w.grad.clone() for w in trained(own)]
        total = g if total is None else add(total, g)
    return total, after


def perturbation(rule: Rule, names, weights, gradient, progress=0.0) -> list[Tensor]:
    """e of one group of ranks: SAM's rho g / ||g||, ASAM's rho T^2 g / ||T g||."""
    g = [torch.zeros_like(w) if x is None else x for w, x in zip(weights, gradient, strict=True)]
    t = [
        w.detach().abs() + rule.eta
        if isinstance(rule, ASAM) and "weight" in name
        else torch.ones_like(w)
        for name, w in zip(names, weights, strict=True)
    ]
    length = norm([a * b for a, b in zip(t, g, strict=True)])
    rho = rule.rho
    if isinstance(rule, LESAM):
        over = max(0.0, (progress - rule.anneal_from) / (1 - rule.anneal_from))
        rho = min(rho, rule.budget * (1 + math.cos(math.pi * over)) / 2 / length)
    return [rho * a * a * b / length for a, b in zip(t, g, strict=True)]


def names_of_norms(network: nn.Module) -> set[str]:
    kinds = nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d
    layers = {name for name, module in network.named_modules() if isinstance(module, kinds)}
    return {n for n, _ in network.named_parameters() if n.rpartition(".")[0] in layers}


def literal_csam(logits, target, gamma, confidences=None) -> Tensor:
    """Losses by the formula; no sample near its jump."""
    p = F.softmax(logits, dim=1)[torch.arange(len(target)), target]
    assert (p - 0.5).abs().min() > JUMP, "choose other batches: rounding decides which loss it is"
    if confidences is not None:
        confidences.append(p.detach())
    return torch.where(p <= 0.5, -p.log(), -((1 + p) ** -gamma) * p.log())


def duplicate(network: nn.Module) -> nn.Module:
    """A deep copy, also where a forward pass left a weight that it computed as an attribute."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()
    return copy.deepcopy(network)


def count_on(seen: nn.Module, other: nn.Module) -> None:
    """Numbers that are plain attributes go on counting from pass to pass: nothing rewinds them."""
    for a, b in zip(seen.modules(), other.modules(), strict=True):
        vars(b).update({k: v for k, v in vars(a).items() if type(v) in (int, float)})


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [w for w in network.parameters() if w.requires_grad]


def add(a, b) -> list[Tensor | None]:
    """Gradients; None where neither has one."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def norm(tensors: Iterable[Tensor | None]) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors if t is not None))


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, over the largest weight; whole numbers must be equal."""
    assert a.keys() == b.keys()
    real = [n for n in b if b[n].is_floating_point()]
    assert all(torch.equal(a[n], b[n]) for n in b if n not in real)
    scale = max(float(b[n].abs().max()) for n in real)
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in real) / scale


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def bits(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(
        t.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
        for t in tensors.values()
    )
