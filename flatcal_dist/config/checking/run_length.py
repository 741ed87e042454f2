"""Whether a run is long enough for its schedule, its rule and its average."""

import math

from flatcal_dist.config.root import Config
from flatcal_dist.errors import ConfigError
from flatcal_dist.schedules import Length

PRECISE = 1000  # steps of an epoch whose true number is not known yet: parts of epochs count


def length_of(config: Config, total_steps: int, epoch_steps: int) -> Length:
    """Return the length of a run and its parts, in optimizer steps.

    Args:
        config: The warm-up and the average are read.
        total_steps: The number of steps of the run.
        epoch_steps: The number of steps of an epoch.
    """
    warmup = min(round(config.optimizer.warmup_epochs * epoch_steps), total_steps - 1)
    rule = config.average.build()
    snapshots = None if rule is None else rule.snapshots(epoch_steps, total_steps)
    return Length(warmup, epoch_steps, total_steps, snapshots)


def refuse_short(config: Config, length: Length, exact: bool = True) -> None:
    """Raise ConfigError if schedule, rule or objective would never begin in a run of this length.

    The schedule may have several phases. `exact` says whether the steps of an epoch are known.
    """
    begins, _ = config.sharpness.phase
    if begins * length.epoch > length.total - 1:
        raise ConfigError(
            f"sharpness.start_epoch={begins:g} comes after the last step of the run, which has "
            f"{length.total / length.epoch:g} epochs: sharpness.rule={config.sharpness.rule} would "
            "never perturb. Choose an earlier epoch, or sharpness.rule=none"
        )
    objective = config.objective.build()
    if objective.begins * length.epoch > length.total - 1:
        raise ConfigError(
            f"objective.name={config.objective.name} would stay as in its first epochs to the end: "
            f"it changes in epoch {objective.begins}, counted from 0, and the run has "
            f"{length.total / length.epoch:g} epochs. Set objective.plain_epochs (focal) or "
            "objective.second_from (flsc) to an earlier epoch"
        )
    if exact:
        _refuse_idle(config, length)
    try:
        config.schedule.build().refuse_unfit(length)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _refuse_idle(config: Config, length: Length) -> None:
    """Raise ConfigError if no step of the run perturbs."""
    rule = config.sharpness.build()
    if rule is None:
        return
    (begins, ends), every = config.sharpness.phase, rule.every
    first = math.ceil(math.ceil(begins * length.epoch - 1e-9) / every) * every
    end = length.total if ends is None else min(length.total, math.ceil(ends * length.epoch - 1e-9))
    if first < end:
        return
    until = "" if ends is None else f", stop_epoch={ends:g}"
    raise ConfigError(
        f"sharpness.rule={config.sharpness.rule} would perturb in no step: with every={every}, "
        f"start_epoch={begins:g}{until} and {length.epoch} steps in an epoch, the first step that "
        f"perturbs would be {first}, and the rule ends before step {end}. Choose other epochs, or "
        "a smaller sharpness.every"
    )


def no_average(config: Config, length: Length) -> str | None:
    """Say in words what is wrong with an average of no weights, or of those of one moment."""
    if length.snapshots is None:
        return None
    count = length.snapshots.count(length.epoch, length.total)
    if count > 1:
        return None
    begin = length.snapshots.begin / length.epoch
    found = "those of one epoch" if count else "none"
    return (
        f"average.name={config.average.name} averages the weights at the ends of at least two "
        f"epochs, but of this run it would average {found}: it has "
        f"{length.total / length.epoch:g} epochs, averaging begins after {begin:g} and happens "
        f"every {length.snapshots.every_epochs}. Raise train.epochs (or train.max_steps), or "
        "lower average.start, average.start_epoch or average.every_epochs"
    )


def refuse_short_epochs(config: Config) -> None:
    """Refuse at load what can be known before there is data: a run whose length is in epochs.

    A run of `train.max_steps` is checked when its data is open (`training.setup`).

    Raises:
        ConfigError: A phase of the schedule would never begin, or the average would be none.
    """
    if config.train.max_steps is not None:
        return
    length = length_of(config, config.train.epochs * PRECISE, PRECISE)
    if remark := no_average(config, length):
        raise ConfigError(remark)
    refuse_short(config, length, exact=False)
