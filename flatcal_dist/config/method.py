"""One name of a method, derived from the configuration, so that nothing different is pooled."""

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
