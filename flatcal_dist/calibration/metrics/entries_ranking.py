"""The entries of failure prediction: how well confidence separates right answers from wrong."""

import numpy as np

from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.entry import Evaluated, Metric
from flatcal_dist.calibration.pages.display import PERCENT, PLAIN, THOUSANDTHS
from flatcal_dist.calibration.statistics.resampled import Coverage, Ranking, Risk


def _confidence_at_95_accuracy(e: Evaluated) -> float | None:
    threshold = selective.threshold_at_risk(e.scores.log_confidence, e.correct, 0.05)
    return None if threshold is None else float(np.exp(threshold))


FAILURE_PREDICTION = (
    Metric(
        "aurc", "AURC × 1000", THOUSANDTHS, "lower",
        "Mean error rate while answering from the most confident image on.",
        value=lambda e: selective.groups_aurc(e.groups),
        statistic=Ranking(selective.groups_aurc, "logarithm"),
        source="Geifman et al. (ICLR 2019), section 3",
        compared=True,
        running=lambda s: selective.groups_aurc(s.groups),
    ),
    Metric(
        "eaurc", "E-AURC × 1000", THOUSANDTHS, "lower",
        "AURC beyond that of a perfect order at this accuracy.",
        value=lambda e: selective.groups_eaurc(e.groups),
        statistic=Ranking(selective.groups_eaurc, "logarithm"),
        source="Geifman et al. (ICLR 2019), equation 2, with the exact optimum",
        limits=(None, None),
        running=lambda s: selective.groups_eaurc(s.groups),
    ),
    Metric(
        "naurc", "NAURC", PLAIN, "lower",
        "AURC between that of a perfect order (0) and a random one (1).",
        value=lambda e: selective.groups_naurc(e.groups),
        statistic=Ranking(selective.groups_naurc, "logarithm"),
        source="Cattelan and Silva (UAI 2024), equation 9",
        limits=(None, None), may_lack=True,
    ),
    Metric(
        "augrc", "AUGRC × 1000", THOUSANDTHS, "lower",
        "Mean share of all images that are answered and wrong.",
        value=lambda e: selective.groups_augrc(e.groups),
        statistic=Ranking(selective.groups_augrc, "logarithm"),
        source="Traub et al. (NeurIPS 2024), section 4",
        running=lambda s: selective.groups_augrc(s.groups),
    ),
    Metric(
        "auroc", "AUROC", PERCENT, "higher",
        "How often a correct image has more confidence than a wrong one; 50 % is chance.",
        value=lambda e: selective.groups_auroc(e.groups),
        statistic=Ranking(selective.groups_auroc, "log-odds"),
        source="Hendrycks and Gimpel (ICLR 2017), section 2",
        may_lack=True, compared=True,
        running=lambda s: selective.groups_auroc(s.groups),
    ),
    Metric(
        "fpr_at_95_tpr", "FPR at 95 % TPR", PERCENT, "lower",
        "Wrong images that pass a threshold that keeps 95 % of the correct ones.",
        value=lambda e: selective.groups_fpr_at_95_tpr(e.groups),
        statistic=Ranking(selective.groups_fpr_at_95_tpr, "log-odds"),
        source="Liang et al. (ICLR 2018), section 4",
        may_lack=True,
    ),
    Metric(
        "aupr_success", "AUPR success", PERCENT, "higher",
        "Average precision of finding correct images.",
        value=lambda e: selective.groups_aupr_success(e.groups),
        statistic=Ranking(selective.groups_aupr_success, "log-odds"),
        source="Hendrycks and Gimpel (ICLR 2017), section 2",
        may_lack=True,
    ),
    Metric(
        "aupr_error", "AUPR error", PERCENT, "higher",
        "Average precision of finding wrong images.",
        value=lambda e: selective.groups_aupr_error(e.groups),
        statistic=Ranking(selective.groups_aupr_error, "log-odds"),
        source="Hendrycks and Gimpel (ICLR 2017), section 2",
        may_lack=True,
    ),
    Metric(
        "aupr_success_trapezoid", "AUPR success, trapezoids", PERCENT, "higher",
        "AUPR success as several papers print it.",
        value=lambda e: selective.aupr_success(
            e.scores.log_confidence, e.correct, "trapezoid"
        ),
        may_lack=True, listed=False,
    ),
    Metric(
        "eaurc_continuous", "E-AURC × 1000, continuous optimum", THOUSANDTHS, "lower",
        "E-AURC as papers print it.",
        value=lambda e: selective.eaurc(e.scores.log_confidence, e.correct, "continuous"),
        source="Geifman et al. (ICLR 2019), equation 2",
        limits=(None, None), listed=False,
    ),
    Metric(
        "coverage_at_95_accuracy", "Coverage at 95 % accuracy", PERCENT, "higher",
        "Images answerable at 95 % accuracy, most confident first.",
        value=lambda e: selective.groups_coverage_at_risk(e.groups, 0.05),
        statistic=Coverage(0.05),
        source="Geifman and El-Yaniv (NeurIPS 2017)",
    ),
    Metric(
        "coverage_at_99_accuracy", "Coverage at 99 % accuracy", PERCENT, "higher",
        "Images answerable at 99 % accuracy, most confident first.",
        value=lambda e: selective.groups_coverage_at_risk(e.groups, 0.01),
        statistic=Coverage(0.01),
        source="Geifman and El-Yaniv (NeurIPS 2017)",
        listed=False,
    ),
    Metric(
        "confidence_at_95_accuracy", "Confidence at 95 % accuracy", PERCENT, None,
        "The confidence from which on images are answered at 95 % accuracy.",
        value=_confidence_at_95_accuracy,
        may_lack=True, listed=False,
    ),
    Metric(
        "risk_at_80_coverage", "Risk at 80 % coverage", PERCENT, "lower",
        "Error rate of the four fifths that are most confident.",
        value=lambda e: selective.groups_risk_at_coverage(e.groups, 0.8),
        statistic=Risk(0.8),
        source="El-Yaniv and Wiener (JMLR 2010)",
    ),
)  # fmt: skip
