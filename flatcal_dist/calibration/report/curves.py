"""Curves behind the figures: the smooth reliability curve, histograms, and thinning."""

from typing import Any

import numpy as np
from scipy.special import ndtri

from flatcal_dist.calibration.checks import BoolArray, FloatArray
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.softmax import Scores
from flatcal_dist.calibration.statistics.intervals import LEVEL

SMOOTH_POINTS = 101
WIDTHS = (0.02, 0.06)  # a narrower kernel draws noise, and a wider kernel bends the diagonal
HISTOGRAM_BINS = 40
CURVE_POINTS = 500


def smooth_reliability(confidence: FloatArray, correct: BoolArray, width: float) -> dict[str, Any]:
    """Compute accuracy against confidence by a Gaussian kernel that is reflected at 0 and 1.

    Source: Blasiok and Nakkiran, Smooth ECE (ICLR 2024), section 4.

    Args:
        confidence: The confidence of each image [N].
        correct: Which images are right [N].
        width: The width of the kernel, such as that of smooth ECE. It is kept within `WIDTHS`.

    Returns:
        Lists over `confidence`, from the smallest to the largest one, with None where no image lies
        near. `accuracy` is the Nadaraya-Watson estimate. A perfectly calibrated network with these
        confidences lies between `calibrated_low` and `calibrated_high` in 95 % of cases, by the
        normal approximation. `images` is the number of images that the estimate rests on: as many
        images of equal weight would leave as much noise (Kish's effective number).
    """
    width = float(np.clip(width, *WIDTHS))
    at = np.linspace(confidence.min(), confidence.max(), SMOOTH_POINTS)
    # Images are first gathered on a fine grid, so that the cost does not grow with their number.
    cells = max(1000, int(10 / width))
    place = np.minimum((confidence * cells).astype(np.int64), cells - 1)
    total, right, expected, spread = (
        np.bincount(place, weights=w, minlength=cells)
        for w in (np.ones(len(confidence)), correct, confidence, confidence * (1 - confidence))
    )
    nodes = (np.arange(cells) + 0.5) / cells
    kernel = sum(
        np.exp(-0.5 * ((at[:, None] - mirrored) / width) ** 2)
        for mirrored in (nodes, -nodes, 2 - nodes)
    )
    weight = kernel @ total
    effective = weight**2 / np.maximum(kernel**2 @ total, 1e-300)
    weight = np.where(weight > 1e-6, weight, np.nan)
    middle, half = kernel @ expected / weight, np.sqrt(kernel**2 @ spread) / weight
    half *= ndtri((1 + LEVEL) / 2)
    curves = {
        "accuracy": kernel @ right / weight,
        "calibrated_low": np.maximum(middle - half, 0),
        "calibrated_high": np.minimum(middle + half, 1),
    }
    plain = {k: [None if np.isnan(v) else float(v) for v in c] for k, c in curves.items()}
    return {"width": width, "confidence": at.tolist(), "images": effective.tolist()} | plain


def confidence_histogram(scores: Scores) -> dict[str, Any]:
    """Count correct and wrong images in equal bins of confidence, with the mean of each group.

    `edges` has one entry more than the counts. A mean over no images is None.
    """
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    right, wrong = (
        np.histogram(scores.confidence[chosen], edges)[0].tolist()
        for chosen in (scores.correct, ~scores.correct)
    )
    means = (
        float(scores.confidence[chosen].mean()) if chosen.any() else None
        for chosen in (scores.correct, ~scores.correct)
    )
    names = ("edges", "correct", "wrong", "mean_correct", "mean_wrong")
    return dict(zip(names, (edges.tolist(), right, wrong, *means), strict=True))


def risk_coverage(scores: Scores) -> dict[str, list[float]]:
    """Return the risk-coverage curve at no more than `CURVE_POINTS` thresholds.

    Half of them are spread evenly over coverage, and half over its logarithm, because thresholds
    are chosen among the most confident images.
    """
    coverage, risk = selective.risk_coverage_curve(scores.log_confidence, scores.correct)
    if len(coverage) > CURVE_POINTS:
        last = len(coverage) - 1
        evenly = np.linspace(0, last, CURVE_POINTS // 2)
        finely = np.geomspace(1, len(coverage), CURVE_POINTS // 2) - 1
        keep = np.unique(np.round(np.concatenate([evenly, finely])).astype(int))
        coverage, risk = coverage[keep], risk[keep]
    return {"coverage": coverage.tolist(), "risk": risk.tolist()}
