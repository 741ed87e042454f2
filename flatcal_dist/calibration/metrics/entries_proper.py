"""The entries of accuracy, proper scores and entropy."""

import numpy as np

from flatcal_dist.calibration.metrics.calibration_errors import top_label_brier_score
from flatcal_dist.calibration.metrics.entry import Evaluated, Metric
from flatcal_dist.calibration.pages.display import PERCENT, PLAIN
from flatcal_dist.calibration.statistics.resampled import Accuracy, Function

PROPER_SCORES = (
    Metric(
        "accuracy", "Accuracy", PERCENT, "higher", "Top-1 share correct.",
        value=lambda e: float(e.correct.mean()),
        statistic=Accuracy(),
        compared=True,
        running=lambda s: s.correct / s.images,
    ),
    Metric(
        "nll", "NLL", PLAIN, "lower",
        "Negative log-likelihood of the label, nats; rewards accuracy and calibration.",
        value=lambda e: float(e.scores.column("nll").mean()),
        statistic=Function(lambda s: s.mean("nll"), of_outcomes=False),
        source="Good, Rational decisions (JRSS B 1952)",
        limits=(0.0, None),
        compared=True,
        running=lambda s: s.nll / s.images,
    ),
    Metric(
        "brier", "Brier score", PLAIN, "lower",
        "Squared error of all class probabilities, 0 to 2.",
        value=lambda e: float(e.scores.column("brier").mean()),
        statistic=Function(lambda s: s.mean("brier"), of_outcomes=False),
        source="Brier (1950)",
        limits=(0.0, 2.0),
        compared=True,
        running=lambda s: s.brier / s.images,
    ),
    Metric(
        "top_label_brier", "Brier score of the answer", PLAIN, "lower",
        "Squared error of the confidence alone, 0 to 1.",
        value=lambda e: top_label_brier_score(e.confidence, e.correct),
        statistic=Function(lambda s: s.mean("squared_gap")),
        source="Brier (1950)",
    ),
    Metric(
        "corp_discrimination", "CORP discrimination", PLAIN, "higher",
        "How much the recalibrated confidence lowers the answer's Brier score, against a constant.",
        value=lambda e: e.corp.discrimination,
        source="Dimitriadis, Gneiting and Jordan (PNAS 2021)",
        listed=False,
    ),
    Metric(
        "corp_uncertainty", "CORP uncertainty", PLAIN, None,
        "The answer's Brier score if every confidence were the accuracy.",
        value=lambda e: e.corp.uncertainty,
        source="Dimitriadis, Gneiting and Jordan (PNAS 2021)",
        listed=False,
    ),
)  # fmt: skip


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _share(total: float, count: float) -> float | None:
    return total / count if count else None


def _tied_share(e: Evaluated) -> float:
    _, counts = np.unique(e.scores.log_confidence, return_counts=True)
    return float(counts[counts > 1].sum() / len(e.correct))


ENTROPIES = (
    Metric(
        "mean_entropy", "Entropy", PLAIN, None, "Mean entropy of the predicted classes, nats.",
        value=lambda e: float(e.scores.column("entropy").mean()),
        statistic=Function(lambda s: s.mean("entropy"), of_outcomes=False),
        limits=(0.0, None),
        running=lambda s: s.entropy / s.images,
    ),
    Metric(
        "mean_entropy_correct", "… of correct images", PLAIN, None, "",
        value=lambda e: _mean(e.scores.column("entropy")[e.correct]),
        statistic=Function(lambda s: s.entropy_of(correct=True), of_outcomes=False),
        limits=(0.0, None), may_lack=True,
        running=lambda s: _share(s.entropy_correct, s.correct),
    ),
    Metric(
        "mean_entropy_wrong", "… of wrong images", PLAIN, None, "",
        value=lambda e: _mean(e.scores.column("entropy")[~e.correct]),
        statistic=Function(lambda s: s.entropy_of(correct=False), of_outcomes=False),
        limits=(0.0, None), may_lack=True,
        running=lambda s: _share(s.entropy - s.entropy_correct, s.images - s.correct),
    ),
    Metric(
        "tied_images", "Tied images", PERCENT, None,
        "Share of the images whose confidence equals that of another image.",
        value=_tied_share,
        listed=False,
    ),
)  # fmt: skip
