"""What is gained by answering only the confident images: by accuracy, threshold and cost."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import ndtri

from flatcal_dist.calibration.checks import BoolArray, FloatArray, IntArray
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.softmax import Scores
from flatcal_dist.calibration.statistics.intervals import LEVEL, proportion_interval

ACCURACIES = (0.9, 0.95, 0.98, 0.99, 0.995)
COSTS = (2, 5, 10, 20, 50, 100)  # costs of a wrong answer, if an unanswered image costs 1
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def operating_points(scores: Scores, fold: IntArray) -> dict[str, list[dict[str, Any]]]:
    """Return the operating points of one set of scores [N].

    `fold` [N] splits the images into folds. A threshold that was chosen on the images on which it
    is judged looks too good. Therefore `held_out` applies to each fold the threshold that was
    chosen on the other folds.

    by_cost assumes that a right answer costs nothing and an unanswered image costs 1. If
    confidences are true, answering is cheaper from the confidence 1 - 1 / cost on. Source: Chow, On
    optimum recognition error and reject tradeoff (IEEE Transactions on Information Theory 1970).

    Returns:
        by_accuracy: For each wanted accuracy, the largest coverage that has it on these images, the
            least confidence that is answered, and accuracy and coverage of held-out thresholds.
        by_threshold: For each confidence, the share of images with this confidence or more, and
            their accuracy with Wilson's interval, which is None if nothing is answered.
        by_cost: For each cost of a wrong answer, what is answered by the threshold above, and the
            mean cost per image with its 95 % interval. held_out does the same with the thresholds
            that were cheapest on the other folds. cost_of_all is the cost of answering every image.
    """
    return {
        "by_accuracy": [_by_accuracy(scores, fold, wanted) for wanted in ACCURACIES],
        "by_threshold": [
            {"confidence": at} | _answered(scores, scores.confidence >= at) for at in THRESHOLDS
        ],
        "by_cost": [_by_cost(scores, fold, cost) for cost in COSTS],
    }


def _held_out(
    score: FloatArray, fold: IntArray, threshold_on: Callable[[BoolArray], float | None]
) -> BoolArray:
    """Which images [N] are answered by thresholds that are chosen on the other folds.

    `threshold_on` chooses a threshold on a selection [N] of the images. None answers nothing.
    """
    answered = np.zeros(len(score), bool)
    for f in np.unique(fold):
        here = fold == f
        if here.all():
            continue  # no image is left to choose a threshold on
        threshold = threshold_on(~here)
        if threshold is not None:
            answered[here] = score[here] >= threshold
    return answered


def _by_cost(scores: Scores, fold: IntArray, cost: float) -> dict[str, Any]:
    threshold = 1 - 1 / cost
    score, correct = scores.log_confidence, scores.correct
    answered = _held_out(
        score, fold, lambda rest: cheapest_threshold(score[rest], correct[rest], cost)
    )
    return {
        "cost_of_error": cost,
        "confidence": threshold,
        **_costing(scores, scores.confidence >= threshold, cost),
        "held_out": _costing(scores, answered, cost),
        "cost_of_all": cost * float((~correct).mean()),
    }


def cheapest_threshold(score: FloatArray, correct: BoolArray, cost: float) -> float:
    """Return the threshold on a score at which answering costs least.

    Args:
        score: The score of each image [N].
        correct: Which images are right [N].
        cost: The cost of a wrong answer, if an unanswered image costs 1.

    Returns:
        The least score that is answered. It is infinite if answering never pays.
    """
    order, starts = selective.tie_order(score)
    last = np.append(starts[1:], len(score)) - 1  # the last image of each group of equal scores
    spent = cost * np.cumsum(~correct[order])[last] + (len(score) - 1 - last)
    least = int(np.argmin(spent))
    return float(score[order[last[least]]]) if spent[least] < len(score) else np.inf


def _costing(scores: Scores, chosen: BoolArray, cost: float) -> dict[str, Any]:
    """What is answered, and the mean cost per image."""
    spent = np.where(chosen, cost * ~scores.correct, 1.0)
    low = high = None
    if spent.std() > 0:  # if nothing varies, there is no interval
        half = ndtri((1 + LEVEL) / 2) * spent.std(ddof=1) / np.sqrt(len(spent))
        low, high = float(max(0.0, spent.mean() - half)), float(spent.mean() + half)
    found = {"cost": float(spent.mean()), "cost_low": low, "cost_high": high}
    return _answered(scores, chosen) | found


def _by_accuracy(scores: Scores, fold: IntArray, wanted: float) -> dict[str, Any]:
    score, correct = scores.log_confidence, scores.correct
    answered = _held_out(
        score,
        fold,
        lambda rest: selective.threshold_at_risk(score[rest], correct[rest], 1 - wanted),
    )
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
