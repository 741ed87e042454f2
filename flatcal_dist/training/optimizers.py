"""The base optimizer, timm's, and the schedule of its learning rate."""

import inspect

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler.scheduler import Scheduler
from torch import nn

from flatcal_dist.config import Config, ConfigError, OptimizerConfig
from flatcal_dist.schedules import Length

MOMENTUM = OptimizerConfig().momentum
OWN_KEYS = ("lr", "weight_decay", "momentum")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer of this name; biases and norm weights are not decayed.

    'sgd' is the papers' (no Nesterov momentum): timm's own 'sgd' switches Nesterov on.
    Raises ConfigError for an unknown name, options that it does not take, or one that needs more of
    the network than gradients.
    """
    if config.name not in list_optimizers():
        raise ConfigError(
            f"optimizer.name={config.name} is not one of timm's: {', '.join(list_optimizers())}"
        )
    if get_optimizer_info(config.name).second_order:
        raise ConfigError(
            f"optimizer.name={config.name} differentiates the gradient once more, for which a "
            "sharpness-aware step keeps no graph; choose a first-order one, such as adamw"
        )
    options = dict(config.options)
    if config.name == "sgd":
        options.setdefault("nesterov", False)
    takes = inspect.signature(get_optimizer_info(config.name).opt_class).parameters
    known = [key for key in takes if key not in ("params", "self", *OWN_KEYS)]
    if strange := [key for key in options if key not in known]:
        raise ConfigError(
            f"optimizer.options.{strange[0]}: {config.name} takes {', '.join(known)} here; rate, "
            "decay and momentum have keys of their own in the section optimizer"
        )
    if not get_optimizer_info(config.name).has_momentum and config.momentum != MOMENTUM:
        raise ConfigError(
            f"optimizer.momentum={config.momentum} belongs to optimizers with momentum, and "
            f"optimizer.name={config.name} has none: leave it out, or choose sgd"
        )
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **options,
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"the section optimizer does not fit optimizer.name={config.name} with "
            f"optimizer.options={options}: {type(error).__name__}: {error}"
        ) from None


def build_schedule(
    config: Config, optimizer: torch.optim.Optimizer, total_steps: int, epoch_steps: int
) -> Scheduler:
    """Return the schedule of a configuration for a run of this length.

    Args:
        config: Its sections `schedule` and `optimizer` are read.
        optimizer: Its learning rates are set by `step_update(step)`.
        total_steps: Of the run.
        epoch_steps: Of an epoch.
    """
    peak = config.optimizer.learning_rate
    warmup = min(round(config.optimizer.warmup_epochs * epoch_steps), total_steps - 1)
    length = Length(warmup, epoch_steps, total_steps)
    return config.schedule.build().scheduler(optimizer, peak, length)
