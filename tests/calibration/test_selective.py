from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    auc,
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from flatcal_dist.calibration.metrics import selective
from tests.support.synthetic import GOLDEN, golden_inputs

GOLDEN_NAMES = {
    "aurc": selective.aurc,
    "eaurc_exact": selective.eaurc,
    "augrc": selective.augrc,
    "auroc": selective.auroc,
    "fpr95": selective.fpr_at_95_tpr,
    "aupr_success_ap": selective.aupr_success,
    "aupr_error_ap": selective.aupr_error,
}
ALL = tuple(GOLDEN_NAMES.values())

PAIRS = st.lists(
    st.tuples(st.integers(0, 12).map(lambda k: k / 12), st.booleans()), min_size=1, max_size=50
).map(lambda pairs: (np.array([c for c, _ in pairs]), np.array([a for _, a in pairs])))
MIXED = PAIRS.filter(lambda pair: 0 < pair[1].sum() < len(pair[1]))


@pytest.mark.parametrize(
    ("name", "metric"),
    [
        (name, metric)
        for name in GOLDEN
        for metric in GOLDEN_NAMES
        if metric in GOLDEN[name]["expected"]
    ],
)
def test_golden(name: str, metric: str) -> None:
    value = GOLDEN_NAMES[metric](*golden_inputs(name))
    assert value == pytest.approx(GOLDEN[name]["expected"][metric], abs=1e-9)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_options(name: str) -> None:
    expected, pair = GOLDEN[name]["expected"], golden_inputs(name)
    published = selective.aurc(*pair) - selective.eaurc(*pair, optimum="continuous")
    assert published == pytest.approx(expected["aurc_opt_continuous"], abs=1e-9)
    exact = selective.aurc(*pair) - selective.eaurc(*pair)
    assert exact == pytest.approx(expected["aurc_opt_exact"], abs=1e-9)
    if "aupr_success_trapz" in expected:
        trapezoid = selective.aupr_success(*pair, method="trapezoid")
        assert trapezoid == pytest.approx(expected["aupr_success_trapz"], abs=1e-9)


def aurc_in_order(correct: list[bool]) -> float:
    """Mean of the selective risks of an untied order, by a plain loop."""
    wrong, total = 0, 0.0
    for k, a in enumerate(correct, start=1):
        wrong += not a
        total += wrong / k
    return total / len(correct)


@given(PAIRS.filter(lambda pair: len(pair[0]) <= 6))
def test_aurc_is_the_mean_over_all_orders_of_ties(pair: tuple) -> None:
    confidence, correct = pair
    values = [
        aurc_in_order([correct[i] for i in order])
        for order in permutations(range(len(confidence)))
        if all(confidence[i] >= confidence[j] for i, j in pairwise(order))
    ]
    assert selective.aurc(confidence, correct) == pytest.approx(np.mean(values), abs=1e-12)


@given(MIXED)
def test_scikit_learn_agrees(pair: tuple) -> None:
    confidence, correct = pair
    assert selective.auroc(*pair) == pytest.approx(roc_auc_score(correct, confidence))
    expected = average_precision_score(correct, confidence)
    assert selective.aupr_success(*pair) == pytest.approx(expected)
    expected = average_precision_score(~correct, -confidence)
    assert selective.aupr_error(*pair) == pytest.approx(expected)
    for score, positive, metric in (
        (confidence, correct, selective.aupr_success),
        (-confidence, ~correct, selective.aupr_error),
    ):
        precision, recall, _ = precision_recall_curve(positive, score)
        assert metric(*pair, method="trapezoid") == pytest.approx(auc(recall, precision))
    fpr, tpr, _ = roc_curve(correct, confidence, drop_intermediate=False)
    assert selective.fpr_at_95_tpr(*pair) == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min())


@given(MIXED)
def test_augrc_identity(pair: tuple) -> None:
    accuracy = pair[1].mean()
    error = 1 - accuracy
    expected = (1 - selective.auroc(*pair)) * accuracy * error + error**2 / 2
    assert selective.augrc(*pair) == pytest.approx(expected, abs=1e-12)


