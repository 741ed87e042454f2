"""Calibration errors of every class's probability."""

import numpy as np
import pytest
from scipy.special import log_softmax as scipy_log_softmax

from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics.classwise import ClasswiseSums
from flatcal_dist.calibration.softmax import score_images
from tests.support.synthetic import make_logits


def plain_classwise(p: np.ndarray, labels: np.ndarray, bins: int, threshold: float | None):
    """Each class's ECE by a loop over classes and bins; of the entries above the threshold."""
    edges, errors = np.linspace(0, 1, bins + 1), []
    for k in range(p.shape[1]):
        chosen = np.ones(len(p), bool) if threshold is None else p[:, k] > threshold
        if not chosen.any():
            continue
        q, hit = p[chosen, k], labels[chosen] == k
        total = 0.0
        for m in range(bins):
            inside = ((q > edges[m]) | (m == 0)) & (q <= edges[m + 1])
            if inside.any():
                total += inside.mean() * abs(q[inside].mean() - hit[inside].mean())
        errors.append(total)
    return errors


@pytest.mark.parametrize(("classes", "bins"), [(2, 15), (3, 5), (10, 15), (40, 7), (7, 1)])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_classwise_is_the_plain_loop(classes: int, bins: int, threshold: float | None) -> None:
    _, labels, logits = make_logits(300, classes)
    p = np.exp(scipy_log_softmax(logits.astype(np.float64), axis=1))
    every = np.mean(plain_classwise(p, labels, bins, None))
    assert metrics.classwise_calibration_error(logits, labels, bins) == pytest.approx(every)
    large = np.mean(
        plain_classwise(p, labels, bins, 1 / classes if threshold is None else threshold)
    )
    value = metrics.thresholded_classwise_calibration_error(logits, labels, bins, threshold)
    assert value == pytest.approx(large)


def test_classwise_of_six_images() -> None:
    p = [[7, 2, 1], [1, 6, 3], [2, 2, 6], [5, 3, 2], [0.5, 9, 0.5], [3, 3, 4]]
    logits, labels = np.log(np.array(p) / 10), np.array([0, 1, 2, 1, 1, 0])
    sums = ClasswiseSums(3, 5)
    score_images(logits, labels, classwise=sums)
    assert sums.per_class == pytest.approx([0.308333333, 0.216666667, 0.241666667], abs=1e-9)
    assert metrics.classwise_calibration_error(logits, labels, 5) == pytest.approx(0.25555555556)


def test_classwise_sums_of_parts_add_up() -> None:
    _, labels, logits = make_logits(500, 12)
    whole, parts = ClasswiseSums(12), [ClasswiseSums(12) for _ in range(3)]
    score_images(logits, labels, classwise=whole)
    for part, rows in zip(parts, (slice(0, 1), slice(1, 200), slice(200, 500)), strict=True):
        score_images(logits[rows], labels[rows], classwise=part)
    total = ClasswiseSums(12)
    total.state = sum(part.state for part in parts)
    assert total.error == pytest.approx(whole.error, abs=1e-12)
    assert total.thresholded_error == pytest.approx(whole.thresholded_error, abs=1e-12)


def test_classwise_where_nothing_is_above_the_threshold() -> None:
    logits, labels = np.zeros((4, 5)), np.arange(4)
    assert metrics.thresholded_classwise_calibration_error(logits, labels) is None
    assert metrics.classwise_calibration_error(logits, labels) == pytest.approx(4 * 0.05 / 5 + 0.04)
    with pytest.raises(ValueError, match="threshold"):
        metrics.thresholded_classwise_calibration_error(logits, labels, threshold=1.0)
