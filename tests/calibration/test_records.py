from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flatcal_dist.calibration.crossfit import fit_out_of_sample
from flatcal_dist.calibration.records import Records, Scores
from flatcal_dist.calibration.softmax import score_images

from .synthetic import make_logits


def same(a: object, b: object) -> bool:
    if isinstance(a, Scores):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(Scores))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool((a == b).all())
    return a == b


def assert_same(a: Records, b: Records) -> None:
    for f in fields(Records):
        assert same(getattr(a, f.name), getattr(b, f.name)), f.name


def test_round_trip_is_exact(records: Records, tmp_path) -> None:
    path = tmp_path / "records.parquet"
    records.save(path)
    assert_same(Records.load(path), records)
    assert [p.name for p in tmp_path.iterdir()] == ["records.parquet"]
    table = pq.read_table(path)
    assert table.num_columns == 25
    assert table["confidence"].to_numpy() == pytest.approx(records.confidence, abs=0)


def test_order_of_the_input_does_not_matter() -> None:
    ids, labels, logits = make_logits(60)
    order = np.random.default_rng(0).permutation(60)
    first = Records.from_logits(ids, labels, logits)
    second = Records.from_logits([ids[i] for i in order], labels[order], logits[order])
    assert_same(first, second)
    assert first.id.tolist() == sorted(ids)


def test_scores_before_and_after(records: Records) -> None:
    ids, labels, logits = make_logits(400)
    direct = score_images(logits, labels)
    assert (records.before.nll == direct.nll).all()
    assert (records.prediction == logits.argmax(1)).all()
    assert (records.correct == (logits.argmax(1) == labels)).all()
    fit = fit_out_of_sample("temperature", ids, logits, labels)
    after = score_images(logits / fit.temperatures(ids)[:, None], labels)
    assert records.after.log_confidence == pytest.approx(after.log_confidence, rel=1e-12)
    assert records.after.entropy == pytest.approx(after.entropy, rel=1e-10)
    assert (records.after.correct == records.correct).all()
    assert records.temperature == fit.overall.temperature
    assert records.after.nll.mean() < records.before.nll.mean()


def test_temperature_never_changes_what_is_correct() -> None:
    # Logits one ulp apart can become equal when divided; what is correct must stay.
    first = np.linspace(1.9, 1.99, 200)
    logits = np.stack([first, np.nextafter(first, 2.0), np.full(200, -0.83)], axis=1)
    labels = np.where(np.arange(200) % 10 == 0, 2, 1)
    ids = [str(i) for i in range(200)]
    fit = fit_out_of_sample("temperature", ids, logits, labels)
    divided = logits / fit.temperatures(ids)[:, None]
    assert (score_images(divided, labels).correct != score_images(logits, labels).correct).any()
    records = Records.from_logits(ids, labels, logits)
    assert (records.after.correct == records.before.correct).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a", "b", "b"]}, "1 ids occur more than once, first 'b'"),
        ({"ids": ["a", "b"]}, "equal lengths"),
        ({"expected": 4}, "expected 4 images, got 3"),
        ({"labels": [0, 1, 2]}, r"0\.\.1"),
        ({"logits": [[0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]}, "1 images are NaN"),
    ],
)
def test_refused(change: dict, message: str) -> None:
    arguments = {
        "ids": ["a", "b", "c"],
        "labels": [0, 1, 0],
        "logits": [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]],
    }
    with pytest.raises(ValueError, match=message):
        Records.from_logits(**(arguments | change))


def test_other_parquet_files_are_refused(tmp_path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="holds no records"):
        Records.load(tmp_path / "x.parquet")
