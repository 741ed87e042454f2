"""The sharpness-aware step: the choreography of one optimizer step, the same on every engine.

    gradient at w  ->  w + e  ->  gradient at w + e  ->  back to w, bit for bit  ->  optimizer

It is a controller and not an optimizer: it owns the whole step, so that it decides when gradients
are reduced, what a non-finite value means for all ranks, and that nothing outlives a perturbation.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatcal_dist.losses import cross_entropy
from flatcal_dist.sharpness.engines import Engine
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.move import Measured
from flatcal_dist.sharpness.networks import FrozenWeights
from flatcal_dist.sharpness.outputs import logits_of
from flatcal_dist.sharpness.replay import SameFunctionTwice
from flatcal_dist.sharpness.rules import SAM, Loss, Shards
from flatcal_dist.sharpness.scope import Scope

MicroBatches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What happened in one step. Losses are means over the global batch, norms of its gradients.

    loss and perturbed_loss are of the same objective, that of the ascent, at w and at w + e: their
    difference is the sharpness. skipped: a value was not finite on some rank in either pass, so no
    rank moved. stop: some rank passed stop=True. votes: sums of the ranks' own. None in a step
    without a perturbation: perturbed_loss and ascent_gradient_norm (of a scope smaller than all
    ranks, the mean of the ranks' own norms). Only with measure=True, means over the ranks: cosine,
    between the perturbation e (SAM's: the ascent gradient) and the descent gradient;
    perturbation_norm, the length of e; and of what the forward pass saw of e, after rounding to
    its precision: effective_rho, its length, to which the noise of rounding adds; seen_along, its
    component along e; seen_cosine, between it and e, which tells whether the direction survived.
    """

    loss: float
    perturbed_loss: float | None
    ascent_gradient_norm: float | None
    gradient_norm: float
    skipped: bool
    stop: bool
    loss_scale: float
    cosine: float | None = None
    perturbation_norm: float | None = None
    effective_rho: float | None = None
    seen_along: float | None = None
    seen_cosine: float | None = None
    votes: tuple[float, ...] = ()


