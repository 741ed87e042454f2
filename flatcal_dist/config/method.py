"""One name of a method, derived from the configuration, so that nothing different is pooled."""

from flatcal_dist.config.identity import fingerprint
from flatcal_dist.config.root import Config

PLAIN = ("none", "cross_entropy")


def method_of(config: Config) -> str:
    """Return the name of a training method: `sgd`, `csam`, `sam+focal+swa`, `sgd+mixup`.

    It joins the rule (or the optimizer, without a rule), the objective, the average and the mixing,
    and leaves out what is plain. Numbers such as rho are no part of it: they are settings.
    """
    rule = config.sharpness.rule
    others = (config.objective.name, config.average.name, config.mixing.name)
    first = config.optimizer.name if rule == "none" else rule
    return "+".join([first, *(name for name in others if name not in PLAIN)])


def setting_of(config: Config) -> str:
    """Return a text that runs share if they differ in the seed alone: `csam mlp 1a2b3c4d`.

    It joins method and network with a hash of all that a run computes. Dashboards pool by it.
    """
    first = config.model_copy(update={"run": config.run.model_copy(update={"seed": 0})})
    return f"{method_of(config)} {config.model.name} {fingerprint(first)}"
