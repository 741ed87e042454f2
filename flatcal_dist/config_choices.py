"""Keys that only one choice reads: a gamma belongs to CSAM, a decay to an average.

Such a key beside another choice is refused where it was given on purpose: it would change nothing
but the name of the run. A file that others inherit may hold it, for those that choose its reader.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flatcal_dist.config_files import ConfigError, Layers

if TYPE_CHECKING:
    from flatcal_dist.config import Config


@dataclass(frozen=True)
class Choice:
    """`keys` are read where `chosen` holds, which `by` decides; `where` says it in words."""

    keys: tuple[str, ...]
    chosen: Callable[["Config"], Any]
    by: tuple[str, ...]
    where: str


def _rule(key: str, *rules: str) -> Choice:
    return Choice(
        (key,), lambda config: config.sharpness.rule in rules, ("sharpness.rule",),
        f"sharpness.rule={' or '.join(rules)}",
    )  # fmt: skip


CHOICES = (
    Choice(
        ("sharpness.rho", "sharpness.rho_schedule", "sharpness.every", "sharpness.scope",
         "sharpness.per_micro_batch"),
        lambda config: config.sharpness.rule != "none",
        ("sharpness.rule",),
        "a sharpness.rule such as sam",
    ),
    _rule("sharpness.gamma", "csam"),
    _rule("sharpness.eta", "asam"),
    _rule("sharpness.alpha", "looksam", "gsam"),
    _rule("sharpness.momentum", "momentum_sam"),
    Choice(
        ("sharpness.rho_min",),
        lambda config: config.sharpness.rule != "none"
        and config.sharpness.rho_schedule == "learning_rate",
        ("sharpness.rule", "sharpness.rho_schedule"),
        "a sharpness.rule such as sam and sharpness.rho_schedule=learning_rate",
    ),
    Choice(
        ("train.average_decay", "train.average_norm_statistics"),
        lambda config: config.train.average == "ema",
        ("train.average",),
        "train.average=ema",
    ),
    Choice(
        ("data.crop_scale", "data.crop_ratio", "data.flip"),
        lambda config: config.data.augmentation == "resized_crop",
        ("data.augmentation",),
        "data.augmentation=resized_crop",
    ),
    Choice(
        ("data.auto_augment_magnitude",),
        lambda config: config.data.auto_augment in ("randaugment", "augmix"),
        ("data.auto_augment",),
        "data.auto_augment=randaugment or augmix",
    ),
    Choice(
        ("data.auto_augment_operations",),
        lambda config: config.data.auto_augment == "randaugment",
        ("data.auto_augment",),
        "data.auto_augment=randaugment",
    ),
    Choice(
        ("data.mix_probability",),
        lambda config: config.data.mixup or config.data.cutmix,
        ("data.mixup", "data.cutmix"),
        "a data.mixup or data.cutmix above 0",
    ),
    Choice(
        ("data.epoch_samples", "data.shuffle_buffer"),
        lambda config: config.data.reader != "indexed",
        ("data.reader",),
        "data.reader=streaming or auto",
    ),
    Choice(
        ("data.shuffle_window",),
        lambda config: config.data.reader != "streaming",
        ("data.reader",),
        "data.reader=indexed or auto",
    ),
    Choice(
        ("data.cache_limit",),
        lambda config: config.data.cache is not None,
        ("data.cache",),
        "a data.cache",
    ),
)  # fmt: skip


def unread(config: "Config") -> dict[str, Choice]:
    """The keys that this configuration does not read, each with the choice that would read it."""
    return {key: choice for choice in CHOICES if not choice.chosen(config) for key in choice.keys}


def with_chosen_only(config: "Config", layers: Layers, recorded: bool) -> "Config":
    """The configuration with defaults for all that it does not read.

    A value is refused if it is written on the command line, or in the layer that makes the choice
    or a later one. Values of earlier layers belong to other choices: they are set aside.

    Args:
        config: The valid configuration.
        layers: Where its values were written.
        recorded: Whether it is that of a run which has begun: nothing is refused then.

    Raises:
        ConfigError: A value that is not read was given on purpose.
    """
    aside: dict[str, dict[str, Any]] = {}
    refused = []
    for key, choice in unread(config).items():
        section, name = key.split(".")
        model = getattr(config, section)
        value, default = getattr(model, name), type(model).model_fields[name].default
        aside.setdefault(section, {})[name] = default
        origin = layers.origin.get(key)
        made = [layers.origin[one].layer for one in choice.by if one in layers.origin]
        if origin is None or recorded or origin.layer < max(made, default=0):
            continue
        if origin.on_command_line or value != default:
            now = ", ".join(f"{one} is {_value(config, one)}" for one in choice.by)
            refused.append(
                f"{key} = {value!r} ({origin}) belongs to {choice.where}, and {now}: leave it out, "
                "or choose what reads it"
            )
    if refused:
        raise ConfigError("\n".join(refused))
    changed = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in aside.items()
    }
    return config.model_copy(update=changed)


def _value(config: "Config", key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
