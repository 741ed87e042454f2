"""Means over the corruptions and severities of ImageNet-C: a GROUP of shift.json, see `report`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from flatcal_dist.calibration.metrics.entries import STATISTICS
from flatcal_dist.calibration.shift.rows import FIGURES, SIDES, Measured, central, effect
from flatcal_dist.calibration.statistics.bootstrap import Bootstrap

# ImageNet-C is normalised by the top-1 error of AlexNet, averaged over the five severities of each
# corruption: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
# Corruptions and Perturbations (ICLR 2019); values as used by AugMix (Hendrycks et al., ICLR 2020).
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
SEVERITIES = (1, 2, 3, 4, 5)


def group(subsets: Sequence[Measured]) -> dict[str, Any]:
    """Return the GROUP of the subsets of one ImageNet-C set."""
    rows = [s.row for s in subsets]
    corruptions = list(dict.fromkeys(r["corruption"] for r in rows))
    severities = sorted({r["severity"] for r in rows})

    def arranged(of: Callable[[list[Measured]], dict[str, Any]]) -> dict[str, Any]:
        def chosen(key: str, value: Any) -> list[Measured]:
            return [s for s in subsets if s.row[key] == value]

        return {
            "all": of(list(subsets)),
            "by_severity": {str(s): of(chosen("severity", s)) for s in severities},
            "by_corruption": {c: of(chosen("corruption", c)) for c in corruptions},
        }

    low, high = _interval_of_mean_corruption_error(subsets)
    return {
        "name": rows[0]["name"],
        "generated": rows[0]["generated"],
        "corruptions": corruptions,
        "severities": severities,
        **{side: arranged(partial(_means, side=side)) for side in SIDES},
        "effect": arranged(_effect),
        "mean_corruption_error": mean_corruption_error(rows),
        "mean_corruption_error_interval": None if low is None else [low, high],
    }


def _means(subsets: Sequence[Measured], side: str) -> dict[str, Any]:
    """Unweighted means of the figures over some subsets, with intervals."""
    columns = {
        name: [s.row[side][name] for s in subsets] for name in subsets[0].row[side]
        if name != "intervals"
    }  # fmt: skip
    found = {n: None if None in c else float(np.mean(c)) for n, c in columns.items()}
    mean, place = _mean(subsets), SIDES.index(side)
    unknown: dict[str, float | None] = {"low": None, "high": None}
    limits = dict.fromkeys(FIGURES, unknown)
    for name in FIGURES:
        if mean is None:
            continue
        if STATISTICS[name].centred:  # inflated in resamples: spread around what was seen
            m = mean.statistics.index(name)
            replicates = mean.replicates[:, place, m]
            moved = replicates - replicates.mean() + mean.point[place, m]
            limits[name] = central(np.maximum(moved, 0.0))
        else:
            interval = mean.interval(place, name)
            limits[name] = {"low": interval.low, "high": interval.high}
    return found | {"intervals": limits}


def _mean(subsets: Sequence[Measured]) -> Bootstrap | None:
    """The bootstrap of the mean over subsets. None unless all hold the same photographs."""
    first = subsets[0]
    same = {(s.drawn_from, s.samples.replicates.shape) for s in subsets}
    if len(same) > 1:
        return None
    point = np.mean([s.samples.point for s in subsets], axis=0)
    replicates = np.mean([s.samples.replicates for s in subsets], axis=0)
    rarer = [min(s.samples.rarer[place] for s in subsets) for place in range(len(SIDES))]
    statistics, images = first.samples.statistics, first.samples.images
    return Bootstrap(point, replicates, statistics, images=images, rarer=rarer)


def _effect(subsets: Sequence[Measured]) -> dict[str, dict[str, float | None]]:
    """The EFFECT on means over subsets. It has no intervals if they hold different photographs."""
    mean = _mean(subsets)
    if mean is not None:
        return effect(mean)
    gaps, ece = (
        [np.mean([s.row[side][key] for s in subsets]) for side in SIDES]
        for key in ("signed_gap", "ece")
    )
    unknown: dict[str, float | None] = {"low": None, "high": None}
    return {
        "distance": {"value": float(abs(gaps[1]) - abs(gaps[0]))} | unknown,
        "ece": {"value": float(ece[1] - ece[0])} | unknown,
    }


def _interval_of_mean_corruption_error(
    subsets: Sequence[Measured],
) -> tuple[float | None, float | None]:
    if mean_corruption_error([s.row for s in subsets]) is None or _mean(subsets) is None:
        return None, None
    at = subsets[0].samples.statistics.index("accuracy")
    weight = [1 / ALEXNET_ERROR[s.row["corruption"]] if s.row["corruption"] in ALEXNET_ERROR else 0
              for s in subsets]  # fmt: skip
    error = np.array([1 - s.samples.replicates[:, 0, at] for s in subsets])
    limits = central(np.array(weight) @ error / (len(ALEXNET_ERROR) * len(SEVERITIES)))
    return limits["low"], limits["high"]


def mean_corruption_error(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the mCE of the published ImageNet-C, which is 1 for AlexNet.

    It is None for other images (CIFAR-10-C), if a corruption or severity is missing, or if
    corruptions were applied here. Source:
    Hendrycks and Dietterich (ICLR 2019), section 4.
    """
    error = {(r["corruption"], r["severity"]): 1 - r["before"]["accuracy"] for r in rows}
    wanted = {(c, s) for c in ALEXNET_ERROR for s in SEVERITIES}
    if (
        any(r["generated"] or r.get("kind") == "cifar_c" for r in rows)
        or not wanted <= error.keys()
    ):
        return None
    relative = [
        np.mean([error[c, s] for s in SEVERITIES]) / known for c, known in ALEXNET_ERROR.items()
    ]
    return float(np.mean(relative))
