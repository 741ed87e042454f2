import warnings

import numpy as np
import pytest

from flatcal_dist.calibration.calibrators.crossfit import (
    CALIBRATORS,
    MOVES_ANSWERS,
    CrossFit,
    HoldOut,
    compare_calibrators,
    fit_out_of_sample,
    fold_of,
)
from flatcal_dist.calibration.calibrators.of_confidence import TopLabelHistogram, TopLabelIsotonic
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.softmax import score_images
from tests.support.synthetic import make_logits

IDS, LABELS, LOGITS = make_logits(300, 6)


def equal(a, b) -> bool:
    return all(
        (x is None and y is None) or np.array_equal(x, y)
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


@pytest.mark.parametrize("name", CALIBRATORS)
def test_no_image_is_scored_by_a_fit_that_saw_it(name: str) -> None:
    """Other labels of one fold change the fits that saw it, and not a bit of its own scores."""
    first = fit_out_of_sample(name, IDS, LOGITS, LABELS)
    held = fold_of(IDS) == 2
    changed = np.where(held, (LABELS + 1) % 6, LABELS)
    second = fit_out_of_sample(name, IDS, LOGITS, changed)
    same, other = np.flatnonzero(held), np.flatnonzero(~held)
    ids = [IDS[i] for i in same]
    before, after = (f.score(ids, LOGITS[same], LABELS[same]) for f in (first, second))
    assert equal(before, after)
    ids = [IDS[i] for i in other]
    before, after = (f.score(ids, LOGITS[other], LABELS[other]) for f in (first, second))
    assert equal(before, after) == (name == "identity")


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_hold_out_refuses_what_it_was_fitted_on(name: str) -> None:
    fit = fit_out_of_sample(name, IDS, LOGITS, LABELS, HoldOut(0.3))
    kept = fit.may_score(IDS)
    assert (~kept == HoldOut(0.3).chosen(IDS)).all()
    assert 0.2 < (~kept).mean() < 0.4
    with pytest.raises(ValueError, match="images were fitted on, first 'image/"):
        fit.score(IDS, LOGITS, LABELS)
    scores = fit.score([IDS[i] for i in np.flatnonzero(kept)], LOGITS[kept], LABELS[kept])
    assert len(scores.correct) == kept.sum()
    if name == "temperature":
        alone = TemperatureScaling().fit(LOGITS[~kept], LABELS[~kept]).temperature
        assert fit.overall.temperature == alone


@pytest.mark.parametrize("name", CALIBRATORS)
def test_which_calibrators_keep_the_answers(name: str) -> None:
    scores = fit_out_of_sample(name, IDS, LOGITS, LABELS).score(IDS, LOGITS, LABELS)
    same = (scores.correct == (LOGITS.argmax(1) == LABELS)).all()
    assert same or name in MOVES_ANSWERS
    assert not same or name not in MOVES_ANSWERS or name == "matrix"  # too few images to move one
    assert ((scores.confidence >= 0) & (scores.confidence <= 1)).all()


def test_cross_fit_temperature_is_the_fit_on_the_other_folds() -> None:
    fit = fit_out_of_sample("temperature", IDS, LOGITS, LABELS, CrossFit(3, seed=7))
    fold = fold_of(IDS, 3, seed=7)
    for f in range(3):
        others = fold != f
        alone = TemperatureScaling().fit(LOGITS[others], LABELS[others]).temperature
        assert fit.per_fold[f].temperature == pytest.approx(alone, rel=1e-10)
        mine = np.flatnonzero(~others)
        scores = fit.score([IDS[i] for i in mine], LOGITS[mine], LABELS[mine])
        direct = score_images(LOGITS[mine].astype(float) / alone, LABELS[mine])
        assert scores.nll == pytest.approx(direct.nll, rel=1e-9)
    overall = TemperatureScaling().fit(LOGITS, LABELS).temperature
    assert fit.overall.temperature == pytest.approx(overall, rel=1e-12)


def test_order_of_images_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(300)
    fit = fit_out_of_sample("temperature", IDS, LOGITS, LABELS)
    turned = fit.score([IDS[i] for i in order], LOGITS[order], LABELS[order])
    assert equal(fit.score(IDS, LOGITS, LABELS).take(order), turned)


def test_unseen_images_get_the_overall_fit_and_corrupted_ones_that_of_their_source() -> None:
    fit = fit_out_of_sample("temperature", IDS, LOGITS, LABELS)
    new = fit.temperatures(["new/1", "new/2"])
    assert (new == fit.overall.temperature).all()
    known = fit.temperatures(IDS[:50])
    expected = [fit.per_fold[f].temperature for f in fold_of(IDS[:50])]
    assert known.tolist() == expected
    with pytest.raises(ValueError, match="VectorScaling is more than a temperature"):
        fit_out_of_sample("vector", IDS, LOGITS, LABELS).temperatures(IDS)


def test_folds_depend_on_id_and_seed_alone() -> None:
    ids = [f"n{i}" for i in range(1000)]
    assert fold_of(["ILSVRC2012_val_00000001", "n1", "n2", "n3"]).tolist() == [2, 1, 1, 0]
    assert (fold_of(ids)[::-1] == fold_of(ids[::-1])).all()
    assert (fold_of(ids) != fold_of(ids, seed=1)).mean() > 0.7
    assert (np.abs(np.bincount(fold_of(ids)) - 200) < 50).all()
    assert abs(HoldOut(0.25).chosen(ids).mean() - 0.25) < 0.05


@pytest.mark.parametrize("name", CALIBRATORS)
def test_one_image_is_left_as_it_is(name: str) -> None:
    logits, labels = np.array([[1.0, 0.0]]), np.array([0])
    for split in (CrossFit(), HoldOut(0.01)):
        with pytest.warns(RuntimeWarning):
            fit = fit_out_of_sample(name, ["a"], logits, labels, split)
        scores = fit.score(["a"], logits, labels)
        assert scores.confidence == pytest.approx([np.e / (1 + np.e)])
        assert scores.correct.tolist() == [True]


def test_comparison_is_on_the_same_images() -> None:
    kept, table = compare_calibrators(IDS, LOGITS, LABELS, list(CALIBRATORS))
    assert kept.all()
    assert list(table) == list(CALIBRATORS)
    nll = {name: scores.nll.mean() for name, scores in table.items() if scores.nll is not None}
    assert set(nll) == set(CALIBRATORS) - {"isotonic", "histogram"}
    assert nll["temperature"] < nll["identity"]
    ece = {n: metrics.expected_calibration_error(s.confidence, s.correct) for n, s in table.items()}
    assert all(ece[name] < ece["identity"] for name in ("temperature", "isotonic", "histogram"))
    kept, table = compare_calibrators(IDS, LOGITS, LABELS, ["identity"], HoldOut(0.5))
    assert (kept == ~HoldOut(0.5).chosen(IDS)).all()
    assert len(table["identity"].correct) == kept.sum()


def test_refused() -> None:
    with pytest.raises(ValueError, match="unique"):
        fit_out_of_sample("temperature", ["a"] * 300, LOGITS, LABELS)
    with pytest.raises(ValueError, match="equal lengths"):
        fit_out_of_sample("temperature", IDS[:9], LOGITS, LABELS)
    with pytest.raises(ValueError, match="at least 2"):
        CrossFit(1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        HoldOut(1.0)
    with pytest.raises(ValueError, match="no calibrator is called 'platt'"):
        fit_out_of_sample("platt", IDS, LOGITS, LABELS)
    for calibrator in (TopLabelIsotonic(), TopLabelHistogram()):
        with pytest.raises(RuntimeError, match="fit"):
            calibrator.transform([0.5])


def test_no_warning_on_ordinary_logits() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in CALIBRATORS:
            fit_out_of_sample(name, IDS, LOGITS, LABELS)


def test_isotonic_and_histogram_are_the_accuracies_of_their_blocks() -> None:
    confidence = np.array([0.2, 0.4, 0.4, 0.6, 0.8, 0.9])
    correct = np.array([0, 1, 0, 0, 1, 1])
    isotonic = TopLabelIsotonic().fit(confidence, correct)
    # 0.4 (1 of 2) and 0.6 (0 of 1) are pooled to a third.
    assert isotonic.transform([0.1, 0.4, 0.6, 0.7, 0.95]) == pytest.approx(
        [0, 1 / 3, 1 / 3, 2 / 3, 1]
    )
    histogram = TopLabelHistogram(3).fit(confidence, correct)
    # Two images each, but the two of 0.4 share a bin: 0.2 and 0.4, 0.6, and the last two.
    transformed = histogram.transform([0.0, 0.35, 0.65, 1.0])
    assert transformed == pytest.approx([1 / 3, 1 / 3, 0, 1])
    tied = TopLabelHistogram(15).fit(np.full(30, 0.5), np.arange(30) % 2)
    assert tied.transform([0.1, 0.9]) == pytest.approx([0.5, 0.5])
