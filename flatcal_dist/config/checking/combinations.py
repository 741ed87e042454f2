"""Values of different sections that do not go together, each with the reason and the remedy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flatcal_dist.objectives import Objective
from flatcal_dist.sharpness.rules import Rule

if TYPE_CHECKING:
    from flatcal_dist.config.root import Config


def what_does_not_go_together(config: "Config") -> Iterator[str]:
    """Yield what is wrong with a configuration whose keys are valid one by one."""
    rule: Rule | None = config.sharpness.build()
    objective: Objective = config.objective.build()
    if rule is not None:
        yield from _rule_and_objective(rule, objective)
        yield from _rule_and_scope(config, rule)
    yield from _mixing(config, rule, objective)
    yield from _objective_and_data(config, objective)
    try:
        objective.check_classes(config.model.num_classes)
    except ValueError as error:
        yield f"objective.name={objective.name} does not fit model.num_classes: {error}"
    if config.data.holdout is not None and config.data.reader == "streaming":
        yield (
            "data.holdout chooses images by their keys and labels, which streamed shards do not "
            "have: set data.reader=indexed"
        )
    if config.train.keep_best and config.train.validate_every_epochs is None:
        yield "train.keep_best needs validation: set train.validate_every_epochs"


def _rule_and_objective(rule: Rule, objective: Objective) -> Iterator[str]:
    if rule.own_loss and objective.name != "cross_entropy":
        yield (
            f"sharpness.rule={rule.name} defines the loss itself, from hard labels: set "
            f"objective.name=cross_entropy, or another rule than {rule.name}, such as sam"
        )
    if objective.keeps_history and rule.ascent_share != 1:
        how, remedy = "makes no such pass", "choose sharpness.rule=sam"
        if rule.ascent_share:
            how, remedy = "makes it on a part of the batch", "set sharpness.share=1"
        yield (
            f"objective.name={objective.name} learns from a pass at w of every image, and "
            f"sharpness.rule={rule.name} {how}: {remedy}"
        )
    if objective.whole_batch and 0 < rule.ascent_share < 1:
        yield (
            f"objective.name={objective.name} compares all images of a step, and sharpness.share="
            f"{rule.ascent_share:g} takes the ascent gradient of a part of them: set "
            "sharpness.share=1, or choose another objective.name"
        )
    if objective.whole_batch and rule.follows_outputs:
        yield (
            f"sharpness.rule={rule.name} keeps the slopes at w, and objective.name="
            f"{objective.name} compares the images at w + e: choose sharpness.rule=sam, or another "
            "objective.name"
        )


def _rule_and_scope(config: "Config", rule: Rule) -> Iterator[str]:
    """A scope of ranks may hold all of them, which only the run knows. Micro-batches are alone."""
    sharpness, objective = config.sharpness, config.objective.build()
    apart = sharpness.per_micro_batch or sharpness.scope == "rank"
    if not apart or not (rule.combines or objective.whole_batch):
        return
    key = "per_micro_batch=true" if sharpness.per_micro_batch else "scope=rank"
    who = f"sharpness.rule={rule.name} compares the two gradients of a step, which must be of all"
    if not rule.combines:
        who = f"objective.name={objective.name} compares all"
    yield (
        f"{who} images of the step, and with sharpness.{key} a part of them perturbs by itself: "
        "set sharpness.scope=global and sharpness.per_micro_batch=false"
    )


def _mixing(config: "Config", rule: Rule | None, objective: Objective) -> Iterator[str]:
    mixing = config.mixing.name
    if mixing == "none":
        return
    if mixing == "regmixup" and objective.pairs == "same_class":
        yield (
            f"objective.name={objective.name} puts images of one class side by side, and mixing "
            "mixes such neighbours, which would be of one class: set mixing.name=none, or choose "
            "another objective.name"
        )
    key = None
    if rule is not None and rule.own_loss:
        key = f"sharpness.rule={rule.name}"
    elif objective.hard_labels and mixing != "regmixup":
        key = f"objective.name={objective.name}"
    if key:
        yield (
            f"{key} is defined for hard labels only, and mixing makes soft ones: set "
            f"mixing.name=none, or choose another {key.partition('=')[0]}"
        )


def _objective_and_data(config: "Config", objective: Objective) -> Iterator[str]:
    needs = "an order that pairs classes" if objective.pairs == "same_class" else None
    needs = "a number for each image" if objective.keeps_history else needs
    if needs and config.data.reader == "streaming":
        yield (
            f"objective.name={objective.name} needs {needs}, which streamed shards do not have: "
            "set data.reader=indexed"
        )
