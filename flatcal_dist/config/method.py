"""One name of a method, derived from the configuration, so that nothing different is pooled."""

from typing import Any

from flatcal_dist.config.checking.choosing import CHOOSERS
from flatcal_dist.config.identity import chosen_values, fingerprint, perturbs_micro_batches
from flatcal_dist.config.root import Config

PLAIN = ("none", "cross_entropy")
# Numbers that make another method and not another setting of it: when, how often, by how much of
# the batch and on how many ranks a rule perturbs.
MAKES_ANOTHER = {
    "sharpness": ("every", "share", "start_epoch", "stop_epoch", "scope"),
    "objective": ("plain_epochs", "p"),
}
# They say how a run computes, not what.
SAYS_NOTHING = ("allow_other_samples", "accumulation")


def method_of(config: Config) -> str:
    """Return the name of a training method: `sgd`, `sam+focal+swa`, `sam[select=norms]+mixup`.

    It joins the rule (or the optimizer, without a rule), the objective, the average and the mixing,
    and leaves out what is plain. In brackets is what makes another method of one name: forms that
    are chosen by a word or by yes and no, and when, how often and by which images a rule perturbs,
    where they differ from the default. Other numbers such as rho are no part of it: they are
    settings.
    """
    parts = [_named(config, section) for section in ("sharpness", "objective", "average", "mixing")]
    if config.sharpness.rule == "none":
        parts[0] = config.optimizer.name
    return "+".join(part for part in parts if part)


def _named(config: Config, section: str) -> str:
    """Return the choice of a section with what distinguishes it, or nothing if it is plain."""
    by = CHOOSERS[section].by
    values = chosen_values(config)[section]
    if values[by] in PLAIN:
        return ""
    told = [
        f"{key}={_word(value)}"
        for key, value in values.items()
        if key not in (by, *SAYS_NOTHING)
        and (isinstance(value, str | bool) or key in MAKES_ANOTHER.get(section, ()))
    ]
    if section == "sharpness" and perturbs_micro_batches(config):
        told.append(f"micro_batch_size={config.data.micro_batch_size}")
    return values[by] + (f"[{','.join(told)}]" if told else "")


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_of(config: Config) -> str:
    """Return a text that runs share if they differ in the seed alone: `csam mlp 1a2b3c4d`.

    It joins method and network with a hash of all that a run computes. Dashboards pool by it.
    """
    first = config.model_copy(update={"run": config.run.model_copy(update={"seed": 0})})
    return f"{method_of(config)} {config.model.name} {fingerprint(first)}"
