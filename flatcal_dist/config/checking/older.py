"""Keys of earlier versions are refused with their new place, or translated in recorded runs."""

from typing import Any

from flatcal_dist.config.files import Layers
from flatcal_dist.errors import ConfigError

NOW = {
    "train.label_smoothing": "objective: {name: label_smoothing, smoothing: ...}",
    "train.average": "average: {name: ema, decay: ...}",
    "train.average_decay": "average: {name: ema, decay: ...}",
    "train.average_norm_statistics": "average: {name: ema, norm_statistics: ...}",
    "data.mixup": "mixing: {name: mixup, alpha: ...}",
    "data.cutmix": "mixing: {name: cutmix, alpha: ...}",
    "data.mix_probability": "mixing: {name: mixup, probability: ...}",
}


def refuse_older(layers: Layers) -> None:
    """Raise ConfigError for keys that have another place now, and name this place."""
    lines = [
        f"{key} ({layers.origin_of(key)}): this key has another place now: write {now}"
        for key, now in NOW.items()
        if _has(layers.values, key)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _has(values: dict[str, Any], key: str) -> bool:
    section, name = key.split(".")
    return isinstance(values.get(section), dict) and name in values[section]


def translate_older(values: dict[str, Any]) -> None:
    """Replace keys of earlier versions in what a run recorded by the present keys, in place."""
    sections = {key: values.get(key) for key in ("data", "train", "sharpness")}
    data, train, sharpness = (v if isinstance(v, dict) else {} for v in sections.values())
    if smoothing := train.pop("label_smoothing", None):
        values.setdefault("objective", {"name": "label_smoothing", "smoothing": smoothing})
    average = {"name": train.pop("average", "none"), "decay": train.pop("average_decay", None),
               "norm_statistics": train.pop("average_norm_statistics", None)}  # fmt: skip
    if average["name"] != "none":
        values.setdefault("average", {k: v for k, v in average.items() if v is not None})
    mixing = _mixing(data.pop("mixup", 0.0), data.pop("cutmix", 0.0))
    probability = data.pop("mix_probability", None)
    if mixing:
        chosen = {} if probability is None else {"probability": probability}
        values.setdefault("mixing", mixing | chosen)
    for key in [key for key, value in sharpness.items() if value is None]:
        del sharpness[key]  # `every: null` was the rule's default


def _mixing(mixup: float, cutmix: float) -> dict[str, Any] | None:
    if mixup and cutmix:
        return {"name": "mixup_cutmix", "mixup_alpha": mixup, "cutmix_alpha": cutmix}
    if mixup:
        return {"name": "mixup", "alpha": mixup}
    return {"name": "cutmix", "alpha": cutmix} if cutmix else None
