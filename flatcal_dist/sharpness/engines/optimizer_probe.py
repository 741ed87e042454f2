"""A trial that finds out whether an optimizer updates parts of tensors as it updates the whole.

ZeRO gives each rank's optimizer flat pieces of the weights, and FSDP2 gives it rows of them. An
optimizer that works element by element (SGD, Adam, Lion) computes the same. One that looks at whole
tensors (a norm of each: LARS, LAMB; rows and columns: Adafactor; the matrix: Muon, Shampoo) or at
all of them at once (a norm for clipping, Prodigy's step size) silently becomes another algorithm.
So one copy of the optimizer, with its options, takes a few steps on small tensors, another copy
takes them on parts of the tensors, and the results are compared.
"""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from flatcal_dist.sharpness.errors import StepError

Shape = tuple[int, ...]
Shapes = Sequence[Sequence[Shape]]  # by parameter group
Whole = list[list[Tensor]]  # by parameter group

SCALES = (1.0, 0.01, 1.0, 0.1)  # of the gradients, step by step: clipping acts on some
# Of a side. Some optimizers treat small tensors as others do (Adafactor up to 128), and some are
# slow on large ones, so those come last, and only where the small ones showed nothing.
SIDES = (10, 136)
RATE = 0.01  # whatever the schedule says now: at a rate of 0 nothing would be seen
SAME = 1e-4  # relative to an update: rounding gives 1e-6, another algorithm 1e-2 and more
ROUNDED_IN_BF16 = 0.05


def refuse_flat_parts(optimizer: Optimizer, shapes: Shapes, stage: int) -> None:
    """Raise StepError for an optimizer that is another algorithm under ZeRO of this stage.

    The function warns where the optimizer cannot be tried.

    Args:
        optimizer: The optimizer, over whole weights.
        shapes: The shapes of the whole weights, by parameter group.
        stage: The stage of ZeRO.
    """
    name, device = type(optimizer).__name__, _device_of(optimizer)
    off = flat_difference(optimizer, shapes, device)
    if off > SAME:
        raise StepError(
            f"{name} looks at whole tensors, or at all of them together, and ZeRO-{stage} gives "
            f"each rank's optimizer flat pieces of them: it would be another algorithm "
            f"({_in_words(off)}). Use it with DDP, or with FSDP2, which computes over the whole; "
            "or choose an optimizer that works element by element, such as sgd, adamw or lion"
        )
    if stage < 3:
        return
    off = flat_difference(optimizer, shapes, device, one_at_a_time=True)
    if off > SAME:
        raise StepError(
            f"{name} counts its steps, or the like, once for a group of weights, and ZeRO-3 calls "
            "it once for each piece of the group: it would count too many steps "
            f"({_in_words(off)}). Use it with ZeRO-1 or 2, FSDP2 or DDP; or choose an optimizer "
            "that counts for each weight, such as sgd, adamw or lion"
        )


