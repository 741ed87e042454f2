"""The name that users import failure-prediction metrics by; they live in `metrics.selective`."""

from flatcal_dist.calibration.metrics.selective import (
    augrc,
    aupr_error,
    aupr_success,
    aurc,
    auroc,
    coverage_at_risk,
    eaurc,
    fpr_at_95_tpr,
    naurc,
    risk_at_coverage,
    risk_coverage_curve,
    threshold_at_risk,
)

__all__ = [
    "augrc",
    "aupr_error",
    "aupr_success",
    "aurc",
    "auroc",
    "coverage_at_risk",
    "eaurc",
    "fpr_at_95_tpr",
    "naurc",
    "risk_at_coverage",
    "risk_coverage_curve",
    "threshold_at_risk",
]
