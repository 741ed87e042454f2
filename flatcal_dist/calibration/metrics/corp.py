"""Miscalibration, discrimination and uncertainty of the confidence, by isotonic regression."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from flatcal_dist.calibration.checks import FloatArray, IntArray, confidence_and_correct


@dataclass(frozen=True)
class IsotonicCurve:
    """The best rising function from confidence to accuracy, at the G different confidences.

    Args:
        confidence: The confidences in rising order [G].
        accuracy: The recalibrated accuracy [G], constant over each pooled block.
        count: The number of images at each confidence [G].
    """

    confidence: FloatArray
    accuracy: FloatArray
    count: IntArray


@dataclass(frozen=True)
class CorpDecomposition:
    """The parts of a score: score = miscalibration - discrimination + uncertainty, exactly.

    Args:
        score: The top-label Brier score, the mean of (c - a)^2.
        miscalibration: How much recalibration would lower the score.
        discrimination: How much the recalibrated confidence lowers it against a constant one.
        uncertainty: The score of a constant confidence that equals the accuracy.
    """

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


def isotonic_curve(confidence: ArrayLike, correct: ArrayLike) -> IsotonicCurve:
    """Return the isotonic regression of correct on confidence. Equal confidences share a value."""
    c, a = confidence_and_correct(confidence, correct)
    values, inverse, count = np.unique(c, return_inverse=True, return_counts=True)
    share = np.bincount(inverse, weights=a) / count
    fitted = isotonic_regression(share, weights=count).x
    return IsotonicCurve(values, np.clip(fitted, 0.0, 1.0), count)


def corp_decomposition(confidence: ArrayLike, correct: ArrayLike) -> CorpDecomposition:
    """Return the CORP decomposition of the top-label Brier score.

    Source: Dimitriadis, Gneiting and Jordan, Stable reliability diagrams for probabilistic
    classifiers (PNAS 2021), equation 4.
    """
    c, a = confidence_and_correct(confidence, correct)
    curve = isotonic_curve(c, a)
    recalibrated = curve.accuracy[np.searchsorted(curve.confidence, c)]
    score, best = float(np.mean((c - a) ** 2)), float(np.mean((recalibrated - a) ** 2))
    uncertainty = float(np.mean((a.mean() - a) ** 2))
    return CorpDecomposition(score, score - best, uncertainty - best, uncertainty)
