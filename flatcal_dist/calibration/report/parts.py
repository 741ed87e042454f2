"""The parts of `metrics.json` beside the metrics: bins, curves, operating points, classes, errors.

The schema states the limits of numbers. They are not enforced when a report is written, so that no
evaluation is lost by an error of rounding.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from flatcal_dist.calibration.statistics.intervals import Interval

Rate = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1})]
Positive = Annotated[float, WithJsonSchema({"type": "number", "minimum": 0})]
Count = Annotated[int, WithJsonSchema({"type": "integer", "minimum": 0})]
Number = int | float
FEW_FIGURES = (  # of sets of images that have no intervals
    "accuracy", "mean_confidence", "signed_gap", "ece", "nll", "brier", "aurc", "auroc",
)  # fmt: skip


class Part(BaseModel):
    """A part whose attributes are keys of the file. Other keys are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        serialize_by_alias=True,
        json_schema_serialization_defaults_required=True,
    )


class Limits(Part):
    """A 95 % interval. Its ends are null where there is none."""

    low: float | None
    high: float | None


class EceNull(Part):
    """The ECE that a perfectly calibrated network shows with these confidences."""

    mean: Rate
    quantile_95: Rate
    p_value: Rate
    resamples: Count


@dataclass(frozen=True)
class FilledBin:
    """A bin that holds images, see `Bin`."""

    low: float
    high: float
    count: int
    mean_confidence: float
    accuracy: float
    calibrated_low: float
    calibrated_high: float

    @property
    def gap(self) -> float:
        """Mean confidence minus accuracy."""
        return self.mean_confidence - self.accuracy


class Bin(Part):
    """A right-closed bin of confidence.

    A calibrated network shows an accuracy between calibrated_low and calibrated_high in 95 % of
    draws.
    """

    low: Rate
    high: Rate
    count: Count
    mean_confidence: Rate | None
    accuracy: Rate | None
    calibrated_low: Rate | None
    calibrated_high: Rate | None

    def filled(self) -> FilledBin | None:
        """Return the bin with its figures. None if it is empty."""
        confidence, accuracy = self.mean_confidence, self.accuracy
        low, high = self.calibrated_low, self.calibrated_high
        if confidence is None or accuracy is None or low is None or high is None:
            return None
        return FilledBin(self.low, self.high, self.count, confidence, accuracy, low, high)


class SmoothCurve(Part):
    """Accuracy against confidence by a kernel. Each accuracy rests on so many `images`."""

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
    """What is answered, and how well. low and high are the ends of Wilson's interval."""

    coverage: Rate
    images: Count
    wrong: Count
    accuracy: Rate | None
    low: Rate | None
    high: Rate | None


class Costing(Answered):
    """What is answered, and the mean cost per image with its interval."""

    cost: Positive
    cost_low: Positive | None
    cost_high: Positive | None


class ByAccuracy(Part):
    """The largest coverage with an accuracy. Images of this confidence or more are answered."""

    accuracy_wanted: Rate
    coverage: Rate
    confidence: Rate | None
    held_out: Answered


class _At(Part):
    confidence: Rate


class ByThreshold(Answered, _At):
    """What is answered if images of this confidence or more are."""


class _AtCost(_At):
    cost_of_error: Number


class ByCost(Costing, _AtCost):
    """What is answered if a wrong answer costs cost_of_error, and an unanswered image costs 1."""

    held_out: Costing
    cost_of_all: Positive


class OperatingPoints(Part):
    """What is gained by answering only the confident images, see `operating.operating_points`."""

    by_accuracy: list[ByAccuracy]
    by_threshold: list[ByThreshold]
    by_cost: list[ByCost]


class ScoreRow(Part):
    """Failure prediction by one confidence score, and the difference from the first row."""

    name: str
    meaning: str
    source: str
    values: dict[str, Interval]
    difference: dict[str, Interval] | None


class ScoreTable(Part):
    """Confidence scores on the images that no score was tuned on."""

    images: Count
    tuned_on: Count
    power: int | None
    temperature: Positive
    missing: list[str] = []  # names of scores that older records do not hold
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
    """How many images `of` a label got an answer, and how many went `back`, the other way round."""

    label: Count
    answer: Count
    images: Count
    of: Count
    back: Count


class Confusions(Part):
    """Images by class (row) and answer (column), and the most frequent pairs.

    The matrix is null if there are many classes.
    """

    classes: list[Count] | None
    matrix: list[list[Count]] | None
    pairs: list[Confusion]


class ConfidentError(Part):
    """A wrong answer. `consistent`: whether it is a ReaL label; null without ReaL labels."""

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


class FittedTemperature(Part):
    """A temperature, the images that it was fitted on, and a few figures of the evaluated images.

    TS-valid was fitted on training images that were kept apart. The optimum was fitted on the
    evaluated images themselves with their labels, so its figures are no result: nobody can reach
    them without these labels.
    """

    name: Literal["as_trained", "ts_valid", "test_optimum"]
    saw_the_labels: bool
    images: Count
    temperature: Positive
    interval: tuple[float, float] | None
    figures: dict[str, float | None]


class ImagesApart(Part):
    """A few figures, as trained, of training images that were kept apart (`data.holdout`).

    Settings can be chosen by them without the evaluated images.
    """

    images: Count
    figures: dict[str, float | None]


class AllClasses(Part):
    """A few figures of the same images among all classes of the network.

    Only ImageNet-A and -R, which hold images of some classes, have this part.
    """

    classes: Count
    temperature: float
    before: dict[str, float | None]
    after: dict[str, float | None]
