"""Keys that are read only where another key has a certain value: crops only where there are crops.

Such a key is refused where it was given on purpose and would change nothing but the name of the
run. A file that others inherit may hold it, for those that set the other key.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flatcal_dist.config.choice_sections import Perturbation
from flatcal_dist.config.files import Layers, shown
from flatcal_dist.config.root import Config
from flatcal_dist.errors import ConfigError


@dataclass(frozen=True)
class Condition:
    """The keys `keys` are read where `holds` is true.

    The keys `by` decide that. `where` says it in words.
    """

    keys: tuple[str, ...]
    holds: Callable[[Config], bool]
    by: tuple[str, ...]
    where: str


CONDITIONS = (
    Condition(
        ("sharpness.rho_min",),
        lambda config: (
            isinstance(config.sharpness, Perturbation)
            and config.sharpness.rho_schedule == "learning_rate"
        ),
        ("sharpness.rho_schedule",),
        "sharpness.rho_schedule=learning_rate",
    ),
    Condition(
        ("average.start",),
        lambda config: getattr(config.average, "start_epoch", None) is None,
        ("average.start_epoch",),
        "average.start_epoch=null",
    ),
    Condition(
        ("data.holdout_seed",),
        lambda config: config.data.holdout is not None,
        ("data.holdout",),
        "a data.holdout",
    ),
    Condition(
        ("data.crop_scale", "data.crop_ratio"),
        lambda config: config.data.augmentation == "resized_crop",
        ("data.augmentation",),
        "data.augmentation=resized_crop",
    ),
    Condition(
        ("data.crop_padding",),
        lambda config: config.data.augmentation == "pad_crop",
        ("data.augmentation",),
        "data.augmentation=pad_crop",
    ),
    Condition(
        ("data.flip",),
        lambda config: config.data.augmentation != "none",
        ("data.augmentation",),
        "data.augmentation=resized_crop or pad_crop",
    ),
    Condition(
        ("data.auto_augment_magnitude",),
        lambda config: config.data.auto_augment in ("randaugment", "augmix"),
        ("data.auto_augment",),
        "data.auto_augment=randaugment or augmix",
    ),
    Condition(
        ("data.auto_augment_operations",),
        lambda config: config.data.auto_augment == "randaugment",
        ("data.auto_augment",),
        "data.auto_augment=randaugment",
    ),
    Condition(
        ("data.epoch_samples", "data.shuffle_buffer"),
        lambda config: config.data.reader in ("streaming", "auto"),
        ("data.reader",),
        "data.reader=streaming or auto",
    ),
    Condition(
        ("data.shuffle_window",),
        lambda config: config.data.reader != "streaming",
        ("data.reader",),
        "data.reader=indexed, memory or auto",
    ),
    Condition(
        ("data.cache_limit",),
        lambda config: config.data.cache is not None,
        ("data.cache",),
        "a data.cache",
    ),
)


def unread(config: Config) -> dict[str, Condition]:
    """Return the keys that this configuration does not read, each with its condition."""
    return {
        key: condition
        for condition in CONDITIONS
        for key in condition.keys
        if _has(config, key) and not condition.holds(config)
    }


def _has(config: Config, key: str) -> bool:
    """Whether the chosen section has this key at all."""
    section, name = key.split(".")
    return name in type(getattr(config, section)).model_fields


def with_defaults_for_unread(config: Config, layers: Layers, recorded: bool) -> Config:
    """Return the configuration with defaults for all that it does not read.

    A value is refused if it is written on the command line, or in the layer that sets the deciding
    key or a later one. Values of earlier layers are set aside.

    Args:
        config: The valid configuration.
        layers: Where its values were written.
        recorded: Whether it is that of a run which has begun: nothing is refused then.

    Raises:
        ConfigError: A value that is not read was given on purpose.
    """
    aside: dict[str, dict[str, Any]] = {}
    refused = []
    for key, condition in unread(config).items():
        section, name = key.split(".")
        model = getattr(config, section)
        value, default = getattr(model, name), type(model).model_fields[name].default
        aside.setdefault(section, {})[name] = default
        origin = layers.origin.get(key)
        made = [layers.origin[one].layer for one in condition.by if one in layers.origin]
        if origin is None or recorded or origin.layer < max(made, default=0):
            continue
        if origin.on_command_line or value != default:
            now = ", ".join(f"{one} is {_value(config, one)}" for one in condition.by)
            refused.append(
                f"{key} = {shown(value)} ({origin}) belongs to {condition.where}, and {now}: leave "
                "it out, or choose what reads it"
            )
    if refused:
        raise ConfigError("\n".join(refused))
    changed = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in aside.items()
    }
    return config.model_copy(update=changed)


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
