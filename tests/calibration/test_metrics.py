from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax as scipy_log_softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics.corp import corp_decomposition, isotonic_curve
from flatcal_dist.calibration.metrics.smooth import smooth_error_at
from flatcal_dist.calibration.metrics.smooth_relplot import relplot_error_at
from flatcal_dist.calibration.softmax import log_confidence, log_softmax, score_images
from tests.support.synthetic import GOLDEN, golden_inputs, make_logits

BINNED_AND_SMOOTH = {
    "ece15": metrics.expected_calibration_error,
    "mce15": metrics.maximum_calibration_error,
    "rmsce15": metrics.root_mean_square_calibration_error,
    "ace15_tiesafe": metrics.adaptive_calibration_error,
    "rmsce15_debiased": partial(metrics.root_mean_square_calibration_error, debiased=True),
    "top_brier": metrics.top_label_brier_score,
    "ks_tiesafe": metrics.kolmogorov_smirnov_error,
    "smece": metrics.smooth_calibration_error,
    "smece_relplot": metrics.smooth_calibration_error_relplot,
}
SMOOTH_TOLERANCES = {"smece": 1e-4, "smece_relplot": 1e-3}  # of grids; of ten bisections
AT_WIDTH = {
    "smece_at_0_05": (smooth_error_at, 0.05),
    "smece_at_0_3": (smooth_error_at, 0.3),
    "smece_relplot_at_0_05": (relplot_error_at, 0.05),
    "smece_relplot_at_0_1": (relplot_error_at, 0.1),
}

# Confidences on a coarse grid, so that ties and bin edges are frequent.
PAIRS = st.lists(
    st.tuples(st.integers(0, 30).map(lambda k: k / 30), st.booleans()), min_size=1, max_size=60
).map(lambda pairs: (np.array([c for c, _ in pairs]), np.array([a for _, a in pairs])))


@pytest.mark.parametrize("metric", BINNED_AND_SMOOTH)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, metric: str) -> None:
    tolerance = SMOOTH_TOLERANCES.get(metric, 1e-9)
    value = BINNED_AND_SMOOTH[metric](*golden_inputs(name))
    assert value == pytest.approx(GOLDEN[name]["expected"][metric], abs=tolerance)


