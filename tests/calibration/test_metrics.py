import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax as scipy_log_softmax
from sklearn.metrics import brier_score_loss, log_loss

from flatcal_dist.calibration import metrics
from flatcal_dist.calibration.smooth import smooth_error_at
from flatcal_dist.calibration.softmax import log_confidence, log_softmax, score_images

from .synthetic import GOLDEN, golden_inputs, make_logits

BINNED_AND_SMOOTH = {
    "ece15": metrics.expected_calibration_error,
    "mce15": metrics.maximum_calibration_error,
    "rmsce15": metrics.root_mean_square_calibration_error,
    "ace15_tiesafe": metrics.adaptive_calibration_error,
    "ks_tiesafe": metrics.kolmogorov_smirnov_error,
    "smece_auto": metrics.smooth_calibration_error,
}
SMOOTH_WIDTHS = {"smece_sigma_0_05": 0.05, "smece_sigma_0_1": 0.1}

# Confidences on a coarse grid, so that ties and bin edges are frequent.
PAIRS = st.lists(
    st.tuples(st.integers(0, 30).map(lambda k: k / 30), st.booleans()), min_size=1, max_size=60
).map(lambda pairs: (np.array([c for c, _ in pairs]), np.array([a for _, a in pairs])))


@pytest.mark.parametrize("metric", BINNED_AND_SMOOTH)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str, metric: str) -> None:
    tolerance = 1e-4 if metric == "smece_auto" else 1e-9
    value = BINNED_AND_SMOOTH[metric](*golden_inputs(name))
    assert value == pytest.approx(GOLDEN[name]["expected"][metric], abs=tolerance)


@pytest.mark.parametrize("metric", SMOOTH_WIDTHS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_smooth_at_fixed_width(name: str, metric: str) -> None:
    confidence, correct = golden_inputs(name)
    value = smooth_error_at(confidence, correct.astype(bool), SMOOTH_WIDTHS[metric])
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
