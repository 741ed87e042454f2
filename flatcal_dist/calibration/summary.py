"""From records to the numbers of `metrics.json`: plain JSON, None where undefined."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import metrics, selective
from .records import Records, Scores
from .shift import real_figures
from .statistics import LEVEL, MEANS, RESAMPLES, Bootstrap, Interval, bootstrap

SCHEMA_VERSION = 1
CURVE_POINTS = 500
DIFFERENCES = ("nll", "brier", "ece", "signed_gap", "aurc", "auroc")


@dataclass(frozen=True)
class About:
    """What was evaluated. Everything is optional; what is not given is not shown.

    parameters: their number. crop_pct and interpolation as timm names them. checkpoint: hash of
    the weights. data: name and identity of the evaluated images. configuration: the resolved one.
    """

    title: str | None = None
    model: str | None = None
    method: str | None = None
    rho: float | None = None
    gamma: float | None = None
    seed: int | None = None
    data: str | None = None
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


def summarize(
    records: Records,
    about: About | None = None,
    *,
    bins: int = 15,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of the report. Rates are fractions, NLL and entropy nats.

    The top level holds the network as it is; `after_temperature` the same keys after cross-fitted
    temperature scaling, and `difference` (after minus before) with paired intervals.
    """
    samples = bootstrap([records.before, records.after], resamples, seed, bins)
    before, after = (
        _side(scores, samples, which, bins, resamples, seed)
        for which, scores in enumerate((records.before, records.after))
    )
    after["difference"] = {name: asdict(samples.difference(1, 0, name)) for name in DIFFERENCES}
    top5 = float((records.rank < 5).mean()) if records.classes >= 5 else None
    return {
        "schema_version": SCHEMA_VERSION,
        "images": len(records),
        "classes": records.classes,
        "top5_accuracy": top5,
        "source": asdict(records.source),
        "real": real_figures(records),
        **before,
        "temperature": records.temperature,
        "temperature_folds": list(records.fold_temperatures),
        "after_temperature": after,
        "conventions": _conventions(records, bins, resamples, seed),
        # Paths and such become text, tuples lists: what is returned is what is read again.
        "about": json.loads(json.dumps(asdict(about or About()), default=str)),
    }


def _side(
    scores: Scores, samples: Bootstrap, which: int, bins: int, resamples: int, seed: int
) -> dict[str, Any]:
    confidence, correct, rank_by = scores.confidence, scores.correct, scores.log_confidence
    intervals = {
        name: asdict(samples.interval(which, name)) for name in (*MEANS, *selective_names())
    }
    point = {name: interval["value"] for name, interval in intervals.items()}
    null = metrics.expected_calibration_error_null(confidence, correct, bins, resamples, seed)
    return {
        "accuracy": point["accuracy"],
        "nll": point["nll"],
        "brier": point["brier"],
        "ece": metrics.expected_calibration_error(confidence, correct, bins),
        "adaptive_ece": metrics.adaptive_calibration_error(confidence, correct, bins),
        "mce": metrics.maximum_calibration_error(confidence, correct, bins),
        "rmsce": metrics.root_mean_square_calibration_error(confidence, correct, bins),
        "ks": metrics.kolmogorov_smirnov_error(confidence, correct),
        "smooth_ece": metrics.smooth_calibration_error(confidence, correct),
        "signed_gap": point["signed_gap"],
        "mean_confidence": float(confidence.mean()),
        **{name: point[name] for name in selective_names()},
        "aupr_success_trapezoid": selective.aupr_success(rank_by, correct, "trapezoid"),
        "eaurc_continuous": selective.eaurc(rank_by, correct, "continuous"),
        "coverage_at_95_accuracy": selective.coverage_at_risk(rank_by, correct, 0.05),
        "coverage_at_99_accuracy": selective.coverage_at_risk(rank_by, correct, 0.01),
        "confidence_at_95_accuracy": _exponential(
            selective.threshold_at_risk(rank_by, correct, 0.05)
        ),
        "risk_at_80_coverage": selective.risk_at_coverage(rank_by, correct, 0.8),
        "mean_entropy": point["mean_entropy"],
        "mean_entropy_correct": _mean(scores.entropy[correct]),
        "mean_entropy_wrong": _mean(scores.entropy[~correct]),
        "tied_images": _tied_share(rank_by),
        "intervals": {n: {"low": v["low"], "high": v["high"]} for n, v in intervals.items()},
        "ece_null": {
            "mean": null.mean,
            "quantile_95": null.quantile_95,
            "p_value": null.p_value,
            "resamples": null.resamples,
        },
        "bins": _bins(confidence, correct, bins, null),
        "risk_coverage": _curve(scores),
    }