@pytest.mark.parametrize("metric", AT_WIDTH)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_smooth_at_fixed_width(name: str, metric: str) -> None:
    confidence, correct = golden_inputs(name)
    error_at, width = AT_WIDTH[metric]
    value = error_at(confidence, correct.astype(bool), width)
    assert value == pytest.approx(GOLDEN[name]["expected"][metric], abs=3e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_signed_gap_golden(name: str) -> None:
    expected = GOLDEN[name]["expected"]
    gap = metrics.signed_gap(*golden_inputs(name))
    assert gap == pytest.approx(expected["mean_conf"] - expected["acc"], abs=1e-9)


def test_three_bins_example() -> None:
    confidence, correct = [0.25, 0.25, 0.55, 0.75, 0.95], [0, 0, 1, 1, 1]
    # By hand: 2/5 of 0.25, 1/5 of 0.45, 2/5 of 0.15.
    assert metrics.expected_calibration_error(confidence, correct, 3) == pytest.approx(0.25)
    assert metrics.maximum_calibration_error(confidence, correct, 3) == pytest.approx(0.45)


def plain_ece(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    """Right-closed bins by comparing with each edge in turn."""
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for m in range(bins):
        inside = [
            i
            for i, c in enumerate(confidence)
            if (edges[m] < c <= edges[m + 1]) or (m == 0 and c == 0)
        ]
        if inside:
            gap = np.mean([confidence[i] - correct[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@given(PAIRS, st.integers(1, 20))
def test_ece_is_the_plain_loop(pair: tuple, bins: int) -> None:
    expected = plain_ece(*pair, bins)
    assert metrics.expected_calibration_error(*pair, bins) == pytest.approx(expected, abs=1e-12)


@given(PAIRS)
def test_order_of_errors(pair: tuple) -> None:
    ece = metrics.expected_calibration_error(*pair)
    rmsce = metrics.root_mean_square_calibration_error(*pair)
    mce = metrics.maximum_calibration_error(*pair)
    gap = abs(metrics.signed_gap(*pair))
    slack = 1e-12
    assert gap <= ece + slack
    assert gap <= metrics.adaptive_calibration_error(*pair) + slack
    assert gap <= metrics.adaptive_calibration_error(*pair, 100) + slack
    assert 0 <= metrics.root_mean_square_calibration_error(*pair, debiased=True) <= rmsce + slack
    assert gap <= metrics.kolmogorov_smirnov_error(*pair) + slack
    assert 0 <= ece <= rmsce + slack
    assert rmsce <= mce + slack
    assert mce <= 1


@given(PAIRS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_of_images_does_not_matter(pair: tuple, random: object) -> None:
    confidence, correct = pair
    order = list(range(len(confidence)))
    random.shuffle(order)
    for metric in BINNED_AND_SMOOTH.values():
        shuffled = metric(confidence[order], correct[order])
        assert shuffled == pytest.approx(metric(confidence, correct), abs=1e-9)


@given(PAIRS, st.integers(2, 4))
def test_repeating_the_data_changes_nothing(pair: tuple, times: int) -> None:
    confidence, correct = pair
    for metric in (
        metrics.expected_calibration_error,
        metrics.maximum_calibration_error,
        metrics.root_mean_square_calibration_error,
        metrics.kolmogorov_smirnov_error,
    ):
        repeated = metric(np.tile(confidence, times), np.tile(correct, times))
        assert repeated == pytest.approx(metric(confidence, correct), abs=1e-12)


@given(PAIRS, st.integers(1, 8))
def test_adaptive_bins_never_split_ties(pair: tuple, bins: int) -> None:
    confidence, _ = pair
    inner = metrics.equal_mass_edges(confidence, bins)
    index = np.searchsorted(inner, confidence, side="left")
    assert (np.bincount(index, minlength=len(inner) + 1) > 0).all()
    for value in np.unique(confidence):
        assert len(set(index[confidence == value])) == 1
    assert len(inner) < bins or bins == 1


def test_bins_of_the_edges() -> None:
    table = metrics.reliability_bins([0.0, 1 / 15, 0.2, 0.9999, 1.0], [0, 0, 1, 1, 1])
    assert table.count.tolist() == [2, 0, 1] + [0] * 11 + [2]
    assert np.isnan(table.accuracy[1])
    assert len(table.edges) == 16


def test_calibrated_confidence_is_not_refuted() -> None:
    random = np.random.default_rng(1)
    confidence = random.beta(4, 1, 5000)
    correct = random.random(5000) < confidence
    null = metrics.expected_calibration_error_null(confidence, correct)
    assert null.p_value > 0.05
    assert 0 < null.mean < null.quantile_95 < 0.05
    accuracy = metrics.reliability_bins(confidence, correct).accuracy
    inside = (accuracy >= null.low) & (accuracy <= null.high)
    assert inside[np.isfinite(accuracy)].mean() > 0.7


def test_over_confidence_is_refuted() -> None:
    random = np.random.default_rng(1)
    confidence = random.beta(4, 1, 5000)
    correct = random.random(5000) < confidence - 0.1
    null = metrics.expected_calibration_error_null(confidence, correct, resamples=500)
    assert null.p_value == pytest.approx(1 / 501)


def test_p_values_are_uniform_under_the_null() -> None:
    random = np.random.default_rng(2)
    p = []
    for seed in range(100):
        confidence = random.beta(3, 1, 300)
        correct = random.random(300) < confidence
        null = metrics.expected_calibration_error_null(confidence, correct, resamples=99, seed=seed)
        p.append(null.p_value)
    assert 0.4 < np.mean(p) < 0.6
    assert np.mean(np.array(p) <= 0.1) < 0.25


def test_null_is_seeded_and_blind_to_order() -> None:
    confidence, correct = golden_inputs("A_distinct")
    first = metrics.expected_calibration_error_null(confidence, correct, resamples=50, seed=3)
    turned = metrics.expected_calibration_error_null(
        confidence[::-1], correct[::-1], resamples=50, seed=3
    )
    assert (first.mean, first.p_value) == (turned.mean, turned.p_value)


def test_smooth_error_finds_no_error_of_a_calibrated_network() -> None:
    random = np.random.default_rng(0)
    confidence = random.beta(4, 1, 50000)
    assert metrics.smooth_calibration_error(confidence, random.random(50000) < confidence) < 0.01


def smooth_error_by_quadrature(confidence: np.ndarray, correct: np.ndarray, width: float) -> float:
    """The definition: each Gaussian and its mirror images, integrated over [0, 1]."""
    at = np.linspace(0, 1, 4001)
    residual = np.zeros(len(at))
    for turn in range(-4, 5):
        for places in (2 * turn + confidence, 2 * turn - confidence):
            kernel = np.exp(-0.5 * ((at[:, None] - places) / width) ** 2)
            residual += kernel @ (confidence - correct) / (width * np.sqrt(2 * np.pi))
    return np.trapezoid(np.abs(residual), at) / len(confidence)


@pytest.mark.parametrize("width", [0.004, 0.05, 0.6])
@pytest.mark.parametrize("saturated", [0.0, 0.5, 1.0])
def test_smooth_error_is_its_definition_also_where_confidences_saturate(
    saturated: float, width: float
) -> None:
    random = np.random.default_rng(3)
    confidence = np.where(random.random(60) < saturated, 1.0, random.random(60))
    correct = random.random(60) < 0.7
    expected = smooth_error_by_quadrature(confidence, correct, width)
    # The grid adds up to 1 / 600 of the kernel's variance.
    assert smooth_error_at(confidence, correct, width) == pytest.approx(expected, rel=2e-3)
    error = metrics.smooth_calibration_error(confidence, correct)
    at_itself = smooth_error_by_quadrature(confidence, correct, error)
    assert error == pytest.approx(at_itself, rel=2e-3)


def test_a_confidence_of_exactly_one_is_one_just_below() -> None:
    random = np.random.default_rng(1)
    confidence, correct = random.beta(8, 1, 2000), random.random(2000) < 0.8
    confidence[:1000] = 1.0
    below = np.minimum(confidence, 1 - 1e-9)
    error = metrics.smooth_calibration_error(confidence, correct)
    assert error == pytest.approx(metrics.smooth_calibration_error(below, correct), abs=1e-6)


def test_proper_scores_match_scikit_learn() -> None:
    _, labels, logits = make_logits(300, 7)
    p = np.exp(scipy_log_softmax(logits.astype(np.float64), axis=1))
    expected = log_loss(labels, p, labels=range(7))
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(expected, abs=1e-12)
    expected = brier_score_loss(labels, p, labels=range(7))
    assert metrics.brier_score(logits, labels) == pytest.approx(expected, abs=1e-12)


def test_proper_scores_of_six_images() -> None:
    p = [[7, 2, 1], [1, 6, 3], [2, 2, 6], [5, 3, 2], [0.5, 9, 0.5], [3, 3, 4]]
    logits, labels = np.log(np.array(p) / 10), np.array([0, 1, 2, 1, 1, 0])
    expected = -np.log([0.7, 0.6, 0.6, 0.3, 0.9, 0.3]).mean()
    assert metrics.negative_log_likelihood(logits, labels) == pytest.approx(expected, abs=1e-12)
    assert metrics.brier_score(logits, labels) == pytest.approx(0.3625)
    scores = score_images(logits, labels)
    ece = metrics.expected_calibration_error(scores.confidence, scores.correct, 5)
    assert ece == pytest.approx(0.183333333, abs=1e-9)


def test_log_softmax_matches_scipy_and_large_logits_stay_finite() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 20)) * 30
    expected = scipy_log_softmax(logits, axis=1)
    assert np.allclose(log_softmax(logits), expected, rtol=1e-13, atol=1e-13)
    assert metrics.negative_log_likelihood([[5000.0, 0.0]], [1]) == 5000.0


def test_confidence_does_not_saturate() -> None:
    logits = np.zeros((5, 3))
    logits[:, 0] = [50, 60, 70, 80, 90]
    score = log_confidence(logits)
    assert (np.exp(score) == 1.0).all()
    assert (np.diff(score) > 0).all()
    assert score == pytest.approx(-2 * np.exp(-logits[:, 0]))


def test_ranks_and_ties_of_logits() -> None:
    scores = score_images(np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [3.0, 2.0, 1.0]]), [0, 1, 2])
    assert scores.prediction.tolist() == [0, 0, 0]
    assert scores.rank.tolist() == [0, 1, 2]
    assert scores.correct.tolist() == [True, False, False]


def test_entropy() -> None:
    scores = score_images([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]], [0, 0])
    assert scores.entropy == pytest.approx([np.log(4), 0.0])


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "empty"),
        ([0.5], [1, 0], "equal lengths"),
        ([0.5, np.nan], [1, 0], "1 NaN"),
        ([0.5, 1.2], [1, 0], r"\[0, 1\]"),
        ([0.5, -0.1], [1, 0], r"\[0, 1\]"),
        ([0.5, 0.6], [1, 2], "bool or 0/1"),
        ([[0.5]], [[1]], r"shape \[N\]"),
    ],
)
def test_refused_pairs(confidence: list, correct: list, message: str) -> None:
    for metric in BINNED_AND_SMOOTH.values():
        with pytest.raises(ValueError, match=message):
            metric(confidence, correct)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0.0, 1.0]], [2], r"0\.\.1"),
        ([[0.0, 1.0]], [-1], r"0\.\.1"),
        ([[0.0, 1.0]], [0.5], "integers"),
        ([[0.0, np.nan]], [0], "NaN"),
        ([[0.0, np.inf]], [0], "infinite"),
        ([0.0, 1.0], [0], r"shape \[N, K\]"),
        ([[0.0, 1.0]], [0, 1], r"shape \[1\]"),
        (np.zeros((0, 2)), np.zeros(0, int), "empty"),
    ],
)
def test_refused_logits(logits: list, labels: list, message: str) -> None:
    for metric in (metrics.negative_log_likelihood, metrics.brier_score):
        with pytest.raises(ValueError, match=message):
            metric(logits, labels)


