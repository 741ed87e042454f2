"""The sharpness-aware step: the choreography of one optimizer step, the same on every engine.

    gradient at w  ->  w + e  ->  gradient at w + e  ->  back to w, bit for bit  ->  optimizer

It is a controller and not an optimizer: it owns the whole step, so that it decides when gradients
are reduced, what a non-finite value means for all ranks, and that nothing outlives a perturbation.

The all-reduce of gradients happens inside the engine's backward pass of the step's last
micro-batch. `gradients.py` has the table of all cases, with the one exception.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.objectives.base import Objective, State
from flatcal_dist.sharpness.engines.base import Engine
from flatcal_dist.sharpness.engines.move import Measured
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.gradients import GradientPath, MicroBatches
from flatcal_dist.sharpness.networks import FrozenWeights, Parameters
from flatcal_dist.sharpness.passes import learning
from flatcal_dist.sharpness.passes.batches import global_size
from flatcal_dist.sharpness.passes.forward import Forward, Pass, of_user, on_a_share, pair
from flatcal_dist.sharpness.passes.replay import SameFunctionTwice, no_weights_in_autocast
from flatcal_dist.sharpness.passes.whole_batch import WholeBatch
from flatcal_dist.sharpness.result import Agreed, Seen, StepResult
from flatcal_dist.sharpness.rules import Context, Loss, Memory, Rule, Shards, squared_norm
from flatcal_dist.sharpness.scope import Scope
from flatcal_dist.sharpness.weights import add_decay_, descend, selection

__all__ = ["MicroBatches", "SharpnessAwareStep"]


@dataclass(frozen=True)
class Call:
    """What the passes of one call of the step share.

    Args:
        rule: The rule that perturbs in this call. None: there is no perturbation.
        rho: The length of e.
        samples: The size of the global batch.
        share: The factor of each loss. Engines take the mean over ranks, so with it the sum of
            losses becomes the mean over the samples of all ranks.
        passes: How a micro-batch is evaluated at w and at w + e.
        replay: Makes the two passes see one function.
        seen: What this rank has seen so far.
        measure: Whether to measure e.
        progress: The share of training that is over.
    """

    rule: Rule | None
    rho: float
    samples: float
    share: float
    passes: tuple[Pass, Pass]
    replay: SameFunctionTwice
    seen: Seen
    measure: bool
    progress: float


class SharpnessAwareStep:
    """One optimizer step on the micro-batches of one rank.

    `taken` is the number of steps so far, `perturbs` says whether the last one perturbed, and
    `memory` is what the rule keeps, or None. To go on after a restart, save `engine.local_state()`
    and `state_dict()` of every rank.

    Args:
        engine: The network and its optimizer, on one of the engines.
        rule: One of `flatcal_dist.sharpness.rules`, or None for plain training.
        loss: The objective of the ascent gradient, or a function (logits [N, K], labels) -> losses
            [N]; by default cross-entropy. The rule derives the objective of the descent from it.
            CSAM has its own losses and takes none. An objective with a history needs
            `Objective.begin` before the first step, and `end_epoch` of the step after each epoch.
        scope: The ranks whose gradient perturbs. "global": all ranks, so that N ranks with batch B
            are one rank with batch N * B. "rank": each rank alone (m-sharpness, Foret et al. 2021,
            section 4.1). "node": the ranks of each node. A number: groups of so many ranks.
        per_micro_batch: Whether each micro-batch has its own perturbation, a smaller m again.
        clip_norm: The largest norm of the descent gradient. None: no clipping.

    Raises:
        StepError: Rule, scope and engine cannot do this together. The message names alternatives.
    """

    def __init__(
        self,
        engine: Engine,
        rule: Rule | None,
        *,
        loss: Loss | None = None,
        scope: str | int = "global",
        per_micro_batch: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        if clip_norm is not None and not clip_norm > 0:
            raise StepError(f"clip_norm must be positive, or None for no clipping; got {clip_norm}")
        self.engine = engine
        self.rule = rule
        self.scope = Scope.of(scope, engine.world_size)
        self.per_micro_batch = per_micro_batch
        self.clip_norm = clip_norm
        self.loss: Objective = learning.objective_of(loss, rule)
        self.taken, self.perturbs = 0, False
        self.memory: Memory | None = None
        self.batch_of = WholeBatch(engine.world_size)
        self.path = GradientPath(engine, self.scope, per_micro_batch, self.loss, self.batch_of)
        self.built_with = Parameters(engine)
        self.frozen = FrozenWeights(engine.module)
        self.descent_loss: Loss = self.loss
        self.selects: Callable[[str], bool] = lambda name: True
        if rule:
            learning.refuse_apart(self.loss, rule, per_micro_batch or not self.scope.everyone)
            engine.check(rule, self.scope, per_micro_batch)
            self.descent_loss = rule.descent_loss(self.loss)
            self.selects = selection(rule, engine.named)

    def __call__(
        self,
        micro_batches: MicroBatches,
        *,
        at: int | None = None,
        rho: float | None = None,
        forward: Forward | None = None,
        samples: float | None = None,
        perturb: bool = True,
        progress: float = 0.0,
        stop: bool = False,
        measure: bool = False,
        votes: Sequence[float] = (),
    ) -> StepResult:
        """Take the step on this rank's micro-batches, as many on every rank.

        Args:
            micro_batches: Pairs (inputs, target), or what `forward` takes. A target is labels, or
                `Targets`.
            at: The number of this step, counted from 0, which decides whether a periodic rule
                perturbs. By default it is `taken`.
            rho: The length of the perturbation in this step. By default it is the rule's.
            forward: A function of (model, batch) that returns losses and whatever else is wanted
                back, in a form of `flatcal_dist.sharpness.passes.forward`. It has to call the model
                that it is given. By default the step calls the network and its objective.
            samples: The number of losses (or the sum of their weights) in a pass over all ranks
                and micro-batches. If it is not given, one more small reduction finds it from the
                first tensor of each batch, and checks that ranks have as many micro-batches.
            perturb: Whether the rule is used at all. If not, the step is that of plain training,
                and the rule forgets what it kept.
            progress: The share of training that is over, in [0, 1], for rules that depend on it.
            stop: Whether this rank wishes to end. The result tells all ranks.
            measure: Whether to fill in also the fields of StepResult that need it.
            votes: Numbers of this rank, as many on each rank. All ranks learn the sums.

        Raises:
            StepError: The batch cannot be taken. Nothing has changed then.
        """
        engine = self.engine
        samples = global_size(engine, self.loss, micro_batches, samples, forward is not None)
        rho = self._length(rho)
        self.built_with.refuse_changed()
        passes = self._passes(forward)
        self.taken = self.taken if at is None else at
        rule = self.rule if perturb and self.rule and self.rule.perturbs_at(self.taken) else None
        self.perturbs, self.memory = rule is not None, self.memory if perturb else None
        units: Sequence[MicroBatches] = [micro_batches]
        if rule and self.per_micro_batch:
            units = [[batch] for batch in micro_batches]
        replay, seen = SameFunctionTwice(engine.module, engine.device), Seen(engine.device)
        share = engine.world_size / samples
        call = Call(rule, rho, samples, share, passes, replay, seen, measure, progress)
        agreed = self._take(units, call, self.rule if perturb else None, stop, votes)
        if not agreed.skipped:
            learning.learn(self.loss, micro_batches, seen.outputs)
        return self._result(call, agreed, len(units))

    def end_epoch(self) -> None:
        """Tell the objective that an epoch is over. Called by all ranks."""
        self.loss.epoch_end(self.engine.over_ranks)

    def objective_state(self) -> State | None:
        """Return what the objective keeps, the same on every rank. Called by all ranks."""
        return self.loss.state(self.engine.over_ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return what the step itself keeps, in tensors and plain containers.

        Called by all ranks.
        """
        objective = self.objective_state()
        rule = type(self.rule).__name__
        return {"taken": self.taken, "memory": self.memory, "objective": objective, "rule": rule}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises ValueError if the objective keeps a history and the state has none of this kind, or
        if what is remembered is of another rule or network.
        """
        memory, parts = state["memory"], self.engine.masters()
        learning.refuse_memory(memory, state.get("rule"), self.rule, parts)
        learning.load_state(self.loss, state.get("objective"))
        self.taken = state["taken"]
        self.memory = memory and {n: t.to(self.engine.device) for n, t in memory.items()}

    @property
    def rho(self) -> float:
        """The length of e where a call gives no other one: the rule's. It cannot be set."""
        return self.rule.rho if self.rule else 0.0

    def _length(self, rho: float | None) -> float:
        rho = self.rho if rho is None else rho
        if not 0 <= rho < math.inf:
            raise StepError(f"rho must be finite and not negative, and the step was given {rho}")
        return rho

    def _passes(self, forward: Forward | None) -> tuple[Pass, Pass]:
        """Return how a micro-batch is evaluated at w, and how at w + e.

        The second pass evaluates the loss of the first as well, to report it.
        """
        rule, scales = self.rule, self.engine.scales_losses
        if forward is None:
            ascent, descent, batch_of = self.loss, self.descent_loss, self.batch_of
            first = pair(ascent, ascent, scales, batch_of)
            return first, pair(descent, ascent, scales, batch_of)
        if rule and (rule.own_loss or rule.follows_outputs):
            raise StepError(
                f"{type(rule).__name__} computes the losses itself, from logits and labels: give "
                "the step pairs (inputs, target) without forward=, or use SAM"
            )
        if rule and 0 < rule.ascent_share < 1:
            raise StepError(
                f"{type(rule).__name__} cuts each micro-batch for the ascent gradient, and cannot "
                "cut what forward= takes: give the step pairs (inputs, target)"
            )
        learning.refuse_without_targets(self.loss)
        return (of_user(forward, self.engine.world_size > 1),) * 2

    def _take(
        self,
        units: Sequence[MicroBatches],
        call: Call,
        rule: Rule | None,
        stop: bool,
        votes: Sequence[float],
    ) -> Agreed:
        """Take both passes of all units, agree with all ranks, and update or skip.

        `rule` combines the gradients, also in steps in which it does not perturb.
        """
        engine, seen, replay = self.engine, call.seen, call.replay
        with no_weights_in_autocast(), replay, engine.broadcasting() as changed:
            if changed:
                replay.start_from_here()
            self._take_gradients(units, call, rule)
            norm = engine.gradient_norm()
            agreed = seen.agree(engine.sum, norm, stop, votes)
            self._refuse_miscounted(agreed.losses, call.samples)
            if agreed.skipped:
                replay.undo()
                engine.skip()
            elif rule and rule.decoupled:
                engine.update(norm, self.clip_norm)
                descend(engine, seen.memory)
            else:
                self.memory = seen.memory or self.memory
                engine.update(norm, self.clip_norm)
            self.taken += 1
        return agreed

    def _take_gradients(self, units: Sequence[MicroBatches], call: Call, rule: Rule | None) -> None:
        """Leave the gradient for the optimizer in the engine, over all units."""
        engine, seen = self.engine, call.seen
        engine.zero_gradients()
        for unit in units:
            if call.rule:
                self._perturbed_gradient(unit, call, call.rule, last=unit is units[-1])
            else:
                seen.add_only(self.path.accumulate(unit, call.passes[0], call.share))
        if rule and rule.combines:
            with torch.no_grad():
                engine.fill_gradients(seen.ascent or ())  # a parameter of the first pass alone
                shards = engine.shards(self.scope)
                context = self._context(shards, call)
                context.ascent, context.ascent_norm = seen.ascent, seen.kept_norm
                seen.memory = rule.combine_(shards, context)
            if rule.decoupled and seen.memory:  # the optimizer's gradient does not hold it
                seen.watched.append(squared_norm(list(seen.memory.values())))
            seen.ascent = None

    def _perturbed_gradient(
        self, unit: MicroBatches, call: Call, rule: Rule, *, last: bool
    ) -> None:
        """Add the gradient at w + e to those of earlier units of this step."""
        engine, seen, replay = self.engine, call.seen, call.replay
        replay.begin()
        shards, in_place, outputs = self._ascent(unit, call, rule)
        if rule.follows_outputs:
            unit = learning.with_outputs(unit, outputs)
        moving = shards.selected(self.selects)
        norm = self._gradient_to_perturbation_(shards, moving, call, rule)
        if rule.ascent_share:
            replay.rewind()
        with engine.moved(moving) as displacement:
            shards.gradients.clear()
            if in_place:
                engine.zero_gradients()
            sums = self.path.accumulate(unit, call.passes[1], call.share, last)
            if rule.ascent_share:
                seen.add_second(sums)
            else:
                seen.add_only(sums)
            if call.measure:
                seen.add_measured(displacement())
        if rule.ascent_share:
            replay.forward()
        seen.ascent_norm = seen.ascent_norm + norm / shards.loss_scale

    def _ascent(self, unit: MicroBatches, call: Call, rule: Rule) -> tuple[Shards, bool, list[Any]]:
        """Return the ascent gradient, whether it lies where the descent gradient will, outputs."""
        if not rule.ascent_share:
            return self.path.zeros(), False, []
        forward = call.passes[0]
        if rule.ascent_share < 1:
            forward = on_a_share(forward, rule.ascent_share, self.loss.pairs != "none")
        with self.frozen.watched():
            shards, in_place, sums = self.path.ascent(unit, forward, call.share)
            call.seen.add_first(sums)
        if rule.length_counts or rule.decays_ascent:
            shards.weight = self.path.weight(sums.losses, call.share)
        return shards, in_place, sums.outputs

    def _context(self, shards: Shards, call: Call) -> Context:
        return Context(call.rho, self.memory, shards.total, progress=call.progress)

    @torch.no_grad()
    def _gradient_to_perturbation_(
        self, shards: Shards, moving: Shards, call: Call, rule: Rule
    ) -> Tensor:
        """Put e in place of the gradients that move, and return the norm that they had.

        It is a function by itself so that no name of the step holds a gradient during the second
        pass.
        """
        if rule.keeps_ascent:
            call.seen.ascent = {name: g.clone() for name, g in shards.by_name()}
        if rule.keeps_norm:
            call.seen.kept_norm = shards.total(squared_norm(shards.gradients)).sqrt()
        if moving is not shards:  # what does not move is remembered by some rules
            rest = [g for name, g in shards.by_name() if not self.selects(name)]
            call.seen.watched.append(squared_norm(rest))
        if rule.decays_ascent:
            add_decay_(moving, self.engine.weight_decays())
        norm = rule.perturb_(moving, self._context(moving, call))
        # After an overflow the step will be skipped. Until all ranks agree on that no network is to
        # run on weights of NaN: it may check its values, or use them as indices.
        overflow = ~norm.isfinite()
        for e in moving.gradients:
            e.masked_fill_(overflow, 0.0)
        return norm

    def _refuse_miscounted(self, losses: float, samples: float) -> None:
        if not math.isclose(losses, samples, rel_tol=1e-6):
            self.engine.zero_gradients()
            raise StepError(
                f"the passes gave {losses:.6g} losses for {samples:.6g} samples: give the step "
                "samples=, the number of losses over all ranks and micro-batches"
            )

    def _result(self, call: Call, agreed: Agreed, units: int) -> StepResult:
        total, samples, over = agreed.total, call.samples, self.engine.world_size * units
        ascends = call.rule is not None and call.rule.ascent_share > 0
        measured = Measured._fields if call.rule and call.measure else ()
        return StepResult(
            loss=total["loss"] / samples,
            perturbed_loss=total["perturbed_loss"] / samples if ascends else None,
            ascent_gradient_norm=total["ascent_norm"] / over if ascends else None,
            gradient_norm=total["norm"] / self.engine.world_size,
            skipped=agreed.skipped,
            stop=agreed.stop,
            loss_scale=self.engine.loss_scale,
            votes=agreed.votes,
            outputs=call.seen.outputs,
            **{name: total[name] / over for name in measured},
        )
