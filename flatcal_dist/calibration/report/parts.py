"""The parts of `metrics.json` beside the metrics: bins, curves, operating points, classes, errors.

A limit of a number stands in the schema and is not enforced when a report is written: an evaluation
must not be lost to an error of rounding.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from flatcal_dist.calibration.statistics.intervals import Interval

Rate = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
Positive = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0})]
Count = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
Number = int | float


class Part(BaseModel):
    """Attributes are keys of the file; others are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        serialize_by_alias=True,
        json_schema_serialization_defaults_required=True,
    )


class Limits(Part):
    """95 % interval; null where undefined."""

    low: float | None
    high: float | None


class EceNull(Part):
    """ECE of a perfectly calibrated network with these confidences."""

    mean: Rate
    quantile_95: Rate
    p_value: Rate
    resamples: Count


class Bin(Part):
    """A right-closed bin of confidence.

    calibrated_low, calibrated_high: the central 95 % of accuracies of a calibrated network.
    """

    low: Rate
    high: Rate
    count: Count
    mean_confidence: Rate | None
    accuracy: Rate | None
    calibrated_low: Rate | None
    calibrated_high: Rate | None


class SmoothCurve(Part):
    """Accuracy against confidence by a kernel; images: how many each accuracy rests on."""

    width: Positive
    confidence: list[Rate]
    images: list[Positive]
    accuracy: list[Rate | None]
    calibrated_low: list[Rate | None]
    calibrated_high: list[Rate | None]


class Histogram(Part):
    """Correct and wrong images by confidence, and the mean confidence of each."""

    edges: list[Rate]
    correct: list[Count]
    wrong: list[Count]
    mean_correct: Rate | None
    mean_wrong: Rate | None


class RiskCoverage(Part):
    """The risk-coverage curve."""

    coverage: list[Rate]
    risk: list[Rate]


class Answered(Part):
    """What is answered, and how well; low and high: Wilson's interval of the accuracy."""

    coverage: Rate
    images: Count
    wrong: Count
    accuracy: Rate | None
    low: Rate | None
    high: Rate | None


class Costing(Answered):
    """What is answered, and the mean cost of an image with its interval."""

    cost: Positive
    cost_low: Positive | None
    cost_high: Positive | None


class ByAccuracy(Part):
    """The largest coverage of an accuracy; confidence: from which on images are answered."""

    accuracy_wanted: Rate
    coverage: Rate
    confidence: Rate | None
    held_out: Answered


class _At(Part):
    confidence: Rate


class ByThreshold(Answered, _At):
    """What is answered from a confidence on."""


class _AtCost(_At):
    cost_of_error: Number


class ByCost(Costing, _AtCost):
    """A wrong answer costs cost_of_error, an image left to a person 1."""

    held_out: Costing
    cost_of_all: Positive


class OperatingPoints(Part):
    """What answering only the confident images gives, see `operating.operating_points`."""

    by_accuracy: list[ByAccuracy]
    by_threshold: list[ByThreshold]
    by_cost: list[ByCost]


class ScoreRow(Part):
    """Failure prediction by one confidence score; difference: from that of the first row."""

    name: str
    meaning: str
    source: str
    values: dict[str, Interval]
    difference: dict[str, Interval] | None


class ScoreTable(Part):
    """Confidence scores on the images that none was tuned on."""

    images: Count
    tuned_on: Count
    power: int | None
    temperature: Positive
    missing: list[str] = []  # names of scores that the records do not hold
    rows: list[ScoreRow]


class PerClass(Part):
    """Columns over the classes that have images, see `classes.per_class`."""

    number: list[Count] = Field(alias="class")
    name: list[str | None]
    images: list[Count]
    correct: list[Count]
    accuracy: list[Rate]
    mean_confidence: list[Rate]
    signed_gap: list[float]
    gap_low: list[float]
    gap_high: list[float]
    nll: list[Positive]
    answers: list[Count]
    precision: list[Rate | None]
    confused_with: list[int | None]
    confused_images: list[Count]
    confused_share: list[Rate]


class Confusion(Part):
    """How many of a label's images got an answer, and back: how many the other way round."""

    label: Count
    answer: Count
    images: Count
    of: Count
    back: Count


class Confusions(Part):
    """Images by class (row) and answer (column), null for many classes; the most frequent pairs."""

    classes: list[Count] | None
    matrix: list[list[Count]] | None
    pairs: list[Confusion]


class ConfidentError(Part):
    """A wrong answer; consistent: is it among the ReaL labels, null where there are none."""

    id: str
    label: Count
    answer: Count
    confidence: Rate
    confidence_after_temperature: Rate
    label_probability: Rate
    consistent: bool | None


class Reference(Part):
    """Published figures."""

    data: str
    network: str
    method: str
    source: str
    accuracy: Positive | None
    nll: Positive | None
    brier: Positive | None
    ece: Positive | None
    adaptive_ece: Positive | None
    nll_after_temperature: Positive | None
    ece_after_temperature: Positive | None
    aurc: Positive | None
    auroc: Positive | None
    fpr_at_95_tpr: Positive | None


class AllClasses(Part):
    """A few figures of the same images among all classes of the network (ImageNet-A and -R)."""

    classes: Count
    temperature: float
    before: dict[str, float | None]
    after: dict[str, float | None]