def selective_names() -> tuple[str, ...]:
    """The failure-prediction metrics, in the order of the report."""
    return ("aurc", "eaurc", "augrc", "auroc", "fpr_at_95_tpr", "aupr_success", "aupr_error")


def _bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int, null: metrics.CalibrationNull
) -> list[dict[str, Any]]:
    table = metrics.reliability_bins(confidence, correct, bins)
    return [
        {
            "low": float(table.edges[m]),
            "high": float(table.edges[m + 1]),
            "count": int(table.count[m]),
            "mean_confidence": _number(table.mean_confidence[m]),
            "accuracy": _number(table.accuracy[m]),
            "calibrated_low": _number(null.low[m]),
            "calibrated_high": _number(null.high[m]),
        }
        for m in range(bins)
    ]


def _curve(scores: Scores) -> dict[str, list[float]]:
    coverage, risk = selective.risk_coverage_curve(scores.log_confidence, scores.correct)
    if len(coverage) > CURVE_POINTS:
        keep = np.unique(np.round(np.linspace(0, len(coverage) - 1, CURVE_POINTS)).astype(int))
        coverage, risk = coverage[keep], risk[keep]
    return {"coverage": coverage.tolist(), "risk": risk.tolist()}


def _tied_share(score: np.ndarray) -> float:
    """Share of the images whose score another image has too."""
    _, counts = np.unique(score, return_counts=True)
    return float(counts[counts > 1].sum() / len(score))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _exponential(value: float | None) -> float | None:
    return None if value is None else float(np.exp(value))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def interval_of(side: dict[str, Any], name: str) -> Interval:
    """The interval of one metric of a side of `metrics.json`."""
    limits = side["intervals"].get(name, {"low": None, "high": None})
    return Interval(side[name], limits["low"], limits["high"])


def _conventions(records: Records, bins: int, resamples: int, seed: int) -> dict[str, Any]:
    return {
        "units": "rates are fractions, NLL and entropy nats; metrics.csv has top1, top5 and their "
        "errors in per cent and param_count in millions, as timm's results files do",
        "confidence": "largest softmax probability, float64",
        "ranking": "log-confidence in float64, which does not saturate",
        "bins": bins,
        "ece": "equal-width right-closed bins",
        "adaptive_ece": "equal-mass bins, midpoint edges, equal confidences in one bin",
        "mce": "over all bins that hold images",
        "brier": "sum over all classes, 0 to 2",
        "signed_gap": "mean confidence minus accuracy",
        "ties": "equal scores count in expectation over random order",
        "eaurc": "against the exact optimum of this many images",
        "fpr_at_95_tpr": "positive = correct; smallest rate at TPR >= 95 %",
        "aupr": "average precision",
        "temperature": "minimises NLL on all images; T > 1 means over-confident",
        "after_temperature": "each image scored with the temperature of the other folds",
        "folds": len(records.fold_temperatures),
        "fold_seed": records.fold_seed,
        "intervals": f"{100 * LEVEL:.0f} % percentile bootstrap over images",
        "ece_null": "ECE of a perfectly calibrated network with these confidences",
        "resamples": resamples,
        "seed": seed,
    }
