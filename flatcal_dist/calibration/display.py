"""How metrics are named, explained and printed; shared by report and comparison."""

from dataclasses import dataclass
from typing import Literal

from .statistics import Interval

Unit = Literal["percent", "points", "thousandths", "number"]
UNDEFINED = "not defined"
MINUS = "−"


@dataclass(frozen=True)
class Metric:
    """A row of the table: key in metrics.json, name, unit, direction, and what it tells."""

    key: str
    name: str
    unit: Unit
    better: Literal["higher", "lower", "zero"] | None
    meaning: str


@dataclass(frozen=True)
class Group:
    name: str
    metrics: tuple[Metric, ...]


GROUPS = (
    Group(
        "Accuracy and proper scores",
        (
            Metric("accuracy", "Accuracy", "percent", "higher", "Top-1 share correct."),
            Metric(
                "nll", "NLL", "number", "lower",
                "Negative log-likelihood of the label, nats; rewards accuracy and calibration.",
            ),
            Metric(
                "brier", "Brier score", "number", "lower",
                "Squared error of all class probabilities, 0 to 2.",
            ),
        ),
    ),
    Group(
        "Calibration",
        (
            Metric(
                "signed_gap", "Signed gap", "points", "zero",
                "Mean confidence minus accuracy: + over-confident, − under-confident.",
            ),
            Metric(
                "ece", "ECE", "percent", "lower",
                "Mean gap between confidence and accuracy over 15 equal-width bins.",
            ),
            Metric("adaptive_ece", "Adaptive ECE", "percent", "lower", "Over bins of equal mass."),
            Metric("smooth_ece", "Smooth ECE", "percent", "lower", "With a kernel, not bins."),
            Metric("ks", "KS error", "percent", "lower", "Largest cumulative gap; no bins."),
            Metric("rmsce", "RMSCE", "percent", "lower", "As ECE; large gaps weigh more."),
            Metric(
                "mce", "MCE", "percent", "lower",
                "Largest gap of any bin; often the smallest bin's.",
            ),
        ),
    ),
    Group(
        "Failure prediction",
        (
            Metric(
                "aurc", "AURC × 1000", "thousandths", "lower",
                "Mean error rate while answering from the most confident image on.",
            ),
            Metric(
                "eaurc", "E-AURC × 1000", "thousandths", "lower",
                "AURC beyond that of a perfect order at this accuracy.",
            ),
            Metric(
                "augrc", "AUGRC × 1000", "thousandths", "lower",
                "Mean share of all images that are answered and wrong.",
            ),
            Metric(
                "auroc", "AUROC", "percent", "higher",
                "How often a correct image has more confidence than a wrong one; 50 % is chance.",
            ),
            Metric(
                "fpr_at_95_tpr", "FPR at 95 % TPR", "percent", "lower",
                "Wrong images that pass a threshold that keeps 95 % of the correct ones.",
            ),
            Metric(
                "aupr_success", "AUPR success", "percent", "higher",
                "Average precision of finding correct images.",
            ),
            Metric(
                "aupr_error", "AUPR error", "percent", "higher",
                "Average precision of finding wrong images.",
            ),
            Metric(
                "coverage_at_95_accuracy", "Coverage at 95 % accuracy", "percent", "higher",
                "Images answerable at 95 % accuracy, most confident first.",
            ),
        ),
    ),
    Group(
        "Entropy",
        (
            Metric("mean_entropy", "Entropy", "number", None, "Of the predicted classes, nats."),
            Metric("mean_entropy_correct", "… of correct images", "number", None, ""),
            Metric("mean_entropy_wrong", "… of wrong images", "number", None, ""),
        ),
    ),
)  # fmt: skip
METRICS = {metric.key: metric for group in GROUPS for metric in group.metrics}
ARROWS = {"higher": ("↑", "higher is better"), "lower": ("↓", "lower is better")} | {
    "zero": ("→\u00a00", "closer to zero is better"),
    None: ("", ""),
}


def percent(value: float | None, decimals: int = 2) -> str:
    """A fraction as per cent, `84.25 %`."""
    return UNDEFINED if value is None else f"{number(100 * value, decimals)} %"


def number(value: float | None, decimals: int = 3, sign: bool = False) -> str:
    """A number with a true minus sign and no minus zero."""
    if value is None:
        return UNDEFINED
    text = f"{abs(value):,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        return text
    return (MINUS if value < 0 else "+" if sign else "") + text


def show(value: float | None, unit: Unit, *, sign: bool = False) -> str:
    """A value in its unit; `points` are signed percentage points."""
    if value is None:
        return UNDEFINED
    if unit == "percent":
        return number(100 * value, 2, sign) + (" points" if sign else " %")
    if unit == "points":
        return number(100 * value, 2, sign=True) + " points"
    return (
        number(1000 * value, 1, sign)
        if unit == "thousandths"
        else number(value, 4 if sign else 3, sign)
    )


def show_interval(interval: Interval, unit: Unit, *, sign: bool = False) -> str | None:
    """`83.1 to 85.2`, without the unit; None when undefined."""
    if interval.low is None:
        return None
    low, high = (
        show(v, unit, sign=sign).removesuffix(" %").removesuffix(" points")
        for v in (interval.low, interval.high)
    )
    return f"{low} to {high}"


def points(value: float, *others: float | None) -> tuple[str, ...]:
    """Percentage points to one decimal, two where one would hide the sign of any of them."""
    values = [value, *(o for o in others if o is not None)]
    decimals = 2 if min(abs(v) for v in values) < 0.001 else 1
    return tuple(number(100 * v, decimals) for v in values)


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `12 min`, `48 s`."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