def refuse_rows(optimizer: Optimizer, shapes: Shapes, mesh: DeviceMesh) -> None:
    """Raise StepError for an optimizer that cannot work on rows of weights, as FSDP2 holds them.

    Called by all ranks of the mesh. The rows are DTensors, on which torch computes over the whole
    of a tensor. So Muon is right, to the rounding of its iteration in bf16 (0.9 % of an update; in
    fp32 less than 1e-5). Some optimizers use functions that DTensors do not have. An optimizer that
    works element by element need not be tried.

    Args:
        optimizer: The optimizer.
        shapes: The shapes of the whole weights, by parameter group.
        mesh: The ranks that share the weights.
    """
    device = torch.device(mesh.device_type)
    if not flat_difference(optimizer, shapes, device) > SAME:
        return

    def whole_of(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def sharded(tensors: Whole) -> Whole:
        return [[distribute_tensor(t, mesh, [Shard(0)]) for t in group] for group in tensors]

    def on_rows(whole: Whole, gradients: list[Whole]) -> Whole:
        found = _steps(optimizer, sharded(whole), [sharded(step) for step in gradients])
        return [[whole_of(w) for w in group] for group in found]

    off = largest_difference(optimizer, shapes, on_rows, device)
    if off > ROUNDED_IN_BF16:
        raise StepError(
            f"{type(optimizer).__name__} cannot be used with FSDP2, whose weights are rows on each "
            f"rank ({_in_words(off)}): use it with DDP, or choose an optimizer that works element "
            "by element, such as sgd, adamw or lion"
        )


def flat_difference(
    optimizer: Optimizer, shapes: Shapes, device: torch.device, one_at_a_time: bool = False
) -> float:
    """Return `largest_difference` for two optimizers, each with one flat half of every group.

    Args:
        optimizer: The optimizer.
        shapes: The shapes of the whole weights, by parameter group.
        device: Where to try it.
        one_at_a_time: Whether the halves are in two pieces, and each piece is stepped alone.
    """
    pieces = 2 if one_at_a_time else 1

    def cut(groups: Whole, half: int) -> Whole:
        # A half of a single number is empty, as a rank's part of it may be.
        halves = [_flat(group).tensor_split(2)[half] for group in groups]
        return [[p for p in flat.tensor_split(pieces) if p.numel()] for flat in halves]

    def on_two_ranks(whole: Whole, gradients: list[Whole]) -> Whole:
        halves = [
            _steps(optimizer, cut(whole, half), [cut(g, half) for g in gradients], one_at_a_time)
            for half in range(2)
        ]
        flats = [torch.cat([*a, *b]) for a, b in zip(*halves, strict=True)]
        return [
            [
                part.view_as(w)
                for part, w in zip(flat.split([w.numel() for w in group]), group, strict=True)
            ]
            for flat, group in zip(flats, whole, strict=True)
        ]

    return largest_difference(optimizer, shapes, on_two_ranks, device)


class Failed(float):
    """An infinite difference: the optimizer raised `error` on parts of tensors."""

    error: Exception

    def __new__(cls, error: Exception) -> "Failed":
        self = super().__new__(cls, math.inf)
        self.error = error
        return self


def largest_difference(
    optimizer: Optimizer,
    shapes: Shapes,
    otherwise: Callable[[Whole, list[Whole]], Whole],
    device: torch.device,
) -> float:
    """Return by how much the updates of a few steps differ, relative to the update of each tensor.

    Args:
        optimizer: The optimizer.
        shapes: The shapes of the whole weights, by parameter group.
        otherwise: Gives the weights after the steps, from those before and all gradients.
        device: Where to try it.

    Returns:
        The difference. It is infinite where `otherwise` fails, and NaN, with a warning, where even
        the optimizer alone cannot be tried.
    """
    off = 0.0
    for side in SIDES:
        small = [sorted({_small(shape, side) for shape in group}) for group in shapes]
        off = max(_difference(optimizer, small, otherwise, device), off)
        if not off <= SAME:
            break
    return off


def _difference(
    optimizer: Optimizer,
    shapes: list[list[Shape]],
    otherwise: Callable[[Whole, list[Whole]], Whole],
    device: torch.device,
) -> float:
    generator = torch.Generator().manual_seed(0)

    def drawn(scale: float) -> Whole:
        return [
            [(scale * torch.randn(s, generator=generator)).to(device) for s in group]
            for group in shapes
        ]

    start = drawn(0.5)
    gradients = [drawn(scale) for scale in SCALES]
    try:
        right = _steps(optimizer, start, gradients)
    except Exception as error:
        warnings.warn(
            f"whether {type(optimizer).__name__} may be given parts of tensors could not be tried "
            f"({type(error).__name__}: {error}); compare a few steps with those of DDP",
            stacklevel=5,
        )
        return math.nan
    try:
        found = otherwise(start, gradients)
    except Exception as error:
        return Failed(error)
    off = 0.0
    for groups in zip(start, right, found, strict=True):
        for before, whole, parts in zip(*groups, strict=True):
            length = float((whole - before).norm())
            if difference := float((whole - parts).norm()):
                off = max(off, difference / max(length, 1e-12))
    return off


def _steps(
    optimizer: Optimizer, start: Whole, gradients: list[Whole], one_at_a_time: bool = False
) -> Whole:
    """Return the weights after the optimizer's steps from `start`, without touching the optimizer.

    With one_at_a_time each weight is stepped in a separate call, as if there were no others.
    """
    probe = _copied(optimizer, {})
    held = [[nn.Parameter(w.clone()) for w in group] for group in start]
    calls = [held]
    if one_at_a_time:
        places = [(i, w) for i, weights in enumerate(held) for w in weights]
        calls = [[[w] if i == place else [] for i in range(len(held))] for place, w in places]
    for group in probe.param_groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"].fill_(RATE)
        else:
            group["lr"] = RATE
    # Some are compiled, which takes minutes and would be for these shapes alone.
    with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
        for step in gradients:
            for weights, parts in zip(held, step, strict=True):
                for weight, part in zip(weights, parts, strict=True):
                    weight.grad = part.clone()
            for call in calls:
                for group, weights in zip(probe.param_groups, call, strict=True):
                    group["params"][:] = weights
                type(probe).step(probe)  # not what a scheduler has put around the optimizer's own
    return [[w.detach() for w in group] for group in held]


def _copied(optimizer: Optimizer, memo: dict) -> Optimizer:
    """Return another optimizer of the same options, without weights, state and hooks.

    copy.deepcopy alone would forget attributes of an optimizer, and copy all weights.
    """
    memo[id(optimizer.state)] = defaultdict(dict)
    for group in optimizer.param_groups:
        memo |= {id(w): nn.Parameter(torch.zeros(1)) for w in group["params"] if id(w) not in memo}
    attributes = {n: v for n, v in vars(optimizer).items() if n != "step" and "hooks" not in n}
    for value in attributes.values():
        if isinstance(value, Optimizer):  # Lookahead's
            memo[id(value)] = _copied(value, memo)
    other = object.__new__(type(optimizer))
    vars(other).update({n: copy.deepcopy(v, memo) for n, v in attributes.items()})
    other.__setstate__({})  # hooks, none
    return other


def _small(shape: Shape, side: int) -> Shape:
    """Return a shape like this one, in which no side is longer than `side`.

    It has no more values than a square of this side.
    """
    sides = [min(length, side) for length in shape]
    while math.prod(sides) > side**2:
        longest = max(range(len(sides)), key=lambda i: sides[i])
        sides[longest] = -(-sides[longest] // 2)
    return tuple(sides)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _device_of(optimizer: Optimizer) -> torch.device:
    return next(w.device for group in optimizer.param_groups for w in group["params"])


def _in_words(off: float) -> str:
    if isinstance(off, Failed):
        reason = str(off.error).strip().splitlines() or [""]
        return f"on these it raised {type(off.error).__name__}: {reason[0]}"
    return f"updates differ by {off:.1%}"
