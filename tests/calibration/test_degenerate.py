"""Inputs at the end of what can be asked: a defined value, None, or an error; never a wrong one."""

import warnings

import numpy as np
import pytest

from flatcal_dist.calibration.calibrators.crossfit import CALIBRATORS, fit_out_of_sample
from flatcal_dist.calibration.calibrators.of_logits import (
    EnsembleTemperatureScaling,
    Identity,
    TemperatureScaling,
    VectorScaling,
)
from flatcal_dist.calibration.confidence.of_logits import compare_scores
from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.binned import BinnedEvaluation
from flatcal_dist.calibration.metrics.corp import corp_decomposition
from flatcal_dist.calibration.metrics.entries import STATISTICS
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.softmax import Scores, score_images
from flatcal_dist.calibration.statistics.bootstrap import bootstrap, mcnemar, rank_bootstrap
from tests.support.synthetic import make_logits

N = 24
RISING = np.linspace(0.3, 0.95, N)
HALF = np.arange(N) % 2 == 0
CASES = {
    "all correct": (RISING, np.ones(N, bool)),
    "all wrong": (RISING, np.zeros(N, bool)),
    "one correct": (np.array([0.4]), np.array([True])),
    "one wrong": (np.array([0.4]), np.array([False])),
    "exactly 0 and 1": (np.where(HALF, 1.0, 0.0), HALF),
    "exactly 1, half wrong": (np.ones(N), HALF),
    "exactly 0, half correct": (np.zeros(N), HALF),
    "equal confidences": (np.full(N, 0.5), HALF),
}
ERRORS = (
    metrics.expected_calibration_error,
    metrics.adaptive_calibration_error,
    metrics.maximum_calibration_error,
    metrics.root_mean_square_calibration_error,
    metrics.kolmogorov_smirnov_error,
    metrics.smooth_calibration_error,
    metrics.top_label_brier_score,
)
# All images in one place, so every error is the same number: |confidence - accuracy|.
ONE_PLACE = {
    "one correct": 0.6,
    "one wrong": 0.4,
    "exactly 1, half wrong": 0.5,
    "exactly 0, half correct": 0.5,
    "equal confidences": 0.0,
}
RANKS = (
    "aurc", "eaurc", "naurc", "augrc", "auroc", "fpr_at_95_tpr", "aupr_success", "aupr_error",
)  # fmt: skip
# All correct, all wrong, perfect order, no order: (aurc, auroc) by hand.
EXPECTED = {
    "all correct": (0, None),
    "all wrong": (1, None),
    "one correct": (0, None),
    "one wrong": (1, None),
    "exactly 0 and 1": (sum((k - 12) / k for k in range(13, 25)) / 24, 1.0),
    "exactly 1, half wrong": (0.5, 0.5),
    "exactly 0, half correct": (0.5, 0.5),
    "equal confidences": (0.5, 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_calibration_errors(case: str) -> None:
    confidence, correct = CASES[case]
    for metric in ERRORS[:-1]:
        value = metric(confidence, correct)
        assert 0 <= value <= 1
        if case in ONE_PLACE and metric is not metrics.smooth_calibration_error:
            assert value == pytest.approx(ONE_PLACE[case], abs=1e-12), metric
    if case == "exactly 0 and 1":
        assert all(metric(confidence, correct) == pytest.approx(0, abs=1e-12) for metric in ERRORS)
    d = corp_decomposition(confidence, correct)
    assert d.score == pytest.approx(d.miscalibration - d.discrimination + d.uncertainty, abs=1e-12)
    null = metrics.expected_calibration_error_null(confidence, correct, resamples=20)
    assert 0 < null.p_value <= 1


@pytest.mark.parametrize("case", CASES)
def test_rankings(case: str) -> None:
    pair = CASES[case]
    aurc, auroc = EXPECTED[case]
    assert selective.aurc(*pair) == pytest.approx(aurc, abs=1e-12)
    assert selective.auroc(*pair) == auroc
    for name in RANKS:
        value = getattr(selective, name)(*pair)
        assert value is None or np.isfinite(value), name
        if auroc is None and name in ("naurc", "fpr_at_95_tpr"):
            assert value is None, name
    for risk in (0.0, 0.05, 1.0):
        assert 0 <= selective.coverage_at_risk(*pair, risk) <= 1


@pytest.mark.parametrize("case", CASES)
def test_bootstrap(case: str) -> None:
    confidence, correct = CASES[case]
    with np.errstate(divide="ignore"):
        log_confidence = np.maximum(np.log(confidence), -700)
    zeros = np.zeros(len(correct))
    samples = bootstrap([Scores(correct, log_confidence, zeros, zeros, zeros)], 20)
    for name in STATISTICS:
        i = samples.interval(0, name)
        assert i.value is None or np.isfinite(i.value), name
        assert (i.low is None) == (i.high is None), name
        assert i.low is None or i.low <= i.high, name
    assert samples.interval(0, "auroc").value == EXPECTED[case][1]


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("case", ["all correct", "all wrong", "one label", "equal logits", "sure"])
def test_calibrators(name: str, case: str) -> None:
    ids, labels, logits = make_logits(40, 4)
    if case == "all correct":
        labels = logits.argmax(1)
    elif case == "all wrong":
        labels = logits.argmin(1)
    elif case == "one label":
        labels = np.zeros(40, int)
    elif case == "equal logits":
        logits = np.zeros((40, 4))
    else:
        logits = 1e4 * logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no finite temperature, and it says so
        fit = fit_out_of_sample(name, ids, logits, labels)
        scores = fit.score(ids, logits, labels)
    assert np.isfinite(scores.log_confidence).all()
    assert (scores.log_confidence <= 1e-12).all()
    if scores.nll is not None:
        assert np.isfinite([scores.nll, scores.brier, scores.entropy]).all()
        assert (scores.nll >= 0).all()
        assert (scores.brier <= 2 + 1e-12).all()


BAD_LOGITS = {
    "NaN": ([[0.0, np.nan], [1, 0]], [0, 1], "NaN or infinite, first at row 0"),
    "infinite": ([[0.0, 1], [np.inf, 0]], [0, 1], "NaN or infinite, first at row 1"),
    "minus infinite": ([[0.0, 1], [-np.inf, 0]], [0, 1], "NaN or infinite, first at row 1"),
    "half infinite": (np.array([[0, 1], [np.inf, 0]], np.float16), [0, 1], "infinite"),
    "beyond all bounds": ([[0.0, 1e300], [1, 0]], [0, 1], "within"),
    "complex": ([[0j, 1], [1, 0]], [0, 1], "real numbers"),
    "text": ([["a", "b"]], [0], "real numbers"),
    "label too large": ([[0.0, 1], [1, 0]], [0, 2], r"0\.\.1"),
    "label negative": ([[0.0, 1], [1, 0]], [-1, 0], r"0\.\.1"),
    "label a fraction": ([[0.0, 1], [1, 0]], [0.0, 1.0], "integers"),
    "one class": ([[0.0], [1.0]], [0, 0], "K >= 2"),
    "empty": (np.zeros((0, 3)), np.zeros(0, int), "empty"),
    "lengths differ": ([[0.0, 1], [1, 0]], [0], r"shape \[2\]"),
}


@pytest.mark.parametrize("case", BAD_LOGITS)
def test_bad_logits_are_refused_by_all_that_take_them(case: str) -> None:
    logits, labels, message = BAD_LOGITS[case]
    ids = [str(i) for i in range(len(logits))]
    takers = [
        lambda: metrics.negative_log_likelihood(logits, labels),
        lambda: metrics.brier_score(logits, labels),
        lambda: metrics.classwise_calibration_error(logits, labels),
        lambda: metrics.thresholded_classwise_calibration_error(logits, labels),
        lambda: score_images(logits, labels),
        lambda: compare_scores(ids, logits, labels),
        lambda: fit_out_of_sample("temperature", ids, logits, labels),
        *(
            lambda c=c: c().fit(logits, labels)
            for c in (Identity, TemperatureScaling, EnsembleTemperatureScaling, VectorScaling)
        ),
    ]
    for take in takers:
        with pytest.raises(ValueError, match=message):
            take()
    with pytest.raises(ValueError, match=message.replace("at row ", "")):
        Records.from_logits(ids, labels, logits)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "ids must be unique, but 1 ids occur more than once, first 'a'"),
        (["a", "b"], "equal lengths, got 2 and 3"),
        (["a", 1, "1"], "first '1'"),
    ],
)
def test_ids_repeated_or_missing(ids: list, message: str) -> None:
    logits, labels = np.eye(3), np.arange(3)
    for take in (
        lambda: Records.from_logits(ids, labels, logits),
        lambda: fit_out_of_sample("temperature", ids, logits, labels),
        lambda: compare_scores(ids, logits, labels),
    ):
        with pytest.raises(ValueError, match=message):
            take()


