"""TS-valid: a temperature fitted on images that were kept apart, beside the optimum."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from flatcal_dist.calibration.metrics import expected_calibration_error
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.records.temperatures import Apart
from flatcal_dist.calibration.report.writing import read_report, render_report, write_report
from tests.support.synthetic import make_logits

IDS, LABELS, LOGITS = make_logits(600)
_, THEIRS, KEPT = make_logits(200, images_seed=7, scale=2.4)
APART = Apart(THEIRS, KEPT)


def nll(logits: np.ndarray, labels: np.ndarray, t: float) -> float:
    return -log_softmax(logits.astype(np.float64) / t, axis=1)[
        np.arange(len(labels)), labels
    ].mean()


def best(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of least NLL by another search, to 1e-6."""
    found = minimize_scalar(
        lambda u: nll(logits, labels, np.exp(u)), bounds=(-2, 3), options={"xatol": 1e-9}
    )
    return float(np.exp(found.x))


@pytest.fixture(scope="module")
def records() -> Records:
    return Records.from_logits(IDS, LABELS, LOGITS, apart=APART)


def test_all_images_are_scored_by_the_temperature_of_the_others(records: Records) -> None:
    t = best(KEPT, THEIRS)
    assert records.temperature == pytest.approx(t, abs=1e-5)
    assert len(records) == 600
    assert records.held_out == 200
    assert records.after.nll.mean() == pytest.approx(nll(LOGITS, LABELS, t), abs=1e-6)
    again = Records.from_logits(IDS, (LABELS + 1) % 10, LOGITS, apart=APART)
    assert again.temperature == records.temperature, "the labels of evaluated images are not used"


def test_the_optimum_stands_beside_it_and_scales_nothing(records: Records) -> None:
    t = best(LOGITS, LABELS)
    assert records.source.own_temperature == pytest.approx(t, abs=1e-5)
    assert records.optimum is not None
    assert records.optimum.nll.mean() == pytest.approx(nll(LOGITS, LABELS, t), abs=1e-6)
    assert records.optimum.nll.mean() < records.after.nll.mean() < records.before.nll.mean()


def test_ids_that_both_have_are_scored_all_the_same(tmp_path: Path) -> None:
    """The images of two ImageFolder trees often have the same names."""
    both = Records.from_logits(IDS[:200], LABELS[:200], LOGITS[:200], apart=APART)
    assert len(both) == 200


def test_the_report_shows_both_and_marks_the_optimum(records: Records, tmp_path: Path) -> None:
    m = write_report(records, tmp_path, resamples=200)
    none, valid, optimum = m.temperatures
    assert [row.name for row in m.temperatures] == ["as_trained", "ts_valid", "test_optimum"]
    assert [row.saw_the_labels for row in m.temperatures] == [False, False, True]
    assert [row.images for row in m.temperatures] == [0, 200, 600]
    assert (none.temperature, valid.temperature) == (1.0, m.temperature)
    for row, side in ((none, m), (valid, m.after_temperature)):
        assert all(value == side.value(key) for key, value in row.figures.items())
    p = np.exp(log_softmax(LOGITS.astype(np.float64) / optimum.temperature, axis=1))
    ece = expected_calibration_error(p.max(1), p.argmax(1) == LABELS)
    assert optimum.figures["ece"] == pytest.approx(ece, abs=1e-9)
    assert "200 training images that were not trained on" in m.conventions["after_temperature"]
    page = (tmp_path / "index.html").read_text()
    assert "TS-valid" in page
    assert "with their labels: no result" in page
    loaded, again = read_report(tmp_path)
    assert loaded == m
    assert again.optimum is not None
    assert np.array_equal(again.optimum.nll, records.optimum.nll)
    render_report(tmp_path)
    assert (tmp_path / "index.html").read_text() == page


def test_images_under_shift_are_scored_by_it(records: Records, tmp_path: Path) -> None:
    records.save(tmp_path / "r.parquet")
    for clean in (records, Records.load(tmp_path / "r.parquet")):
        shifted = Records.from_logits(IDS, LABELS, LOGITS * 1.5, clean=clean)
        assert shifted.temperature == records.temperature
        assert shifted.source.temperature_from == "clean images"
        assert not shifted.source.fitted_apart
        assert shifted.optimum is None
        expected = nll(LOGITS * 1.5, LABELS, records.temperature)
        assert shifted.after.nll.mean() == pytest.approx(expected, abs=1e-6)


def test_without_images_apart_nothing_changes(tmp_path: Path) -> None:
    plain = Records.from_logits(IDS, LABELS, LOGITS)
    assert plain.optimum is None
    assert plain.source.own_temperature is None
    assert write_report(plain, tmp_path, resamples=50).temperatures == []