@given(PAIRS, st.randoms(use_true_random=False))
def test_only_the_order_of_scores_counts(pair: tuple, random: object) -> None:
    confidence, correct = pair
    order = list(range(len(confidence)))
    random.shuffle(order)
    for metric in ALL:
        value = metric(confidence, correct)
        assert metric(confidence[order], correct[order]) == pytest.approx(value, abs=1e-12)
        assert metric(np.exp(5 * confidence) - 7, correct) == pytest.approx(value, abs=1e-12)


@given(MIXED, st.integers(2, 4))
def test_repeating_the_data(pair: tuple, times: int) -> None:
    repeated = tuple(np.tile(x, times) for x in pair)
    for metric in (
        selective.augrc,
        selective.auroc,
        selective.fpr_at_95_tpr,
        selective.aupr_success,
        selective.aupr_error,
    ):
        assert metric(*repeated) == pytest.approx(metric(*pair), abs=1e-12)


@given(PAIRS)
def test_bounds(pair: tuple) -> None:
    error = 1 - pair[1].mean()
    assert -1e-12 <= selective.eaurc(*pair) <= selective.aurc(*pair) + 1e-12
    assert error**2 / 2 - 1e-12 <= selective.augrc(*pair) <= error + 1e-12


@given(PAIRS, st.floats(0.01, 1), st.floats(0, 1))
def test_points_of_the_curve(pair: tuple, coverage: float, risk: float) -> None:
    covered, risks = selective.risk_coverage_curve(*pair)
    assert covered[-1] == 1
    assert risks[-1] == pytest.approx(1 - pair[1].mean())
    assert (np.diff(covered) > 0).all()
    assert len(covered) == len(np.unique(pair[0]))
    for c, r in zip(covered, risks, strict=True):
        assert selective.risk_at_coverage(*pair, c) == pytest.approx(r)
    reached = selective.coverage_at_risk(*pair, risk)
    allowed = [c for c, r in zip(covered, risks, strict=True) if r <= risk + 1e-12]
    assert reached == (max(allowed) if allowed else 0.0)
    threshold = selective.threshold_at_risk(*pair, risk)
    if threshold is None:
        assert reached == 0
    else:
        assert (pair[0] >= threshold).mean() == pytest.approx(reached)
    assert 0 <= selective.risk_at_coverage(*pair, coverage) <= 1


def test_points_of_known_vectors() -> None:
    pair = golden_inputs("A_distinct")
    assert selective.risk_at_coverage(*pair, 0.8) == pytest.approx(0.25)
    assert selective.coverage_at_risk(*pair, 0.25) == pytest.approx(0.8)
    coverage, risk = selective.risk_coverage_curve(*golden_inputs("B_ties_and_one"))
    assert coverage == pytest.approx([0.3, 0.5, 0.7, 0.9, 1])
    assert risk == pytest.approx([1 / 3, 2 / 5, 2 / 7, 1 / 3, 2 / 5])
    # Half of the tied pair at 0.9: one of two is wrong, so half an error is expected.
    assert selective.risk_at_coverage(*golden_inputs("B_ties_and_one"), 0.4) == pytest.approx(0.375)


def test_rounding_does_not_move_a_coverage() -> None:
    confidence, correct = np.linspace(1, 0.1, 100), np.arange(100) < 55
    assert selective.risk_at_coverage(confidence, correct, 0.55) == 0


def test_true_positive_rate_of_exactly_95_per_cent_is_enough() -> None:
    confidence = np.linspace(1, 0.1, 21)
    correct = np.ones(21, bool)
    correct[19] = False  # 19 of 20 correct images stand before the wrong one
    assert selective.fpr_at_95_tpr(confidence, correct) == 0.0


