import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, logsumexp, softmax

from flatcal_dist.calibration.calibrators.crossfit import HoldOut
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.confidence.of_logits import (
    SCORES,
    Tuning,
    compare_scores,
    confidence_scores,
    logit_margin,
    max_logit_pnorm,
    tune,
)
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.softmax import score_images
from tests.support.synthetic import make_logits


def broken(images: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Logits of a network whose scale is noise: the largest probability ranks badly."""
    ids, labels, logits = make_logits(images, 20)
    noise = np.random.default_rng(5).lognormal(0, 1.5, (images, 1))
    return ids, labels, logits * noise


def test_pnorm_of_two_images() -> None:
    logits = [[5, 1, 0, -1], [2, 1.9, 0, -3]]
    assert max_logit_pnorm(logits, 5) == pytest.approx([0.9843838, 0.54115137], abs=1e-7)


@given(
    arrays(np.float64, (3, 5), elements=st.floats(-1e6, 1e6)), st.integers(1, 10), st.floats(0.1, 9)
)
def test_pnorm_is_the_formula_and_blind_to_shift_and_scale(logits, power, scale) -> None:
    centred = logits - logits.mean(1, keepdims=True)
    spread = np.abs(centred).max(1)
    seen = spread > 1e-9 * (1 + np.abs(logits).max())
    value = max_logit_pnorm(logits, power)
    norm = (np.abs(centred[seen] / spread[seen, None]) ** power).sum(1) ** (1 / power)
    expected = centred[seen].max(1) / spread[seen] / norm
    assert value[seen] == pytest.approx(expected, rel=1e-9)
    moved = max_logit_pnorm(scale * logits + 3, power)
    assert moved[seen] == pytest.approx(value[seen], rel=1e-4, abs=1e-6)


@given(arrays(np.float32, (4, 6), elements=st.floats(-1e4, 1e4, width=32)))
def test_logit_margin_is_the_log_ratio_of_two_probabilities_and_does_not_saturate(logits) -> None:
    ordered = np.sort(log_softmax(logits.astype(np.float64), axis=1))
    assert logit_margin(logits) == pytest.approx(ordered[:, -1] - ordered[:, -2], abs=1e-9)
    assert logit_margin([[900.0, 0.0, 1.0], [2.0, 2.0, -1.0]]).tolist() == [899.0, 0.0]


def test_scores_are_their_formulas() -> None:
    _, labels, logits = make_logits(50, 7)
    z = logits.astype(np.float64)
    tuning = Tuning(temperature=1.7, power=3, images=10, split=HoldOut())
    scores = confidence_scores(logits, score_images(logits, labels), tuning)
    p = softmax(z, axis=1)
    ordered = np.sort(p, axis=1)
    order_of = {
        "msp": p.max(1),
        "msp_temperature": softmax(z / 1.7, axis=1).max(1),
        "margin": ordered[:, -1] - ordered[:, -2],
        "logit_margin": ordered[:, -1] / ordered[:, -2],
        "entropy": (p * np.log(p)).sum(1),
        "doctor": (p**2).sum(1),
        "energy": logsumexp(z, axis=1),
        "max_logit": z.max(1),
        "max_logit_pnorm": max_logit_pnorm(logits, 3),
    }
    assert list(scores) == [score.key for score in SCORES] == list(order_of)
    for name, expected in order_of.items():
        assert (np.argsort(scores[name]) == np.argsort(expected)).all(), name


def test_power_and_temperature_are_chosen_on_the_held_out_images_alone() -> None:
    ids, labels, logits = broken(600)
    tuning = tune(ids, logits, labels)
    mine = HoldOut().chosen(ids)
    assert tuning.images == mine.sum()
    assert tuning.temperature == TemperatureScaling().fit(logits[mine], labels[mine]).temperature
    correct = logits[mine].argmax(1) == labels[mine]
    risks = {p: selective.aurc(max_logit_pnorm(logits[mine], p), correct) for p in range(1, 11)}
    assert tuning.power == min(risks, key=risks.get)
    changed = np.where(mine, labels, (labels + 1) % 20)
    assert tune(ids, logits, changed) == tuning


def test_pnorm_mends_a_broken_network_and_falls_back_on_a_sound_one() -> None:
    rows = {r.name: r for r in compare_scores(*_order(broken(1500)), resamples=100).rows}
    mended = rows["max_logit_pnorm"].difference["aurc"]
    assert mended.value < 0
    assert mended.excludes_zero
    ids, labels, logits = make_logits(1500, 5, scale=1.0)
    sound = compare_scores(ids, logits, labels, resamples=20)
    if sound.tuning.power is None:
        row = {r.name: r for r in sound.rows}["max_logit_pnorm"]
        assert row.difference["aurc"].value == 0


def _order(made):
    ids, labels, logits = made
    return ids, logits, labels


def test_table_is_judged_on_the_other_images() -> None:
    ids, labels, logits = make_logits(500)
    comparison = compare_scores(ids, logits, labels, resamples=50)
    judged = ~HoldOut().chosen(ids)
    assert comparison.images == judged.sum() == 500 - comparison.tuning.images
    images = score_images(logits[judged], labels[judged])
    for row in comparison.rows:
        if row.name in ("msp", "entropy", "energy"):
            score = {
                "msp": images.log_confidence,
                "entropy": -images.entropy,
                "energy": images.energy,
            }[row.name]
            for metric in ("aurc", "augrc", "auroc", "fpr_at_95_tpr", "aupr_success", "aupr_error"):
                expected = getattr(selective, metric)(score, images.correct)
                assert row.values[metric].value == pytest.approx(expected, abs=1e-12)
                assert row.values[metric].low <= row.values[metric].value <= row.values[metric].high
        if row.name == "msp":
            assert row.difference is None
        else:
            first = comparison.rows[0].values["aurc"].value
            difference = row.values["aurc"].value - first
            assert row.difference["aurc"].value == pytest.approx(difference, abs=1e-12)


def test_temperature_scaled_msp_is_msp_for_two_classes() -> None:
    """With two classes the order of the largest probability does not depend on T."""
    ids, labels, logits = make_logits(300, 2)
    rows = {r.name: r for r in compare_scores(ids, logits, labels, resamples=10).rows}
    for name in ("msp_temperature", "margin", "entropy", "doctor"):
        assert rows[name].difference["aurc"].value == pytest.approx(0, abs=1e-12), name


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_order_of_images_does_not_matter(random) -> None:
    ids, labels, logits = make_logits(120, 4)
    order = list(range(120))
    random.shuffle(order)
    first = compare_scores(ids, logits, labels, resamples=2)
    second = compare_scores([ids[i] for i in order], logits[order], labels[order], resamples=2)
    assert first.tuning.power == second.tuning.power
    for a, b in zip(first.rows, second.rows, strict=True):
        assert a.values["aurc"].value == pytest.approx(b.values["aurc"].value, abs=1e-12)


def test_degenerate_tables() -> None:
    ids, labels, _ = make_logits(40, 3)
    with pytest.raises(ValueError, match="none is left"):
        compare_scores(["a"], np.array([[1.0, 0.0]]), np.array([0]), split=HoldOut(1 - 1e-12))
    right = compare_scores(ids, 50.0 * np.eye(3)[labels], labels, resamples=10)
    for row in right.rows:
        assert row.values["aurc"].value == 0
        assert row.values["auroc"].value is None
    constant = compare_scores(ids, np.zeros((40, 3)), labels, resamples=10)
    for row in constant.rows:
        assert row.values["auroc"].value == pytest.approx(0.5)
    assert tune(["a"], [[1.0, 0.0]], [0], HoldOut(1e-12)) == Tuning(1.0, None, 0, HoldOut(1e-12))