@pytest.mark.parametrize("bins", [0, -1, 2.5])
def test_refused_bins(bins: float) -> None:
    with pytest.raises(ValueError, match="bins"):
        metrics.expected_calibration_error([0.5], [1], bins)


@pytest.mark.parametrize(
    ("confidence", "correct", "error"), [(0.0, 0, 0), (1.0, 1, 0), (0.3, 1, 0.7)]
)
def test_one_image(confidence: float, correct: int, error: float) -> None:
    for name in ("ece15", "mce15", "rmsce15", "ace15_tiesafe", "ks_tiesafe"):
        assert BINNED_AND_SMOOTH[name]([confidence], [correct]) == pytest.approx(error)


def test_debiasing_takes_away_what_chance_adds() -> None:
    random = np.random.default_rng(0)
    squares = []
    for _ in range(300):
        confidence = random.beta(4, 1, 200)
        correct = random.random(200) < confidence
        table = metrics.reliability_bins(confidence, correct)
        squares.append([metrics._mean_square(table, debiased) for debiased in (False, True)])
    plain, debiased = np.mean(squares, axis=0)
    # 15 bins of 200 images: about 8 filled bins, each with variance c (1 - c) / n of its own.
    assert plain > 0.003
    assert abs(debiased) < 0.1 * plain