def test_missing_images_are_told() -> None:
    with pytest.raises(ValueError, match="expected 50000 images, got 3"):
        Records.from_logits("abc", [0, 1, 2], np.eye(3), expected=50000)


def test_bad_pairs_are_refused_by_the_tests_too() -> None:
    with pytest.raises(ValueError, match="same images"):
        mcnemar([1, 0], [1])
    with pytest.raises(ValueError, match="bool or 0/1"):
        mcnemar([1, 2], [1, 0])
    with pytest.raises(ValueError, match="NaN"):
        rank_bootstrap([np.array([0.1, np.nan])], [1, 0])
    with pytest.raises(ValueError, match="equal lengths"):
        rank_bootstrap([np.array([0.1, 0.2])], [1])
    with pytest.raises(ValueError, match="empty"):
        rank_bootstrap([np.array([])], [])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_half_precision_ends_before_confidence_begins(dtype: type) -> None:
    """Equal logits are equal images; those one half-precision step apart stay apart."""
    steps = np.array([10, 10.0078125, 10.0078125, 11], dtype)
    logits = np.zeros((4, 3), dtype)
    logits[:, 0] = steps
    s = score_images(logits, np.zeros(4, int)).log_confidence
    assert s[0] < s[1] == s[2] < s[3]
    binned = BinnedEvaluation()
    binned.add(logits, np.zeros(4, int))
    assert binned.figures().nll == pytest.approx(-s.mean(), rel=1e-12)
