"""Miscalibration, discrimination and uncertainty of the confidence, by isotonic regression."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from flatcal_dist.calibration.checks import FloatArray, IntArray, confidence_and_correct


@dataclass(frozen=True)
class IsotonicCurve:
    """The best rising function from confidence to accuracy: values [G] at the G confidences seen.

    confidence rises; accuracy is the recalibrated one, constant over each pooled block; count is
    the number of images at each confidence.
    """

    confidence: FloatArray
    accuracy: FloatArray
    count: IntArray


@dataclass(frozen=True)
class CorpDecomposition:
    """score = miscalibration - discrimination + uncertainty, exactly.

    score: top-label Brier score, mean (c - a)^2. miscalibration: what recalibration would save.
    discrimination: what the recalibrated confidence saves against a constant one. uncertainty:
    the score of the accuracy as constant confidence.
    """

    score: float
    miscalibration: float
    discrimination: float
    uncertainty: float


def isotonic_curve(confidence: ArrayLike, correct: ArrayLike) -> IsotonicCurve:
    """Isotonic regression of correct on confidence; equal confidences share one value."""
    c, a = confidence_and_correct(confidence, correct)
    values, inverse, count = np.unique(c, return_inverse=True, return_counts=True)
    share = np.bincount(inverse, weights=a) / count
    fitted = isotonic_regression(share, weights=count).x
    return IsotonicCurve(values, np.clip(fitted, 0.0, 1.0), count)


def corp_decomposition(confidence: ArrayLike, correct: ArrayLike) -> CorpDecomposition:
    """CORP decomposition of the top-label Brier score.

    Source: Dimitriadis, Gneiting and Jordan, Stable reliability diagrams for probabilistic
    classifiers (PNAS 2021), equation 4.
    """
    c, a = confidence_and_correct(confidence, correct)
    curve = isotonic_curve(c, a)
    recalibrated = curve.accuracy[np.searchsorted(curve.confidence, c)]
    score, best = float(np.mean((c - a) ** 2)), float(np.mean((recalibrated - a) ** 2))
    uncertainty = float(np.mean((a.mean() - a) ** 2))
    return CorpDecomposition(score, score - best, uncertainty - best, uncertainty)
