"""Figures from sums against those of the images themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.binned import BinnedEvaluation, BinnedFigures
from flatcal_dist.calibration.softmax import score_images
from tests.support.synthetic import make_logits

EXACT = ("accuracy", "top5_accuracy", "nll", "brier", "signed_gap", "ece", "mean_entropy",
         "mean_entropy_correct", "mean_entropy_wrong")  # fmt: skip


def of_images(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    s = score_images(logits, labels)
    correct, rank_by = s.correct, s.log_confidence

    def mean(values):
        return float(values.mean()) if len(values) else None

    return {
        "accuracy": correct.mean(),
        "top5_accuracy": (s.rank < 5).mean(),
        "nll": s.nll.mean(),
        "brier": s.brier.mean(),
        "signed_gap": metrics.signed_gap(s.confidence, correct),
        "ece": metrics.expected_calibration_error(s.confidence, correct),
        "mean_entropy": s.entropy.mean(),
        "mean_entropy_correct": mean(s.entropy[correct]),
        "mean_entropy_wrong": mean(s.entropy[~correct]),
    } | {name: getattr(selective, name)(rank_by, correct) for name in ("auroc", "aurc", "augrc")}


def assert_agree(figures: BinnedFigures, expected: dict[str, float | None]) -> None:
    for name in EXACT:
        assert getattr(figures, name) == pytest.approx(expected[name], abs=1e-9), name
    for name in ("auroc", "aurc", "augrc"):
        value, error = getattr(figures, name), getattr(figures, f"{name}_error")
        if expected[name] is None:
            assert value is None
            assert error is None
        else:
            assert abs(value - expected[name]) <= error + 1e-12, name


def add_up(parts: list[BinnedEvaluation]) -> BinnedEvaluation:
    total = BinnedEvaluation(parts[0].bins, parts[0].cells)
    total.state = np.sum([part.state for part in parts], axis=0)
    return total


@pytest.mark.parametrize("scale", [0.3, 2.0, 20.0])
def test_ranks_and_batches_add_up_to_the_images(scale: float) -> None:
    _, labels, logits = make_logits(2000, scale=scale)
    parts = [BinnedEvaluation() for _ in range(4)]  # the last rank sees nothing
    for i in range(0, 2000, 100):
        parts[i // 100 % 3].add(logits[i : i + 100], labels[i : i + 100])
    parts[1].add(logits[:0], labels[:0])
    figures = add_up(parts).figures()
    expected = of_images(logits, labels)
    assert_agree(figures, expected)
    assert figures.images == 2000
    assert figures.auroc_error < 4e-3
    assert figures.aurc_error < 4e-3
    error = 1 - expected["accuracy"]
    eaurc = selective.eaurc(score_images(logits, labels).log_confidence, logits.argmax(1) == labels)
    assert figures.eaurc == pytest.approx(eaurc, abs=figures.aurc_error + 1e-12)
    identity = (1 - figures.auroc) * error * (1 - error) + error**2 / 2
    assert figures.augrc == pytest.approx(identity, abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_the_stated_error_holds_however_coarse_the_cells(
    seed: int, images: int, cells: int
) -> None:
    _, labels, logits = make_logits(images, 4, images_seed=seed)
    binned = BinnedEvaluation(cells=cells)
    binned.add(logits, labels)
    assert_agree(binned.figures(), of_images(logits, labels))


def test_one_cell_knows_no_order() -> None:
    _, labels, logits = make_logits(200)
    binned = BinnedEvaluation(cells=1)
    binned.add(logits, labels)
    figures = binned.figures()
    assert figures.auroc == 0.5
    assert figures.auroc_error == 0.5
    assert figures.aurc == pytest.approx(1 - figures.accuracy)


def test_confidences_near_one_are_told_apart() -> None:
    logits = np.zeros((4, 3))
    logits[:, 0] = [20, 25, 30, 35]
    binned = BinnedEvaluation()
    binned.add(logits, np.array([1, 0, 0, 0]))
    assert binned.figures().auroc == 1
    assert binned.figures().auroc_error == 0


@pytest.mark.parametrize("wrong", [False, True])
def test_all_correct_and_all_wrong(wrong: bool) -> None:
    _, labels, logits = make_logits(30)
    labels = logits.argmin(1) if wrong else logits.argmax(1)
    binned = BinnedEvaluation()
    binned.add(logits, labels)
    figures = binned.figures()
    assert_agree(figures, of_images(logits, labels))
    assert figures.auroc is None
    assert figures.aurc == pytest.approx(1 if wrong else 0)
    assert (figures.mean_entropy_wrong is None) != wrong
    assert (figures.mean_entropy_correct is None) == wrong


def test_no_image_at_all() -> None:
    binned = BinnedEvaluation()
    assert binned.figures() is None
    binned.add(np.zeros((0, 5)), np.zeros(0, int))
    assert binned.figures() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_broken_logits_make_figures_undefined_never_wrong(bad: float) -> None:
    _, labels, logits = make_logits(20)
    parts = [BinnedEvaluation(), BinnedEvaluation()]
    parts[0].add(logits, labels)
    logits[3, 4] = bad
    parts[1].add(logits, labels)
    figures = add_up(parts).figures()
    assert (figures.images, figures.not_finite) == (40, 1)
    rest = {k: v for k, v in vars(figures).items() if k not in ("images", "not_finite")}
    assert set(rest.values()) == {None}


def test_half_precision_and_saturated_logits() -> None:
    _, labels, logits = make_logits(300, scale=30.0)
    for z in (logits.astype(np.float16), 1e4 * logits, 0 * logits):
        binned = BinnedEvaluation()
        binned.add(z, labels)
        assert_agree(binned.figures(), of_images(z, labels))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.4"):
        BinnedEvaluation().add(np.zeros((2, 5)), np.array([0, 5]))
    with pytest.raises(ValueError, match=r"logits \[n, K\]"):
        BinnedEvaluation().add(np.zeros((2, 5)), np.array([0]))
    with pytest.raises(ValueError, match="cells"):
        BinnedEvaluation(cells=0)