@pytest.mark.parametrize("name", GOLDEN)
def test_corp_golden(name: str) -> None:
    expected = GOLDEN[name]["expected"]
    d = corp_decomposition(*golden_inputs(name))
    assert d.miscalibration == pytest.approx(expected["corp_mcb"], abs=1e-9)
    assert d.discrimination == pytest.approx(expected["corp_dsc"], abs=1e-9)
    assert d.uncertainty == pytest.approx(expected["corp_unc"], abs=1e-9)
    assert d.score == pytest.approx(expected["top_brier"], abs=1e-9)


@given(PAIRS)
def test_corp_is_exact_and_its_curve_is_scikit_learns(pair: tuple) -> None:
    confidence, correct = pair
    d = corp_decomposition(confidence, correct)
    assert d.score == pytest.approx(d.miscalibration - d.discrimination + d.uncertainty, abs=1e-12)
    assert d.miscalibration >= -1e-12
    assert d.discrimination >= -1e-12
    curve = isotonic_curve(confidence, correct)
    reference = IsotonicRegression(out_of_bounds="clip").fit(confidence, correct)
    assert curve.accuracy == pytest.approx(reference.predict(curve.confidence), abs=1e-9)
    assert (np.diff(curve.accuracy) >= -1e-12).all()
    assert curve.count.sum() == len(confidence)
    order = np.random.default_rng(0).permutation(len(confidence))
    again = corp_decomposition(confidence[order], correct[order])
    assert again.miscalibration == pytest.approx(d.miscalibration, abs=1e-12)


def test_scores_that_do_not_saturate() -> None:
    logits = np.zeros((6, 4))
    logits[:, 0] = [0.5, 5, 50, 60, 70, 90]
    scores = score_images(logits, np.zeros(6, int))
    p = np.exp(scipy_log_softmax(logits[:2], axis=1))
    ordered = np.sort(p, axis=1)
    assert scores.margin[:2] == pytest.approx(-np.log(1 - (ordered[:, -1] - ordered[:, -2])))
    assert scores.doctor[:2] == pytest.approx(-np.log(1 - (p**2).sum(1)))
    assert scores.energy == pytest.approx(np.log(np.exp(logits).sum(1)))
    assert (scores.max_logit == logits[:, 0]).all()
    for name in ("log_confidence", "margin", "doctor", "max_logit", "energy"):
        assert (np.diff(getattr(scores, name)) > 0).all(), name
    assert (np.diff(scores.entropy) < 0).all()
    assert (np.diff(scores.brier) < 0).all()
    far = score_images([[2000.0, 0.0]], [0])
    assert np.isfinite([far.margin[0], far.doctor[0]]).all()
