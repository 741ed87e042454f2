"""What the step does for its objective: checks before it, and learning after it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flatcal_dist.objectives.base import Objective, OfLabels, State, unmixed
from flatcal_dist.objectives.cross_entropy import CrossEntropy
from flatcal_dist.objectives.targets import as_targets
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.rules import Loss, Memory, Rule


def objective_of(loss: Loss | None, rule: Rule | None) -> Objective:
    """Return the objective that is meant by the step's `loss`. A plain function sees labels only.

    Raises StepError if the rule cannot use it.
    """
    if rule is not None and not isinstance(rule, Rule):
        raise StepError(f"rule is {rule!r}: expected a rule such as SAM(rho=0.05), or None")
    if loss is None:
        return CrossEntropy()
    if not callable(loss) or isinstance(loss, type):
        raise StepError(
            f"loss is {loss!r}: expected an objective such as Focal(), or a function of (logits, "
            "labels) that returns one loss for each sample"
        )
    name = type(rule).__name__
    if rule and rule.own_loss:
        raise StepError(f"{name} defines the losses of both passes: leave `loss` out")
    objective = loss if isinstance(loss, Objective) else OfLabels(loss)
    if rule and objective.keeps_history and rule.ascent_share != 1:
        raise StepError(
            f"{type(objective).__name__} learns from a pass at w of every sample, and {name} "
            "makes no such pass, or makes it on a part of the batch only: use SAM"
        )
    return objective


def refuse_apart(objective: Objective, rule: Rule, apart: bool) -> None:
    """Raise StepError for a rule or objective that needs all samples of a step together.

    Args:
        objective: The objective.
        rule: The rule.
        apart: Whether ranks or micro-batches perturb each by themselves.
    """
    name, loss = type(rule).__name__, type(objective).__name__
    if apart and rule.combines:
        raise StepError(
            f"{name} compares the two gradients of a step, so both must be of all ranks: use scope "
            "'global' without per_micro_batch, or SAM"
        )
    if apart and objective.whole_batch:
        raise StepError(
            f"{loss} compares all samples of a step, and in this scope a part of them perturbs by "
            "itself: use scope 'global' without per_micro_batch"
        )
    if objective.whole_batch and 0 < rule.ascent_share < 1:
        raise StepError(
            f"{loss} compares all samples of a step, and {name}(share={rule.ascent_share:g}) takes "
            "the ascent gradient of a part of them: use share=1"
        )
    if rule.follows_outputs and objective.whole_batch:
        raise StepError(
            f"{name} keeps the slopes at w, and {loss} compares the samples at w + e: use SAM"
        )


def with_outputs(unit: Sequence[Any], outputs: Sequence[Any]) -> Sequence[Any]:
    """Return micro-batches whose targets hold the outputs of the first pass."""
    return [
        (inputs, replace(as_targets(target), at_w=output))
        for (inputs, target), output in zip(unit, outputs, strict=True)
    ]


def refuse_without_targets(objective: Objective) -> None:
    """Raise StepError for an objective that `forward=` would replace, or that sees no targets."""
    if objective.keeps_history:
        raise StepError(
            f"with forward= the step sees no targets, and {type(objective).__name__} keeps a "
            "history of them: give the step pairs (inputs, targets) without forward="
        )
    if not isinstance(objective, CrossEntropy):
        raise StepError(
            f"with forward= the losses are those that it returns, and {type(objective).__name__} "
            "would not be used: compute it within forward, and give the step no loss="
        )


def learn(objective: Objective, micro_batches: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Show the objective a step that was taken, if it keeps a history.

    Args:
        objective: The objective.
        micro_batches: The pairs (inputs, targets) of this rank.
        outputs: The outputs of the first pass, one for each micro-batch.
    """
    if objective.keeps_history:
        known = [as_targets(targets) for _, targets in micro_batches]
        clean = [o if t.mixed is None else unmixed(o) for o, t in zip(outputs, known, strict=True)]
        objective.after_step(known, clean)


def refuse_memory(memory: Memory | None, of: str | None, rule: Rule | None, parts: Memory) -> None:
    """Raise ValueError for a memory that means nothing here.

    Args:
        memory: What a rule remembered, or None.
        of: The name of its class, or None if it is not known.
        rule: The rule that would go on with it.
        parts: This rank's parts of the weights.
    """
    own = type(rule).__name__
    if memory is None:
        return
    if of not in (None, own):
        raise ValueError(
            f"the state holds what {of} remembers, which means nothing to {own}: go on with {of}, "
            "or begin without this state"
        )
    for name, tensor in memory.items():
        if name not in parts or tensor.numel() != parts[name].numel():
            raise ValueError(
                f"the state remembers {tensor.numel()} numbers for {name}, which this rank does "
                "not have in this size: it is of another network, or of another number of ranks"
            )


def load_state(objective: Objective, state: State | None) -> None:
    """Let an objective go on from a saved state.

    Raises ValueError if it keeps a history, and the state has none or has another objective's.
    """
    if not objective.keeps_history:
        return
    if state is None:
        raise ValueError(
            f"it has no history of {type(objective).__name__}: another objective was trained, or "
            "an older version wrote it"
        )
    objective.load(state)
