"""What a report tells of the network and the images that were evaluated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flatcal_dist.calibration.comparison.pairing import KnownBy

Setting = float | int | str
SYMBOLS = {"rho": "ρ", "gamma": "γ"}  # how pages write these settings; others go by their keys


@dataclass(frozen=True)
class About:
    """What was evaluated. Every field is optional, and a page leaves out what is not known.

    Args:
        title: The title of the page. Default: model and method.
        model: The name of the network.
        method: How the network was trained, as `config.method_of` names it. None: it is not known.
        settings: The numbers that belong to the method, by key, such as rho and gamma.
        seed: The seed of the training. None: it is not known.
        origin: What was understood of a file of logits, for records that come from one.
        data: The name of the evaluated images.
        data_identity: A hash of the evaluated images. It decides what may be compared. Default: it
            is computed from the records.
        known_by: What the hash was computed from, see `comparison.pairing`.
        class_names: The names of the classes, in the order of their numbers.
        image_size: The side of an image in pixels.
        crop_pct: The share of an image's side that is kept, as in timm. None if images are not cut.
        interpolation: How images are resized, as timm names it.
        parameters: The number of parameters.
        checkpoint: A hash of the weights.
        precision: The number format of the evaluation, such as bf16.
        engine: What shared out the training over ranks, such as ddp.
        world_size: The number of ranks of the evaluation.
        training_seconds: How long the training took.
        versions: The versions of packages, by name.
        configuration: The resolved configuration.
    """

    title: str | None = None
    model: str | None = None
    method: str | None = None
    settings: dict[str, Setting] = field(default_factory=dict)
    seed: int | None = None
    origin: str | None = None
    data: str | None = None
    data_identity: str | None = None
    known_by: KnownBy | None = None
    class_names: list[str] | None = None
    image_size: int | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    parameters: int | None = None
    checkpoint: str | None = None
    precision: str | None = None
    engine: str | None = None
    world_size: int | None = None
    training_seconds: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    configuration: dict[str, Any] = field(default_factory=dict)


def settings_text(settings: Mapping[str, Setting]) -> str:
    """Return settings as a page prints them: `ρ 0.05, γ 1.0, swa.start 0.75`."""
    return ", ".join(f"{SYMBOLS.get(key, key)} {value}" for key, value in settings.items())
