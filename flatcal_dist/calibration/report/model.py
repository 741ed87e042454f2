"""`metrics.json` as a model, through which a report is built, written and read.

Its metrics follow from `entries`. `python -m flatcal_dist.calibration.report.model` writes the JSON
schema, metrics.schema.json.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, WithJsonSchema, create_model, field_validator
from pydantic.json_schema import GenerateJsonSchema, JsonDict

from flatcal_dist.calibration.after_training.parts import PostHoc
from flatcal_dist.calibration.after_training.people import AgainstPeople
from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.metrics.entry import Metric
from flatcal_dist.calibration.records.records import Source
from flatcal_dist.calibration.report.about import About
from flatcal_dist.calibration.report.parts import (
    AllClasses,
    Bin,
    ConfidentError,
    Confusions,
    Count,
    EceNull,
    FilledBin,
    FittedTemperature,
    Histogram,
    ImagesApart,
    Limits,
    Number,
    OperatingPoints,
    Part,
    PerClass,
    Positive,
    Reference,
    RiskCoverage,
    ScoreTable,
    SmoothCurve,
)
from flatcal_dist.calibration.report.sharpness import Sharpness
from flatcal_dist.calibration.statistics.intervals import Interval
from flatcal_dist.files import write_json

SCHEMA_VERSION = 3
SCHEMA = Path(__file__).with_name("metrics.schema.json")


def _field(metric: Metric) -> tuple[Any, Any]:
    """The type and default of a metric's key. A file older than the metric lacks the key."""
    names = ("minimum", "maximum")
    limits = {k: v for k, v in zip(names, metric.limits, strict=True) if v is not None}
    kind: Any = Annotated[float, WithJsonSchema({"type": "number"} | limits)]
    parts = (metric.name.replace("… of", "Entropy of"), metric.meaning, metric.source)
    described = ". ".join(part.rstrip(".") for part in parts if part) + "."
    return (
        kind | None if metric.may_lack else kind,
        Field(None, description=described, json_schema_extra=_without_default),
    )


def _without_default(schema: JsonDict) -> None:
    schema.pop("default")


if TYPE_CHECKING:

    class Figures(Part):
        """What a type checker sees of the metrics: those that code names."""

        accuracy: float
        nll: float
        mean_confidence: float
        signed_gap: float
        ece: float
        aurc: float
        auroc: float | None
        coverage_at_95_accuracy: float
        confidence_at_95_accuracy: float | None
else:
    Figures = create_model(
        "Figures",
        __base__=Part,
        __doc__="Every metric, by its key.",
        **{key: _field(metric) for key, metric in METRICS.items()},
    )


class Side(Figures):
    """The figures of one set of scores: as trained, or after temperature scaling."""

    intervals: dict[str, Limits]
    ece_null: EceNull
    bins: list[Bin]
    smooth_curve: SmoothCurve
    histogram: Histogram
    risk_coverage: RiskCoverage
    operating_points: OperatingPoints

    def value(self, key: str) -> float | None:
        """Return a metric. None if it is undefined, or if the file is older than the metric."""
        if key not in METRICS:
            raise KeyError(key)
        found: float | None = getattr(self, key)
        return found

    def interval(self, key: str) -> Interval:
        """Return a metric with its interval, whose ends are None if there is no interval."""
        limits = self.intervals.get(key)
        if limits is None:
            return Interval(self.value(key), None, None)
        return Interval(self.value(key), limits.low, limits.high)

    def filled_bins(self) -> list[FilledBin]:
        """Return the bins that hold images."""
        return [filled for filled in map(Bin.filled, self.bins) if filled is not None]


class AfterTemperature(Side):
    """The figures after temperature scaling.

    `difference` is after minus before, paired over images.
    """

    difference: dict[str, Interval]


class _Head(Part):
    """The keys that stand before the metrics."""

    schema_version: Literal[3]
    images: Count
    classes: Count
    top5_accuracy: float | None
    source: Source
    real: dict[str, Number | None] | None = Field(
        description="figures for which any ReaL label of an image counts as correct"
    )
    all_classes: AllClasses | None


class Report(Side, _Head):
    """The metrics.json of a calibration report.

    Rates are fractions. NLL and entropy are in nats. What is undefined is null. The top level holds
    the network as trained. `conventions` says how each number is defined.
    """

    temperature: Positive
    temperature_interval: tuple[float, float] | None
    temperature_folds: list[Positive | None]
    temperatures: list[FittedTemperature] = Field(
        [], description="where images were kept apart (data.holdout): how temperatures compare"
    )
    images_apart: ImagesApart | None = Field(
        None, description="the network as trained on images kept apart; null where there are none"
    )
    after_temperature: AfterTemperature
    post_hoc: PostHoc | None = Field(
        None, description="calibrators and conformal sets; null without logits"
    )
    people: AgainstPeople | None = Field(
        None, description="against people's answers (`flatcal evaluate --people`); null without"
    )
    scores: ScoreTable | None
    per_class: PerClass
    confusions: Confusions
    confident_errors: list[ConfidentError]
    training: dict[str, list[Number | None]] | None = Field(
        description="one column per figure, with a value per validated epoch; null without a log"
    )
    sharpness: Sharpness | None = Field(
        None, description="null where it was not measured (`flatcal evaluate --sharpness`)"
    )
    references: list[Reference]
    conventions: dict[str, Any]
    about: About

    SIDES: ClassVar = ("before", "after")

    @field_validator("about", mode="before")
    @classmethod
    def _with_settings(cls, about: Any) -> Any:
        """Move rho and gamma of a file of an earlier version to the settings."""
        if not isinstance(about, dict) or not {"rho", "gamma"} & about.keys():
            return about
        rest = dict(about)
        older = {key: rest.pop(key, None) for key in ("rho", "gamma")}
        moved = {key: value for key, value in older.items() if value is not None}
        return rest | {"settings": moved | rest.get("settings", {})}

    def side(self, name: str) -> Side:
        """Return the figures `before` temperature scaling, or `after` it."""
        sides: dict[str, Side] = {"before": self, "after": self.after_temperature}
        return sides[name]

    def difference(self, key: str) -> Interval | None:
        """Return how temperature scaling changes a metric. None if this was not tested."""
        return self.after_temperature.difference.get(key)

    def as_json(self) -> dict[str, Any]:
        """Return what metrics.json holds."""
        return self.model_dump(mode="json")


def read_metrics(path: Path) -> Report:
    """Read a metrics.json, also one of an earlier version of this package with fewer metrics.

    ValueError in one line for a file that is damaged or has another schema version.
    """
    try:
        m = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(m, dict):
            raise ValueError("it holds no keys and values")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate the run again") from None
    version = m.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, expected {SCHEMA_VERSION}; "
            "evaluate the run again"
        )
    try:
        return Report.model_validate(m)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"this version cannot read {path}: {key}: {first['msg']} "
            f"({error.error_count()} such keys); evaluate the run again"
        ) from None


class _Untitled(GenerateJsonSchema):
    """A schema without titles, which would repeat each key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema() -> dict[str, Any]:
    """Return the JSON schema of what a report writes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Report.model_json_schema(mode="serialization", schema_generator=_Untitled),
    }


if __name__ == "__main__":
    write_json(SCHEMA, schema())
