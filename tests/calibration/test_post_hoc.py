import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import LogisticRegression

from flatcal_dist.calibration.after_training.post_hoc import ROWS, left_out, post_hoc
from flatcal_dist.calibration.calibrators import (
    DirichletScaling,
    MatrixScaling,
    OneVsRestHistogram,
    OneVsRestIsotonic,
    TemperatureScaling,
    VectorScaling,
    fit_out_of_sample,
)
from flatcal_dist.calibration.calibrators.crossfit import fold_of
from flatcal_dist.calibration.calibrators.refinement import refined_nll
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.records.temperatures import Apart
from flatcal_dist.calibration.report.model import read_metrics
from flatcal_dist.calibration.report.writing import read_report, write_report
from tests.support.synthetic import DEGENERATE, degenerate, make_logits

IDS, LABELS, LOGITS = make_logits(240, 4)


def odir(x: np.ndarray, v: np.ndarray, b: np.ndarray, strength: float, diagonal: float) -> float:
    """Mean NLL and penalty of softmax(x + V x + b), as loops."""
    classes = len(b)
    loss = 0.0
    for row, label in zip(x, LABELS, strict=True):
        z = [row[i] + sum(v[i, j] * row[j] for j in range(classes)) + b[i] for i in range(classes)]
        loss += math.log(sum(math.exp(value) for value in z)) - z[label]
    off = sum(v[i, j] ** 2 for i in range(classes) for j in range(classes) if i != j)
    own = sum(v[i, i] ** 2 for i in range(classes))
    penalty = off / (classes * (classes - 1)) + (diagonal * own + b @ b) / classes
    return loss / len(x) + strength * penalty


@pytest.mark.parametrize("strength", [0.01, 1.0])
@pytest.mark.parametrize(("kind", "diagonal"), [(MatrixScaling, 1.0), (DirichletScaling, 0.0)])
def test_matrices_minimise_the_papers_objective(kind, diagonal: float, strength: float) -> None:
    fit = kind(strength).fit(LOGITS, LABELS)
    t = TemperatureScaling().fit(LOGITS, LABELS).temperature
    x = (
        LOGITS.astype(float) / t
        if kind is MatrixScaling
        else log_softmax(LOGITS.astype(float), axis=1)
    )
    least = odir(x, fit.weight, fit.bias, strength, diagonal)
    random = np.random.default_rng(0)
    for size in (1e-2, 1e-1):  # convex: no point around the minimum is below it
        for _ in range(6):
            v = fit.weight + random.normal(0, size, (4, 4))
            b = fit.bias + random.normal(0, size, 4)
            assert odir(x, v, b, strength, diagonal) > least
    expected = softmax(x + x @ fit.weight.T + fit.bias, axis=1)
    assert softmax(fit.transform(LOGITS), axis=1) == pytest.approx(expected, abs=1e-12)


def test_dirichlet_without_a_penalty_is_logistic_regression_on_log_probabilities() -> None:
    x = log_softmax(LOGITS.astype(float), axis=1)
    theirs = LogisticRegression(C=1e6, max_iter=5000, tol=1e-8).fit(x, LABELS)
    ours = softmax(DirichletScaling(1e-7).fit(LOGITS, LABELS).transform(LOGITS), axis=1)
    assert np.abs(ours - theirs.predict_proba(x)).max() < 0.02
    pick = np.arange(len(x)), LABELS
    nll, other = (-np.log(p[pick]).mean() for p in (ours, theirs.predict_proba(x)))
    assert nll == pytest.approx(other, abs=1e-4)


def test_a_strong_penalty_leaves_the_temperature() -> None:
    scaled = LOGITS / TemperatureScaling().fit(LOGITS, LABELS).temperature
    fit = MatrixScaling(1e9).fit(LOGITS, LABELS)
    assert fit.transform(LOGITS) == pytest.approx(scaled, abs=1e-5)


