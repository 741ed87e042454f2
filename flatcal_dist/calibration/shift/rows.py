"""What is measured on one set of images under shift: its ROW of shift.json, see `report`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.metrics.entry import Evaluated
from flatcal_dist.calibration.records.records import Records, Scores
from flatcal_dist.calibration.statistics.bootstrap import RESAMPLES, Bootstrap, bootstrap
from flatcal_dist.calibration.statistics.intervals import LEVEL, ROUNDING, proportion_interval

FIGURES = (
    "accuracy", "mean_confidence", "signed_gap", "ece", "nll", "brier", "aurc", "eaurc", "augrc",
    "auroc", "mean_entropy",
)  # fmt: skip
OF_THE_LABEL = ("nll", "brier", "mean_entropy")  # ReaL labels do not define these
OF_A_SUBSET = 200  # resamples for each of ImageNet-C's many subsets: 50,000 images take 3 s
SIDES = ("before", "after")


@dataclass(frozen=True)
class Measured:
    """What was measured on one data set.

    Args:
        row: Its ROW of shift.json.
        samples: Its figures on resamples, before and after temperature scaling.
        drawn_from: A hash of the ids. Data sets with the same hash have the same resamples.
    """

    row: dict[str, Any]
    samples: Bootstrap
    drawn_from: str


def measure(records: Records, data: str, path: Path, resamples: int | None = None) -> Measured:
    """Measure one data set.

    Args:
        records: The records of its images.
        data: The identity of the images.
        path: The path of the records, relative to the report folder.
        resamples: The number of resamples. By default there are fewer for a subset of ImageNet-C,
            because it has many subsets.
    """
    source = records.source
    clean = source.temperature_from is None
    if resamples is None:
        resamples = RESAMPLES if source.corruption is None else OF_A_SUBSET
    samples = bootstrap([records.before, records.after], resamples)
    own: float | None = records.temperature
    interval = records.temperature_interval
    if not clean:
        own, interval = source.own_temperature, source.own_temperature_interval
    row = {
        "name": source.name,
        "kind": source.kind,
        "corruption": source.corruption,
        "severity": source.severity,
        "generated": source.generated,
        "images": len(records),
        "classes": records.classes,
        "data": data,
        "records": path.as_posix(),
        "temperature": records.temperature,
        "temperature_from": source.name if clean else source.temperature_from,
        "own_temperature": own,
        "own_temperature_interval": None if interval is None else list(interval),
        **{
            side: figures(getattr(records, side)) | {"intervals": _intervals(samples, place)}
            for place, side in enumerate(SIDES)
        },
        "effect": effect(samples),
        "real": real_figures(records),
    }
    drawn_from = hashlib.sha256("\0".join(records.id.tolist()).encode()).hexdigest()
    # The gaps behind the intervals are large, and means over subsets do not need them.
    return Measured(row, replace(samples, gaps={}), drawn_from)


def _intervals(samples: Bootstrap, place: int) -> dict[str, dict[str, float | None]]:
    found = {name: samples.interval(place, name) for name in FIGURES}
    return {name: {"low": i.low, "high": i.high} for name, i in found.items()}


def effect(samples: Bootstrap) -> dict[str, dict[str, float | None]]:
    """Return the EFFECT of the temperature between the two sets of scores of `samples`."""
    gap = samples.statistics.index("signed_gap")
    point, moved = (
        np.abs(values[..., 1, gap]) - np.abs(values[..., 0, gap])
        for values in (samples.point, samples.replicates)
    )
    return {
        "distance": {"value": float(point)} | central(moved),
        "ece": vars(samples.difference(1, 0, "ece")),
    }


def central(replicates: FloatArray) -> dict[str, float | None]:
    """Return the central 95 % of resamples.

    The ends are None if one resample of twenty is undefined, or if all are the same.
    """
    defined = replicates[np.isfinite(replicates)]
    if len(defined) < 0.95 * len(replicates):
        return {"low": None, "high": None}
    low, high = np.quantile(defined, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    if high - low <= ROUNDING:
        return {"low": None, "high": None}
    return {"low": float(low), "high": float(high)}


def figures(scores: Scores) -> dict[str, float | int | None]:
    """Return the FIGURES of some scores, without intervals."""
    return _figures(scores, FIGURES)


def real_figures(records: Records) -> dict[str, float | int | None] | None:
    """Return the FIGURES that ReaL labels define. Any ReaL label of an image counts as correct.

    Images without a ReaL label are left out. The accuracy has Wilson's interval. The result is None
    if no image has a ReaL label. Source: Beyer et al., Are we done with ImageNet? (arXiv
    2006.07159), section 3.
    """
    if records.real is None or not (records.real >= 0).any():
        return None
    counts = records.real >= 0
    correct = records.real[counts] == 1
    before = replace(records.before.take(counts), correct=correct)
    low, high = (float(v) for v in proportion_interval(correct.sum(), len(correct)))
    found = _figures(before, [key for key in FIGURES if key not in OF_THE_LABEL])
    return found | {"accuracy_low": low, "accuracy_high": high}


def _figures(scores: Scores, keys: Sequence[str]) -> dict[str, float | int | None]:
    evaluated = Evaluated(scores)
    values = {key: METRICS[key].value(evaluated) for key in keys}
    return {"images": len(scores.correct)} | values