class SharpnessAwareStep:
    """One optimizer step on the micro-batches of one rank.

    rule: one of rules.py, or None for plain training. loss: per-sample objective (logits [N, K],
    target [N]) -> [N] of the ascent gradient, by default cross-entropy; the rule derives that of
    the descent from it. CSAM has its own and takes none.
    scope: whose gradient perturbs. "global": that of all ranks, so that N ranks with batch B are
    one rank with batch N * B; "rank": each rank's own (m-sharpness, Foret et al. 2021, section
    4.1); "node"; or a number of ranks. per_micro_batch: perturb for each micro-batch by itself, a
    smaller m again. clip_norm: of the descent gradient. `rho` and `taken` (steps so far) may be
    set between steps; `memory` is what the rule keeps, or None. To go on after a restart, save
    `engine.local_state()` and `state_dict()` of every rank.

    Raises StepError, with the alternatives, for what rule, scope and engine cannot do together.
    """

    def __init__(
        self,
        engine: Engine,
        rule: SAM | None,
        *,
        loss: Loss | None = None,
        scope: str | int = "global",
        per_micro_batch: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise StepError(f"clip_norm must be positive, or None for no clipping; got {clip_norm}")
        if rule and rule.own_loss and loss is not None:
            raise StepError(
                f"{type(rule).__name__} defines the losses of both passes: leave `loss` out"
            )
        self.engine = engine
        self.rule = rule
        self.rho = rule.rho if rule else 0.0
        self.scope = Scope.of(scope, engine.world_size)
        self.per_micro_batch = per_micro_batch
        self.clip_norm = clip_norm
        self.loss: Loss = loss or _plain_cross_entropy
        self.taken = 0
        self.memory: dict[str, Tensor] | None = None
        self.built_with = self._parts()
        self.frozen = FrozenWeights(engine.module)
        self.descent_loss = self.loss
        if rule:
            if rule.remembers and (per_micro_batch or not self.scope.everyone):
                raise StepError(
                    f"{type(rule).__name__} compares the two gradients of a step, so both must be "
                    "of all ranks: use scope 'global' without per_micro_batch, or SAM"
                )
            engine.check(rule, self.scope, per_micro_batch)
            self.descent_loss = rule.descent_loss(self.loss)

    def __call__(
        self,
        micro_batches: MicroBatches,
        *,
        samples: int | None = None,
        stop: bool = False,
        measure: bool = False,
        votes: Sequence[float] = (),
    ) -> StepResult:
        """Take the step on this rank's (inputs, target) pairs, as many on every rank.

        samples: size of the global batch over all ranks and micro-batches, as many as the losses
        of a pass. One more small reduction finds it when it is not given, from targets or inputs
        that are tensors, and checks that ranks have as many pairs. stop: this rank wishes to end;
        the result tells all ranks. measure: also what StepResult has only then. votes: numbers of
        this rank, as many on each, of which all learn the sums.

        Raises StepError for a batch that cannot be taken; nothing has changed then.
        """
        engine = self.engine
        samples = self._checked(micro_batches, samples)
        share = engine.world_size / samples  # engines average over ranks: summed losses times this
        perturbs = self.rule is not None and self.rule.perturbs_at(self.taken)
        seen = Seen(engine.device)

        with (
            _no_weights_in_autocast(),
            SameFunctionTwice(engine.module, engine.device) as replay,
            engine.broadcasting() as changed,
        ):
            if changed:
                replay.start_from_here()
            engine.zero_gradients()
            if perturbs:
                units = [[m] for m in micro_batches] if self.per_micro_batch else [micro_batches]
                for number, unit in enumerate(units, start=1):
                    last = number == len(units)
                    self._perturbed_gradient(unit, share, replay, seen, measure, last)
            else:
                self._plain_gradient(micro_batches, share, seen)
            norm = engine.gradient_norm()
            total = self._agree(seen, norm, stop, votes)
            if total.losses != samples:
                engine.zero_gradients()
                raise StepError(
                    f"the passes gave {total.losses:.0f} losses for {samples} samples: give the "
                    "step samples=, the number of losses over all ranks and micro-batches"
                )
            skipped = total.skip > 0
            if skipped:
                replay.undo()
                engine.skip()
            else:
                self.memory = seen.memory or self.memory
                engine.update(norm, self.clip_norm)
            self.taken += 1
        over = engine.world_size * (len(units) if perturbs else 1)
        measured = Measured(*(value / over for value in total.measured)) if measure else None
        return StepResult(
            loss=total.loss / samples,
            perturbed_loss=total.perturbed_loss / samples if perturbs else None,
            ascent_gradient_norm=total.ascent_norm / over if perturbs else None,
            gradient_norm=total.norm / engine.world_size,
            skipped=skipped,
            stop=total.stop > 0,
            loss_scale=engine.loss_scale,
            votes=tuple(total.votes),
            **(measured._asdict() if perturbs and measured else {}),
        )

    def state_dict(self) -> dict[str, Any]:
        """What the step itself keeps; tensors and plain containers."""
        return {"taken": self.taken, "memory": self.memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, memory = state["taken"], state["memory"]
        self.memory = memory and {n: t.to(self.engine.device) for n, t in memory.items()}

    def _checked(self, micro_batches: MicroBatches, samples: int | None) -> int:
        """The size of the global batch. Raises StepError, where ranks differ on all of them."""
        pairs = all(isinstance(m, tuple | list) and len(m) == 2 for m in micro_batches)
        count = len(micro_batches)
        sizes = [_size(*m) for m in micro_batches] if pairs and samples is None else []
        counted, even = None not in sizes, True
        if samples is None:
            mine = sum(size or 0 for size in sizes)
            found = [mine, count, count**2, not pairs, not counted]
            total = self.engine.sum([float(number) for number in found])
            samples, even = round(total[0]), self.engine.world_size * total[2] == total[1] ** 2
            pairs, counted = not total[3], not total[4]
        if not pairs:
            raise StepError("a step takes a list of (inputs, target) pairs, one per micro-batch")
        if not counted:
            raise StepError(
                "neither target nor inputs are a tensor with one row a sample: give the step "
                "samples=, the number of samples over all ranks and micro-batches"
            )
        if not even:
            raise StepError(
                "ranks have different numbers of micro-batches, here "
                f"{count}: their collectives would wait for one another. Give each as many; their "
                "sizes may differ, down to none"
            )
        if samples < 1 or not micro_batches:
            raise StepError(f"nothing to learn from: {count} micro-batches, {samples} samples")
        if not 0 <= self.rho < math.inf:
            raise StepError(f"rho must be finite and not negative, and was set to {self.rho}")
        self._refuse_changed()
        return samples

    def _parts(self) -> tuple[list[nn.Parameter], list[bool], list[Tensor]]:
        """The network's parameters, whether each is trained, and what the optimizer holds."""
        parameters = self.engine.all_parameters()
        groups = self.engine.optimizer.param_groups
        held = [weight for group in groups for weight in group["params"]]
        return parameters, [w.requires_grad for w in parameters], held

    def _refuse_changed(self) -> None:
        """Raises StepError if network or optimizer have other parameters than when it was built."""
        (parameters, trained, held), now = self.built_with, self._parts()
        what = None
        if not _same(parameters, now[0]):
            what = "parameters of the network were added, removed or replaced"
        elif trained != now[1]:
            what = "parameters were frozen or thawed"
        elif not _same(held, now[2]):
            what = "parameters of the optimizer were added, removed or replaced"
        if what:
            raise StepError(
                f"{what} after the step was built: build engine, optimizer and step again"
            )

    def _plain_gradient(self, micro_batches: MicroBatches, share: float, seen: "Seen") -> None:
        seen.add_losses(*self._pass(micro_batches, self.loss, share))
        if self.rule and self.rule.remembers and self.memory:
            with torch.no_grad():
                self.rule.correct_(self.memory, self.engine.shards(), self.engine.total)

    def _perturbed_gradient(
        self,
        micro_batches: MicroBatches,
        share: float,
        replay: SameFunctionTwice,
        seen: "Seen",
        measure: bool,
        last: bool,
    ) -> None:
        """The gradient at w + e, added to those of earlier units of this step."""
        engine, rule = self.engine, self.rule
        replay.begin()
        # The engine's own reduction overlaps with the backward pass; it can do it for some scopes
        # only, and only while no descent gradient is being accumulated.
        overlapped = engine.reduces(self.scope) and not self.per_micro_batch
        alone = self.scope.ranks == 1 and not self.per_micro_batch and engine.leaves_own()
        in_place = overlapped or alone
        with self.frozen.watched():
            if in_place:
                seen.add_losses(*self._pass(micro_batches, self.loss, share, overlapped))
                shards = engine.shards()
                shards.own = not overlapped  # nothing was reduced: no engine counts on this memory
            else:
                shards, *losses = self._own_gradient(micro_batches, share / self.scope.ranks)
                seen.add_losses(*losses)
        norm, kept = self._gradient_to_perturbation_(shards)
        replay.rewind()
        with engine.moved(shards) as displacement:
            if in_place:
                engine.zero_gradients()
            perturbed_loss, _ = self._pass(micro_batches, self.descent_loss, share, last)
            seen.perturbed_loss = seen.perturbed_loss + perturbed_loss
            if measure:
                new = displacement()
                seen.measured = [old + value for old, value in zip(seen.measured, new, strict=True)]
        replay.forward()
        seen.ascent_norm = seen.ascent_norm + norm / engine.loss_scale
        if rule.remembers:
            with torch.no_grad():
                seen.memory = rule.remember(kept, engine.shards(), engine.total)

    @torch.no_grad()
    def _gradient_to_perturbation_(self, shards: Shards) -> tuple[Tensor, dict[str, Tensor] | None]:
        """e in place of the gradients; the norm that they had; e again, if the rule keeps it."""
        norm = self.engine.total(self.rule.squared_norm(shards)).sqrt()
        self.rule.perturbation_(shards, torch.where(norm > 0, self.rho / norm, 0.0))
        # After an overflow the step will be skipped. Until all ranks agree on that no network is to
        # run on weights of NaN: it may check its values, or use them as indices.
        overflow = ~norm.isfinite()
        for gradient in shards.gradients:
            gradient.masked_fill_(overflow, 0.0)
        if not self.rule.remembers:
            return norm, None
        return norm, {n: e.clone() for n, e in zip(shards.names, shards.gradients, strict=True)}

    def _pass(
        self, micro_batches: MicroBatches, loss: Loss, share: float, reduce: bool = True
    ) -> tuple[Tensor, int]:
        """Accumulate the gradient of share * (sum of losses); reduce it with the last micro-batch.

        Returns the sum of this rank's losses, those of the ascent, a float64 scalar; their number.
        """
        # Inside somebody's outer autocast block the low-precision copies of the weights would
        # outlive the perturbation: pass two would silently see the weights of pass one.
        torch.clear_autocast_cache()
        total, count = torch.zeros((), dtype=torch.float64, device=self.engine.device), 0
        for number, (inputs, target) in enumerate(micro_batches, start=1):
            with self.engine.accumulation(reduce and number == len(micro_batches)):
                logits = logits_of(self.engine.model(inputs))
                losses = _per_sample(loss(logits, target), logits, self.engine)
                self.engine.backward(losses.sum() * share)
            seen = losses if loss is self.loss else self.loss(logits.detach(), target)
            total += seen.detach().sum()
            count += len(losses)
        return total, count

    def _own_gradient(
        self, micro_batches: MicroBatches, share: float
    ) -> tuple[Shards, Tensor, int]:
        """As `_pass`, with the gradient left on this rank, then summed over the ranks in scope.

        It comes from autograd itself: no engine sees it, and what an engine accumulates stays.
        """
        torch.clear_autocast_cache()
        engine = self.engine
        total, count = torch.zeros((), dtype=torch.float64, device=engine.device), 0
        shards = engine.whole_weights()
        gradients: list[Tensor | None] = [None] * len(shards.weights)
        for inputs, target in micro_batches:
            with engine.accumulation(reduce=False):  # DDP may be within
                logits = logits_of(engine.module(inputs))
            losses = _per_sample(self.loss(logits, target), logits, engine)
            count += len(losses)
            scaled = losses.sum() * share * engine.loss_scale
            new = list(torch.autograd.grad(scaled, shards.weights, allow_unused=True))
            for i in reversed(range(len(new))):
                gradient = new.pop()  # autograd may give one tensor for several parameters: copy
                if gradient is not None and gradients[i] is None:
                    gradients[i] = torch.empty_like(shards.weights[i]).copy_(gradient)
                elif gradient is not None:
                    gradients[i].add_(gradient)
            total += losses.detach().sum()
        shards.gradients = [
            torch.zeros_like(w) if g is None else g
            for w, g in zip(shards.weights, gradients, strict=True)
        ]
        self.scope.sum_(shards.gradients)
        return shards, total, count

    def _agree(self, seen: "Seen", norm: Tensor, stop: bool, votes: Sequence[float]) -> "Totals":
        """Sums over ranks, by one reduction."""
        mine = torch.stack([*seen.numbers(), norm.double()])
        skip = 1 - mine.isfinite().all().double()
        mine = [*mine, skip, float(stop), float(seen.losses), *votes]
        return Totals.of(self.engine.sum(mine))


class Seen:
    """What this rank saw in a step, summed over its units; float64 scalars on the device."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.loss = self.perturbed_loss = self.ascent_norm = zero
        self.measured = [zero] * len(Measured._fields)
        self.losses = 0  # their number, in one pass
        self.memory: dict[str, Tensor] | None = None

    def add_losses(self, loss: Tensor, count: int) -> None:
        """Of one unit's first pass."""
        self.loss = self.loss + loss
        self.losses += count

    def numbers(self) -> list[Tensor]:
        return [self.loss, self.perturbed_loss, self.ascent_norm, *self.measured]


class Totals(NamedTuple):
    """Sums over the ranks: of what they saw, of those that must skip or wish to stop, of votes."""

    loss: float
    perturbed_loss: float
    ascent_norm: float
    measured: list[float]
    norm: float
    skip: float
    stop: float
    losses: float
    votes: list[float]

    @classmethod
    def of(cls, sums: list[float]) -> "Totals":
        """In the order in which `_agree` gives them."""
        count = len(Measured._fields)
        first, measured, rest = sums[:3], sums[3 : 3 + count], sums[3 + count :]
        return cls(*first, measured, *rest[:4], rest[4:])


@contextmanager
def _no_weights_in_autocast() -> Iterator[None]:
    """Inside somebody's outer autocast block the low-precision copies of weights are kept.

    Whatever comes after the step would see those of w + e, or of w before the optimizer's step.
    """
    try:
        yield
    finally:
        torch.clear_autocast_cache()


def _size(inputs: Any, target: Any) -> int | None:
    """How many samples a micro-batch has; None where neither is a tensor that tells."""
    for tensor in (target, inputs):
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            return len(tensor)
    return None


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _per_sample(losses: Tensor, logits: Tensor, engine: Engine) -> Tensor:
    if losses.shape != logits.shape[:1]:
        raise StepError(
            f"the loss gave {list(losses.shape)} for {len(logits)} samples: the step weighs "
            "samples itself and wants one value each, such as reduction='none' gives"
        )
    if logits.dtype == torch.float16 and not engine.scales_losses:
        raise StepError(
            "the network computes in float16, where small gradients vanish: give the engine "
            "compute_dtype=torch.float16, so that it scales losses"
        )
    return losses


def _plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none")