def test_all_correct_and_all_wrong() -> None:
    confidence = np.linspace(0.1, 0.9, 7)
    right, wrong = np.ones(7, bool), np.zeros(7, bool)
    for metric in (selective.auroc, selective.fpr_at_95_tpr):
        assert metric(confidence, right) is None
        assert metric(confidence, wrong) is None
    assert selective.aupr_error(confidence, right) is None
    assert selective.aupr_success(confidence, wrong) is None
    assert selective.aurc(confidence, right) == selective.augrc(confidence, right) == 0
    assert selective.aurc(confidence, wrong) == pytest.approx(1)
    assert selective.augrc(confidence, wrong) == pytest.approx(0.5)
    assert selective.eaurc(confidence, wrong) == pytest.approx(0)
    assert selective.eaurc(confidence, wrong, optimum="continuous") == pytest.approx(0)
    assert selective.threshold_at_risk(confidence, wrong, 0.05) is None


def test_one_image() -> None:
    assert selective.aurc([0.4], [1]) == 0
    assert selective.aurc([0.4], [0]) == 1
    assert selective.auroc([0.4], [1]) is None


def test_scores_need_not_be_probabilities_but_numbers() -> None:
    assert selective.auroc([-3.0, 12.0], [0, 1]) == 1
    for metric in ALL:
        with pytest.raises(ValueError, match="NaN"):
            metric([0.5, np.nan], [0, 1])
        with pytest.raises(ValueError, match="equal lengths"):
            metric([0.5], [0, 1])
        with pytest.raises(ValueError, match="empty"):
            metric([], [])


def test_refused_options() -> None:
    with pytest.raises(ValueError, match="optimum"):
        selective.eaurc([0.5], [1], optimum="best")
    with pytest.raises(ValueError, match="method"):
        selective.aupr_success([0.5], [1], method="spline")
    with pytest.raises(ValueError, match="coverage"):
        selective.risk_at_coverage([0.5], [1], 0)
    with pytest.raises(ValueError, match="risk"):
        selective.coverage_at_risk([0.5], [1], 1.5)


@given(MIXED)
def test_naurc_is_aurc_between_oracle_and_chance(pair: tuple) -> None:
    correct = pair[1]
    error = 1 - correct.mean()
    best = selective.aurc(correct.astype(float) + 1e-3 * np.arange(len(correct)), correct)
    expected = (selective.aurc(*pair) - best) / (error - best)
    assert selective.naurc(*pair) == pytest.approx(expected, abs=1e-9)
    assert selective.naurc(np.zeros(len(correct)), correct) == pytest.approx(1)
    assert selective.naurc(correct.astype(float) + 1e-3 * np.arange(len(correct)), correct) == (
        pytest.approx(0, abs=1e-9)
    )


def test_naurc_without_failures() -> None:
    assert selective.naurc([0.1, 0.9], [1, 1]) is None
    assert selective.naurc([0.1, 0.9], [0, 0]) is None


@given(PAIRS, st.integers(1, 5))
def test_histograms_of_scores_are_tie_groups(pair: tuple, parts: int) -> None:
    """Sums of shards, empty cells included, give what one pass over the images gives."""
    confidence, correct = pair
    cells = np.rint(12 * confidence).astype(int)
    right, wrong = np.zeros(13), np.zeros(13)
    for shard in range(parts):
        mine = np.arange(len(cells)) % parts == shard
        right += np.bincount(cells[mine & correct], minlength=13)
        wrong += np.bincount(cells[mine & ~correct], minlength=13)
    groups = selective.TieGroups.of((right + wrong)[::-1], wrong[::-1])
    for name in ("aurc", "eaurc", "naurc", "augrc", "auroc", "fpr_at_95_tpr", "aupr_success",
                 "aupr_error"):  # fmt: skip
        value = getattr(selective, f"groups_{name}")(groups)
        assert value == pytest.approx(getattr(selective, name)(*pair), abs=1e-12), name
    for risk in (0.0, 0.05, 0.3):
        value = selective.groups_coverage_at_risk(groups, risk)
        assert value == pytest.approx(selective.coverage_at_risk(*pair, risk), abs=1e-12)
