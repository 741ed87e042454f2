"""The base optimizer comes from timm; so does the schedule of its learning rate."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import (
    OptimInfo,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
)
from timm.scheduler.scheduler import Scheduler
from torch import nn

from flatcal_dist.config import Config, ConfigError, OptimizerConfig
from flatcal_dist.config.run_length import length_of, refuse_short

MOMENTUM = OptimizerConfig().momentum
OWN_KEYS = ("lr", "weight_decay", "momentum")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return timm's optimizer of this name. Biases and norm weights are not decayed.

    'sgd' is without Nesterov momentum, as in the papers; the 'sgd' of timm has it.
    Raises ConfigError for an unknown name, for options that the optimizer does not take, and for an
    optimizer that needs more than gradients, or a package that is not installed.
    """
    names = [str(name) for name in list_optimizers()]
    if config.name not in names:
        raise ConfigError(f"optimizer.name={config.name} is not one of timm's: {', '.join(names)}")
    info = get_optimizer_info(config.name)
    if info.second_order:
        raise ConfigError(
            f"optimizer.name={config.name} differentiates the gradient once more, for which a "
            "sharpness-aware step keeps no graph; choose a first-order one, such as adamw"
        )
    options = dict(config.options)
    if config.name == "sgd":
        options.setdefault("nesterov", False)
    takes = inspect.signature(_class_of(info)).parameters
    known = [key for key in takes if key not in ("params", "self", *OWN_KEYS)]
    if strange := [key for key in options if key not in known]:
        raise ConfigError(
            f"optimizer.options.{strange[0]}: {config.name} takes {', '.join(known)} here; rate, "
            "decay and momentum are other keys of the section optimizer"
        )
    if not info.has_momentum and config.momentum != MOMENTUM:
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


def _class_of(info: OptimInfo) -> Callable[..., Any]:
    """Return the class of an optimizer. Raises ConfigError if its package is missing."""
    try:
        return get_optimizer_class(info.name, bind_defaults=False)
    except (ImportError, AssertionError) as error:  # apex's and bitsandbytes' need CUDA, too
        raise ConfigError(
            f"optimizer.name={info.name} cannot be used here ({error}): install what it needs, or "
            "choose another optimizer"
        ) from None


def build_schedule(
    config: Config, optimizer: torch.optim.Optimizer, total_steps: int, epoch_steps: int
) -> Scheduler:
    """Return the schedule of a configuration for a run of this length.

    Args:
        config: Its sections `schedule`, `optimizer` and `average` are read.
        optimizer: Its learning rates are set by `step_update(step)`.
        total_steps: The number of steps of the run.
        epoch_steps: The number of steps of an epoch.

    Raises:
        ConfigError: A phase of the schedule would never begin.
    """
    length = length_of(config, total_steps, epoch_steps)
    refuse_short(config, length)
    return config.schedule.build().scheduler(optimizer, config.optimizer.learning_rate, length)