def test_a_matrix_is_used_where_it_helps() -> None:
    """Images of class 0 get the logits of class 1 half of the time; a matrix can undo it."""
    ids, labels, logits = make_logits(3000, 4)
    mixed = logits @ np.array([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    rows = {row.name: row.figures for row in post_hoc(ids, labels, mixed).calibrators}
    for name in ("matrix", "dirichlet"):
        assert rows[name]["nll"] < rows["vector"]["nll"] - 0.05
        assert rows[name]["accuracy"] > rows["temperature"]["accuracy"]


def test_isotonic_is_scikit_learns_for_each_class_and_sums_to_1() -> None:
    p = softmax(LOGITS.astype(float), axis=1)
    curves = []
    for k in range(4):
        order = np.argsort(p[:, k], kind="stable")
        fitted = np.empty(len(p))
        fitted[order] = isotonic_regression((k == LABELS)[order].astype(float))
        curves.append(fitted)
    raw = np.stack(curves, axis=1)
    expected = raw / raw.sum(axis=1, keepdims=True)
    found = np.exp(OneVsRestIsotonic().fit(LOGITS, LABELS).transform(LOGITS))
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_histogram_is_the_frequency_of_each_bin() -> None:
    p = softmax(LOGITS.astype(float), axis=1)
    fit = OneVsRestHistogram(bins=5).fit(LOGITS, LABELS)
    raw = np.empty_like(p)
    for i, k in np.ndindex(*p.shape):
        bin_of = math.ceil(p[i, k] * 5) - 1
        same = [j for j in range(len(p)) if math.ceil(p[j, k] * 5) - 1 == bin_of]
        raw[i, k] = np.mean([LABELS[j] == k for j in same])
    expected = np.maximum(raw / raw.sum(axis=1, keepdims=True), 2.3e-16)
    assert np.exp(fit.transform(LOGITS)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    empty = OneVsRestHistogram(bins=2).fit([[0.0, 1.0]] * 4, [0, 1, 1, 1])  # none above 1/2
    assert np.exp(empty.transform([[9.0, 0.0]])) == pytest.approx(
        np.array([[0.75, 0.25]]) / (0.75 + 0.25), abs=1e-12
    )


@pytest.mark.parametrize("name", ROWS)
def test_labels_of_a_fold_do_not_change_its_probabilities(name: str) -> None:
    fold = fold_of(IDS)
    changed = np.where(fold == 1, (LABELS + 1) % 4, LABELS)
    first, second = (fit_out_of_sample(name, IDS, LOGITS, y).per_fold[1] for y in (LABELS, changed))
    mine = LOGITS[fold == 1]
    assert np.array_equal(first.transform(mine), second.transform(mine))


@pytest.mark.filterwarnings("ignore:no finite temperature:RuntimeWarning")
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_images(case: str) -> None:
    ids, labels, logits = degenerate(case, images=150, few=7)
    found = post_hoc(ids, labels, logits)
    for row in found.calibrators:
        assert all(np.isfinite(value) for value in row.figures.values())
    if case == "right":
        assert [row.figures["accuracy"] for row in found.calibrators[:2]] == [1, 1]
    if case == "few":
        assert all(row.by_class is None for row in found.conformal.rows)
    for kind in (VectorScaling, MatrixScaling, DirichletScaling, OneVsRestIsotonic):
        assert np.isfinite(kind().fit(logits, labels).transform(logits)).all()


def test_before_a_fit_and_wrong_strength() -> None:
    for kind in (MatrixScaling, DirichletScaling, OneVsRestIsotonic, OneVsRestHistogram):
        with pytest.raises(RuntimeError, match="fit"):
            kind().transform(LOGITS)
    with pytest.raises(ValueError, match="strength must be positive, got 0"):
        MatrixScaling(0)


def test_what_is_left_out() -> None:
    assert all(left_out(name, 10_000, 100) is None for name in ROWS)
    assert "fewer images (100) than classes (101)" in left_out("vector", 100, 101)
    assert "40,201 parameters" in left_out("matrix", 10_000, 200)
    assert left_out("vector", 10_000, 200) is None
    assert [left_out(name, 50_000, 1000) is None for name in ROWS] == [True, True] + [False] * 5


def test_the_report_holds_and_shows_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("flatcal_dist.calibration.after_training.post_hoc.MOST_WORK", 1000)
    found = post_hoc(IDS, LABELS, LOGITS)
    records = Records.from_logits(IDS, LABELS, LOGITS)
    m = write_report(replace(records, post_hoc=found), tmp_path, resamples=20)
    assert m.post_hoc == found
    assert read_report(tmp_path)[0].post_hoc == found
    page = (tmp_path / "index.html").read_text()
    assert "Left out: it has 21 parameters; with 240 images this is more than 1,000" in page
    assert page.count("may change</td>") == 5
    assert page.count("stays</td>") == 2
    assert 'id="post-hoc"' in page
    figures = found.calibrators[1].figures
    assert figures["nll"] == pytest.approx(m.after_temperature.nll, rel=1e-12)


def test_an_older_report_has_none(tmp_path: Path) -> None:
    write_report(Records.from_logits(IDS, LABELS, LOGITS), tmp_path, resamples=20)
    file = tmp_path / "metrics.json"
    older = json.loads(file.read_text())
    assert older.pop("post_hoc") is None
    file.write_text(json.dumps(older))
    assert read_metrics(file).post_hoc is None
    assert "post-hoc" not in (tmp_path / "index.html").read_text()


def test_refined_nll_is_the_nll_after_cross_fitted_temperature() -> None:
    fold, total = fold_of(IDS), 0.0
    for f in range(5):
        t = TemperatureScaling().fit(LOGITS[fold != f], LABELS[fold != f]).temperature
        log_p = log_softmax(LOGITS[fold == f].astype(float) / t, axis=1)
        total -= log_p[np.arange(len(log_p)), LABELS[fold == f]].sum()
    assert refined_nll(IDS, LOGITS, LABELS) == pytest.approx(total / len(IDS), rel=1e-9)
    assert refined_nll(IDS, 7 * LOGITS, LABELS) == pytest.approx(total / len(IDS), rel=1e-6)
    assert math.isnan(refined_nll(IDS, np.where(LOGITS > 8, np.inf, LOGITS), LABELS))


def test_images_apart_are_what_calibrators_are_fitted_on() -> None:
    ids, labels, logits = make_logits(200, 4, seed=5)
    found = post_hoc(ids, labels, logits, apart=Apart(LABELS, LOGITS))
    assert found.fitted_apart == 240
    rows = {row.name: row for row in found.calibrators}
    for name, kind in (("vector", VectorScaling), ("temperature", TemperatureScaling)):
        mended = kind().fit(LOGITS, LABELS).transform(logits)
        log_p = log_softmax(mended, axis=1)
        nll = -log_p[np.arange(200), labels].mean()
        assert rows[name].figures["nll"] == pytest.approx(nll, rel=1e-6), name
    few = post_hoc(ids, labels, logits, apart=Apart(LABELS[:3], LOGITS[:3]))
    assert "fewer images (3) than classes (4)" in few.calibrators[2].left_out
    assert post_hoc(ids, labels, logits).fitted_apart == 0
