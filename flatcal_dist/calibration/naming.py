"""How metrics are called, explained and judged; one list for report and comparison."""

from dataclasses import dataclass
from typing import Literal

from .display import PERCENT, PLAIN, POINTS, THOUSANDTHS, Unit


@dataclass(frozen=True)
class Metric:
    """A row of the table: key in metrics.json, name, unit, direction, and what it tells."""

    key: str
    name: str
    unit: Unit
    better: Literal["higher", "lower", "zero"] | None
    meaning: str

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓", "zero": "→\u00a00", None: ""}[self.better]

    @property
    def direction(self) -> str:
        """The arrow in words."""
        words = {"zero": "closer to zero is better", None: ""}
        return words.get(self.better, f"{self.better} is better")

    def judge(self, difference: float) -> str:
        """`better` or `worse`; `higher` or `lower` of what is neither."""
        direction = "higher" if difference > 0 else "lower"
        if self.better not in ("higher", "lower"):
            return direction
        return "better" if direction == self.better else "worse"


@dataclass(frozen=True)
class Group:
    name: str
    metrics: tuple[Metric, ...]


GROUPS = (
    Group(
        "Accuracy and proper scores",
        (
            Metric("accuracy", "Accuracy", PERCENT, "higher", "Top-1 share correct."),
            Metric(
                "nll", "NLL", PLAIN, "lower",
                "Negative log-likelihood of the label, nats; rewards accuracy and calibration.",
            ),
            Metric(
                "brier", "Brier score", PLAIN, "lower",
                "Squared error of all class probabilities, 0 to 2.",
            ),
            Metric(
                "top_label_brier", "Brier score of the answer", PLAIN, "lower",
                "Squared error of the confidence alone, 0 to 1.",
            ),
        ),
    ),
    Group(
        "Calibration",
        (
            Metric(
                "signed_gap", "Signed gap", POINTS, "zero",
                "Mean confidence minus accuracy: + over-confident, − under-confident.",
            ),
            Metric(
                "ece", "ECE", PERCENT, "lower",
                "Mean gap between confidence and accuracy over 15 equal-width bins.",
            ),
            Metric("adaptive_ece", "Adaptive ECE", PERCENT, "lower", "Over bins of equal mass."),
            Metric(
                "adaptive_ece_100", "Adaptive ECE, 100 bins", PERCENT, "lower",
                "Finer, and inflated more by chance.",
            ),
            Metric("smooth_ece", "Smooth ECE", PERCENT, "lower", "With a kernel, not bins."),
            Metric(
                "smooth_ece_relplot", "Smooth ECE, relplot's", PERCENT, "lower",
                "As published values: images at confidence 1 count half.",
            ),
            Metric("ks", "KS error", PERCENT, "lower", "Largest cumulative gap; no bins."),
            Metric("rmsce", "RMSCE", PERCENT, "lower", "As ECE; large gaps weigh more."),
            Metric(
                "rmsce_debiased", "RMSCE, debiased", PERCENT, "lower",
                "Less what chance adds; about 0 for a calibrated network.",
            ),
            Metric(
                "corp_miscalibration", "CORP miscalibration", PLAIN, "lower",
                "What the best monotone recalibration would save of the answer's Brier score.",
            ),
            Metric(
                "classwise_ece", "Classwise ECE", PERCENT, "lower",
                "ECE of every class's probability; small by construction with many classes.",
            ),
            Metric(
                "thresholded_classwise_ece", "Classwise ECE, large probabilities", PERCENT,
                "lower", "The same over probabilities above one over the number of classes.",
            ),
            Metric(
                "mce", "MCE", PERCENT, "lower",
                "Largest gap of any bin; often the smallest bin's.",
            ),
        ),
    ),
    Group(
        "Failure prediction",
        (
            Metric(
                "aurc", "AURC × 1000", THOUSANDTHS, "lower",
                "Mean error rate while answering from the most confident image on.",
            ),
            Metric(
                "eaurc", "E-AURC × 1000", THOUSANDTHS, "lower",
                "AURC beyond that of a perfect order at this accuracy.",
            ),
            Metric(
                "naurc", "NAURC", PLAIN, "lower",
                "AURC between that of a perfect order (0) and a random one (1).",
            ),
            Metric(
                "augrc", "AUGRC × 1000", THOUSANDTHS, "lower",
                "Mean share of all images that are answered and wrong.",
            ),
            Metric(
                "auroc", "AUROC", PERCENT, "higher",
                "How often a correct image has more confidence than a wrong one; 50 % is chance.",
            ),
            Metric(
                "fpr_at_95_tpr", "FPR at 95 % TPR", PERCENT, "lower",
                "Wrong images that pass a threshold that keeps 95 % of the correct ones.",
            ),
            Metric(
                "aupr_success", "AUPR success", PERCENT, "higher",
                "Average precision of finding correct images.",
            ),
            Metric(
                "aupr_error", "AUPR error", PERCENT, "higher",
                "Average precision of finding wrong images.",
            ),
            Metric(
                "coverage_at_95_accuracy", "Coverage at 95 % accuracy", PERCENT, "higher",
                "Images answerable at 95 % accuracy, most confident first.",
            ),
            Metric(
                "risk_at_80_coverage", "Risk at 80 % coverage", PERCENT, "lower",
                "Error rate of the four fifths that are most confident.",
            ),
        ),
    ),
    Group(
        "Entropy",
        (
            Metric("mean_entropy", "Entropy", PLAIN, None, "Of the predicted classes, nats."),
            Metric("mean_entropy_correct", "… of correct images", PLAIN, None, ""),
            Metric("mean_entropy_wrong", "… of wrong images", PLAIN, None, ""),
        ),
    ),
)  # fmt: skip
METRICS = {metric.key: metric for group in GROUPS for metric in group.metrics}
