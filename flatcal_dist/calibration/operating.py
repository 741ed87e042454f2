"""What answering only the confident images gives: by accuracy wanted, and by threshold."""

from typing import Any

import numpy as np

from . import selective
from .checks import IntArray
from .softmax import Scores
from .statistics import proportion_interval

ACCURACIES = (0.9, 0.95, 0.98, 0.99, 0.995)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def operating_points(scores: Scores, fold: IntArray) -> dict[str, list[dict[str, Any]]]:
    """Operating points of one set of scores [N]; `fold` [N] splits the images for the check.

    by_accuracy: for each accuracy wanted the largest coverage with at least that accuracy on these
    images and the confidence from which images are answered. That threshold was chosen on the
    images it is judged by, so `held_out` tells what comes of thresholds chosen on the other folds:
    accuracy with Wilson's interval, and coverage. by_threshold: for each confidence the share of
    images at or above it and their accuracy with Wilson's interval. None where nothing is answered.
    """
    return {
        "by_accuracy": [_by_accuracy(scores, fold, wanted) for wanted in ACCURACIES],
        "by_threshold": [
            {"confidence": at} | _answered(scores, scores.confidence >= at) for at in THRESHOLDS
        ],
    }


def _by_accuracy(scores: Scores, fold: IntArray, wanted: float) -> dict[str, Any]:
    score, correct = scores.log_confidence, scores.correct
    answered = np.zeros(len(score), bool)
    for f in np.unique(fold):
        here = fold == f
        if here.all():
            continue  # nothing to choose a threshold on
        threshold = selective.threshold_at_risk(score[~here], correct[~here], 1 - wanted)
        if threshold is not None:
            answered[here] = score[here] >= threshold
    threshold = selective.threshold_at_risk(score, correct, 1 - wanted)
    return {
        "accuracy_wanted": wanted,
        "coverage": selective.coverage_at_risk(score, correct, 1 - wanted),
        "confidence": None if threshold is None else float(np.exp(threshold)),
        "held_out": _answered(scores, answered),
    }


def _answered(scores: Scores, chosen: np.ndarray) -> dict[str, Any]:
    """Coverage and accuracy of the chosen images."""
    images, right = int(chosen.sum()), int(scores.correct[chosen].sum())
    low, high = (float(v) for v in proportion_interval(right, images))
    return {
        "coverage": images / len(chosen),
        "images": images,
        "wrong": images - right,
        "accuracy": right / images if images else None,
        "low": low if images else None,
        "high": high if images else None,
    }
