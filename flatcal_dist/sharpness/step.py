"""The sharpness-aware step: the choreography of one optimizer step, the same on every engine.

    gradient at w  ->  w + e  ->  gradient at w + e  ->  back to w, bit for bit  ->  optimizer

It is a controller and not an optimizer: it owns the whole step, so that it decides when gradients
are reduced, what a non-finite value means for all ranks, and that nothing outlives a perturbation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.losses import cross_entropy
from flatcal_dist.sharpness.engines import Engine
from flatcal_dist.sharpness.errors import StepError
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
    ranks, the mean of the ranks' own norms). Only with measure=True: cosine, between the
    perturbation (SAM's: the ascent gradient) and the descent gradient; perturbation_norm, its
    length; effective_rho, the length that the forward pass saw after rounding to its precision;
    means over the ranks.
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
        self.trainable = self._trainable()
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

        samples: size of the global batch over all ranks and micro-batches; one more small reduction
        finds it when it is not given, and checks that ranks have as many pairs. stop: this rank
        wishes to end; the result tells all ranks. measure: also cosine, perturbation_norm and
        effective_rho. votes: numbers of this rank, as many on each, of which all learn the sums.

        Raises StepError for a batch that cannot be taken; nothing has changed then.
        """
        engine = self.engine
        samples = self._checked(micro_batches, samples)
        share = engine.world_size / samples  # engines average over ranks: summed losses times this
        perturbs = self.rule is not None and self.rule.perturbs_at(self.taken)
        seen = Seen(engine.device)

        with SameFunctionTwice(engine.module, engine.device) as replay:
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
            skipped = total[7] > 0
            if skipped:
                replay.undo()
                engine.skip()
            else:
                self.memory = seen.memory or self.memory
                engine.update(norm, self.clip_norm)
            self.taken += 1
        over = engine.world_size * (len(units) if perturbs else 1)
        return StepResult(
            loss=total[0] / samples,
            perturbed_loss=total[1] / samples if perturbs else None,
            ascent_gradient_norm=total[2] / over if perturbs else None,
            cosine=total[3] / over if perturbs and measure else None,
            perturbation_norm=total[4] / over if perturbs and measure else None,
            effective_rho=total[5] / over if perturbs and measure else None,
            gradient_norm=total[6] / engine.world_size,
            skipped=skipped,
            stop=total[8] > 0,
            loss_scale=engine.loss_scale,
            votes=tuple(total[9:]),
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
        count, mine = len(micro_batches), 0
        if pairs:
            mine = sum(len(target) for _, target in micro_batches)
        even = True
        if samples is None:
            total = self.engine.sum([float(mine), float(count), float(count**2), float(not pairs)])
            samples, even = round(total[0]), self.engine.world_size * total[2] == total[1] ** 2
            pairs = not total[3]
        if not pairs:
            raise StepError("a step takes a list of (inputs, target) pairs, one per micro-batch")
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
        if self._trainable() != self.trainable:
            raise StepError(
                "parameters were frozen or thawed after the step was built: build engine, "
                "optimizer and step again"
            )
        return samples

    def _trainable(self) -> list[bool]:
        return [w.requires_grad for w in self.engine.module.parameters()]

    def _plain_gradient(self, micro_batches: MicroBatches, share: float, seen: "Seen") -> None:
        seen.loss = seen.loss + self._pass(micro_batches, self.loss, share)
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
        if in_place:
            seen.loss = seen.loss + self._pass(micro_batches, self.loss, share, overlapped)
            shards = engine.shards()
            shards.own = not overlapped  # nothing was reduced: no engine counts on this memory
        else:
            loss, shards = self._own_gradient(micro_batches, share / self.scope.ranks)
            seen.loss = seen.loss + loss
        norm, kept = self._gradient_to_perturbation_(shards)
        replay.rewind()
        with engine.moved(shards) as displacement:
            if in_place:
                engine.zero_gradients()
            seen.perturbed_loss = seen.perturbed_loss + self._pass(
                micro_batches, self.descent_loss, share, last
            )
            if measure:
                cosine, length, effective = displacement()
                seen.cosine = seen.cosine + cosine
                seen.length = seen.length + length
                seen.effective_rho = seen.effective_rho + effective
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
        if not self.rule.remembers:
            return norm, None
        return norm, {n: e.clone() for n, e in zip(shards.names, shards.gradients, strict=True)}

    def _pass(
        self, micro_batches: MicroBatches, loss: Loss, share: float, reduce: bool = True
    ) -> Tensor:
        """Accumulate the gradient of share * (sum of losses); reduce it with the last micro-batch.

        Returns the sum of this rank's losses, those of the ascent, a float64 scalar.
        """
        # Inside somebody's outer autocast block the low-precision copies of the weights would
        # outlive the perturbation: pass two would silently see the weights of pass one.
        torch.clear_autocast_cache()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for number, (inputs, target) in enumerate(micro_batches, start=1):
            with self.engine.accumulation(reduce and number == len(micro_batches)):
                logits = logits_of(self.engine.model(inputs))
                losses = _per_sample(loss(logits, target), logits, self.engine)
                self.engine.backward(losses.sum() * share)
            seen = losses if loss is self.loss else self.loss(logits.detach(), target)
            total += seen.detach().sum()
        return total

    def _own_gradient(self, micro_batches: MicroBatches, share: float) -> tuple[Tensor, Shards]:
        """As `_pass`, with the gradient left on this rank, then summed over the ranks in scope.

        It comes from autograd itself: no engine sees it, and what an engine accumulates stays.
        """
        torch.clear_autocast_cache()
        engine = self.engine
        total = torch.zeros((), dtype=torch.float64, device=engine.device)
        shards = engine.whole_weights()
        gradients: list[Tensor | None] = [None] * len(shards.weights)
        for inputs, target in micro_batches:
            with engine.accumulation(reduce=False):  # DDP may be within
                logits = logits_of(engine.module(inputs))
            losses = _per_sample(self.loss(logits, target), logits, engine).sum()
            new = list(
                torch.autograd.grad(
                    losses * share * engine.loss_scale, shards.weights, allow_unused=True
                )
            )
            for i in reversed(range(len(new))):
                gradient = new.pop()  # autograd may give one tensor for several parameters: copy
                if gradient is not None and gradients[i] is None:
                    gradients[i] = torch.empty_like(shards.weights[i]).copy_(gradient)
                elif gradient is not None:
                    gradients[i].add_(gradient)
            total += losses.detach()
        shards.gradients = [
            torch.zeros_like(w) if g is None else g
            for w, g in zip(shards.weights, gradients, strict=True)
        ]
        self.scope.sum_(shards.gradients)
        return total, shards

    def _agree(self, seen: "Seen", norm: Tensor, stop: bool, votes: Sequence[float]) -> list[float]:
        """Sums over ranks: of all seen, ranks that must skip, wish to stop; votes."""
        mine = torch.stack([*seen.numbers(), norm.double()])
        skip = 1 - mine.isfinite().all().double()
        return self.engine.sum([*mine, skip, float(stop), *votes])


class Seen:
    """What this rank saw in a step, summed over its units; float64 scalars on the device."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.loss = self.perturbed_loss = self.ascent_norm = zero
        self.cosine = self.length = self.effective_rho = zero
        self.memory: dict[str, Tensor] | None = None

    def numbers(self) -> list[Tensor]:
        return [
            self.loss, self.perturbed_loss, self.ascent_norm,
            self.cosine, self.length, self.effective_rho,
        ]  # fmt: skip


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
