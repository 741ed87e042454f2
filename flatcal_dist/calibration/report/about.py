"""What a report tells of the network and the images that were evaluated."""

from dataclasses import dataclass, field
from typing import Any

from flatcal_dist.calibration.comparison.pairing import KnownBy


@dataclass(frozen=True)
class About:
    """What was evaluated. Everything is optional; what is not given is not shown.

    parameters: their number. crop_pct and interpolation as timm names them. checkpoint: hash of
    the weights. method, seed: of the training; None where a network comes from elsewhere and they
    are not known. data: name of the evaluated images; data_identity: a hash of them, which decides
    what may be compared, over what known_by says (see `pairing`); both are found from the records
    where they are not given. origin: of records that come from a file, what was understood of it.
    configuration: the resolved one.
    """

    title: str | None = None
    model: str | None = None
    method: str | None = None
    rho: float | None = None
    gamma: float | None = None
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
