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
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler.scheduler import Scheduler
from torch import nn

from flatcal_dist.config import Config, ConfigError, OptimizerConfig
from flatcal_dist.config.checking.run_length import length_of, refuse_short

MOMENTUM = OptimizerConfig().momentum
OWN_KEYS = ("lr", "weight_decay", "momentum")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return timm's optimizer of this name, with a group of weights for each decay and layer.

    'sgd' is without Nesterov momentum, as in the papers; the 'sgd' of timm has it.
    Raises ConfigError for an unknown name, for options that the optimizer does not take, for an
    optimizer that needs more than gradients, or a package that is not installed, and for layer
    decay of a network that does not tell its layers.
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
    groups = _groups(config, model)
    try:
        return create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            param_group_fn=lambda _: groups,
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


def _groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of weights that have a decay and a learning rate in common."""
    everything = config.decayed == "all"
    exempt = [] if everything else ["*.bias", *getattr(model, "no_weight_decay", tuple)()]
    options: dict[str, Any] = {
        "weight_decay_exclude_1d": not everything,
        "no_weight_decay_list": exempt,
    }
    if config.layer_decay == 1:
        return param_groups_weight_decay(model, config.weight_decay, **options)
    if not hasattr(model, "group_matcher"):
        raise ConfigError(
            f"optimizer.layer_decay={config.layer_decay:g} needs the order of the layers, which "
            f"networks of timm and of this package tell and {type(model).__name__} does not: "
            "choose one of them, or set optimizer.layer_decay=1"
        )
    return param_groups_layer_decay(
        model, config.weight_decay, layer_decay=config.layer_decay, **options
    )


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the last layer, which is the one that the schedule gives."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / group.get("lr_scale", 1.0)


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
