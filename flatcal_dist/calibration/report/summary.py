"""From records to the numbers of `metrics.json`. A number that is undefined is None."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from flatcal_dist.calibration.comparison import pairing
from flatcal_dist.calibration.confidence.of_logits import score_table
from flatcal_dist.calibration.confidence.sources import BY_KEY
from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics.entries import METRICS, STATISTICS
from flatcal_dist.calibration.metrics.entry import Evaluated
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report import curves
from flatcal_dist.calibration.report.about import About
from flatcal_dist.calibration.report.classes import class_numbers, per_class
from flatcal_dist.calibration.report.confident_errors import most_confident_errors
from flatcal_dist.calibration.report.confusions import confusions
from flatcal_dist.calibration.report.literature import references
from flatcal_dist.calibration.report.model import SCHEMA_VERSION, Report
from flatcal_dist.calibration.report.operating import operating_points
from flatcal_dist.calibration.report.parts import FEW_FIGURES
from flatcal_dist.calibration.report.training_curves import training_curves
from flatcal_dist.calibration.shift.rows import real_figures
from flatcal_dist.calibration.softmax import Scores
from flatcal_dist.calibration.statistics.bootstrap import RESAMPLES, Bootstrap, bootstrap
from flatcal_dist.calibration.statistics.intervals import LEVEL
from flatcal_dist.image_identity import data_identity


def summarize(
    records: Records,
    about: About | None = None,
    *,
    all_classes: Records | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    sharpness: Mapping[str, Any] | None = None,
    bins: int = 15,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Report:
    """Compute all numbers of the report. Rates are fractions. NLL and entropy are in nats.

    The top level holds the network as trained. `after_temperature` holds the same keys after
    temperature scaling, and `difference` (after minus before) with paired intervals.

    Args:
        records: The records of the evaluated images.
        about: What was evaluated.
        all_classes: The records among all classes, if `records` are among some of them.
        training: The records of the run's metrics.jsonl.
        sharpness: The keys of `report.sharpness.Sharpness`, if it was measured.
        bins: The number of bins of ECE and related metrics.
        resamples, seed: The number of resamples, and their seed.
    """
    about = _identified(about or About(), records)
    samples = bootstrap([records.before, records.after], resamples, seed, bins)
    before, after = (
        _side(records, which, samples, bins, resamples, seed) for which in ("before", "after")
    )
    after["difference"] = {
        name: asdict(samples.difference(1, 0, name)) for name in STATISTICS if name != "accuracy"
    }
    return Report.model_validate({
        "schema_version": SCHEMA_VERSION,
        "images": len(records),
        "classes": records.classes,
        "top5_accuracy": float((records.rank < 5).mean()) if records.classes >= 5 else None,
        "source": asdict(records.source),
        "real": real_figures(records),
        "all_classes": None if all_classes is None else _all_classes(all_classes),
        **before,
        "temperature": records.temperature,
        "temperature_interval": records.temperature_interval,
        "temperature_folds": list(records.fold_temperatures),
        "temperatures": _temperatures(records, bins),
        "images_apart": _images_apart(records, bins),
        "after_temperature": after,
        "post_hoc": records.post_hoc and records.post_hoc.model_dump(),
        "people": records.people and records.people.model_dump(),
        "scores": _scores(records, resamples, seed),
        "per_class": per_class(records, about.class_names),
        "confusions": confusions(records),
        "confident_errors": most_confident_errors(records),
        "training": training_curves(training),
        "sharpness": sharpness,
        "references": _references(about, records),
        "conventions": _conventions(records, bins, resamples, seed),
        # Paths become text and tuples become lists, so that reading gives back what is returned.
        "about": json.loads(json.dumps(asdict(about), default=str)),
    })  # fmt: skip


def _references(about: About, records: Records) -> list[dict[str, Any]]:
    """Return published figures to compare with, for images that are not under shift."""
    if records.source.temperature_from is not None:
        return []
    return references(about.model, about.data, records.classes, len(records))


def _temperatures(records: Records, bins: int) -> list[dict[str, Any]]:
    """What temperatures do to the images, if one was fitted on images kept apart."""
    if records.optimum is None:
        return []
    source, own = records.source, len(records)
    rows = (
        ("as_trained", 0, 1.0, None, records.before),
        ("ts_valid", records.held_out, records.temperature, records.temperature_interval,
         records.after),
        ("test_optimum", own, source.own_temperature, source.own_temperature_interval,
         records.optimum),
    )  # fmt: skip
    found = []
    for name, images, temperature, interval, scores in rows:
        metrics = point_metrics(scores, bins)
        found.append(
            {
                "name": name,
                "saw_the_labels": name == "test_optimum",
                "images": images,
                "temperature": temperature,
                "interval": interval,
                "figures": {key: metrics[key] for key in FEW_FIGURES},
            }
        )
    return found


def _images_apart(records: Records, bins: int) -> dict[str, Any] | None:
    """A few figures, as trained, of the images that were kept apart."""
    if records.apart is None:
        return None
    metrics = point_metrics(records.apart, bins)
    figures = {key: metrics[key] for key in FEW_FIGURES}
    return {"images": len(records.apart.correct), "figures": figures}


def _all_classes(records: Records) -> dict[str, Any]:
    """A few figures of the same images among all classes of the network."""
    sides = {
        side: {key: point_metrics(getattr(records, side))[key] for key in FEW_FIGURES}
        for side in ("before", "after")
    }
    return {"classes": records.classes, "temperature": records.temperature, **sides}


def _identified(about: About, records: Records) -> About:
    """Add the identity of the images. If it is not known, it follows from their ids and labels."""
    if about.data_identity is not None:
        return replace(about, known_by=about.known_by or "images")
    ids, labels = records.id.tolist(), class_numbers(records)[records.label]
    found = data_identity(ids, labels)
    return replace(about, data_identity=found, known_by=pairing.known_by(ids))


def point_metrics(
    scores: Scores, bins: int = 15, classwise: Mapping[str, float | None] | None = None
) -> dict[str, float | None]:
    """Return every metric of one set of scores, without intervals.

    Args:
        scores: The scores.
        bins: The number of bins of ECE and related metrics.
        classwise: The metrics that need the probabilities of all classes. They are None without it.
    """
    evaluated = Evaluated(scores, bins, classwise or {})
    return {key: metric.value(evaluated) for key, metric in METRICS.items()}


def _side(
    records: Records, which: str, samples: Bootstrap, bins: int, resamples: int, seed: int
) -> dict[str, Any]:
    scores, place = getattr(records, which), ("before", "after").index(which)
    ending = "" if which == "before" else "_after_temperature"
    confidence, correct = scores.confidence, scores.correct
    null = metrics.expected_calibration_error_null(confidence, correct, bins, resamples, seed)
    of_all_classes = {key: records.classwise.get(key + ending) for key in METRICS}
    point = point_metrics(scores, bins, of_all_classes)
    intervals = {name: samples.interval(place, name) for name in STATISTICS}
    return {
        **point,
        "intervals": {name: {"low": i.low, "high": i.high} for name, i in intervals.items()},
        "ece_null": {
            "mean": null.mean,
            "quantile_95": null.quantile_95,
            "p_value": null.p_value,
            "resamples": null.resamples,
        },
        "bins": _bins(confidence, correct, bins, null),
        "smooth_curve": curves.smooth_reliability(confidence, correct, point["smooth_ece"] or 0.0),
        "histogram": curves.confidence_histogram(scores),
        "risk_coverage": curves.risk_coverage(scores),
        "operating_points": operating_points(scores, records.fold),
    }


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


def _scores(records: Records, resamples: int, seed: int) -> dict[str, Any] | None:
    """Failure prediction by all scores, on the images that no score was tuned on."""
    judged = records.compared
    if not judged.any():
        return None
    columns = {
        name: score[judged]
        for name, score in records.ranking.items()
        if not (records.source.probabilities and BY_KEY[name].needs == "logits")
    }
    table = score_table(columns, records.correct[judged], resamples=resamples, seed=seed)
    return {
        "images": int(judged.sum()),
        "tuned_on": records.tuning.images,
        "power": records.tuning.power,
        "temperature": records.tuning.temperature,
        "missing": list(records.missing),
        "rows": [
            {
                "name": row.name,
                "meaning": BY_KEY[row.name].meaning,
                "source": BY_KEY[row.name].source,
                "values": {k: vars(v) for k, v in row.values.items()},
                "difference": row.difference and {k: vars(v) for k, v in row.difference.items()},
            }
            for row in table
        ],
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _conventions(records: Records, bins: int, resamples: int, seed: int) -> dict[str, Any]:
    source = records.source
    if source.temperature_from is not None:
        after = f"scored with the temperature of {source.temperature_from}"
    elif source.fitted_apart:
        after = (
            f"scored with a temperature fitted on {records.held_out} training images that were "
            "not trained on (TS-valid)"
        )
    elif records.held_out:
        after = f"scored with a temperature fitted on {records.held_out} other images"
    else:
        after = "each image scored with the temperature of the other folds"
    return {
        "units": "rates are fractions, NLL and entropy nats; metrics.csv has top1, top5 and their "
        "errors in per cent and param_count in millions, as timm's results files do, and all "
        "numbers of the method in the column settings",
        "logits": "not known; the logarithms of the given probabilities, in float64"
        if source.probabilities
        else f"{records.logits_dtype} as given; all computation is in float64",
        "label_space": "all classes"
        if source.classes is None
        else f"{len(source.classes)} of the network's classes, the others left out before the "
        "softmax",
        "confidence": "largest softmax probability, float64",
        "ranking": "log-confidence in float64, which does not saturate",
        "bins": bins,
        "ece": "equal-width right-closed bins",
        "adaptive_ece": "equal-mass bins, midpoint edges, equal confidences in one bin",
        "mce": "over all bins that hold images",
        "rmsce_debiased": "the square of each bin less what chance adds to it; at least 0",
        "classwise_ece": "mean over classes; thresholded: entries above 1 / number of classes",
        "brier": "sum over all classes, 0 to 2; top_label_brier: from the confidence alone",
        "corp": "top_label_brier = miscalibration - discrimination + uncertainty, isotonic",
        "signed_gap": "mean confidence minus accuracy",
        "ties": "equal scores count in expectation over random order",
        "eaurc": "against the exact optimum of this many images",
        "naurc": "0 for the oracle, 1 for a random order",
        "fpr_at_95_tpr": "positive = correct; smallest rate at TPR >= 95 %",
        "aupr": "average precision",
        "temperature": "minimises NLL on all images that may be fitted on; T > 1: over-confident",
        "after_temperature": after,
        "folds": len(records.fold_temperatures),
        "fold_seed": records.fold_seed,
        "intervals": f"{100 * LEVEL:.0f} %, bootstrap over images. Means have percentiles. Failure "
        "prediction has intervals on a logarithmic or log-odds scale with Student's t. With about "
        "30 wrong images, the intervals of E-AURC, NAURC and AUPR of success hold the truth in 90 "
        "to 95 % of cases. Chance inflates errors of calibration. Their intervals invert a test, "
        "so that they hold the error without chance. They begin at 0 unless calibration is "
        "refuted, and may lie below the value. With few images they hold the truth in 89 to 97 % "
        "of cases",
        "smooth_ece": "by its definition, with a kernel of mass 1 for each image; "
        "smooth_ece_relplot is relplot's value, in which images at confidence 1 have mass 1/2",
        "ece_null": "ECE of a perfectly calibrated network with these confidences",
        "resamples": resamples,
        "seed": seed,
    }
