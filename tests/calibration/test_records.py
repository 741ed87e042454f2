import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from flatcal_dist.calibration.calibrators.crossfit import HoldOut, fit_out_of_sample
from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.confidence.of_logits import compare_scores, score_table
from flatcal_dist.calibration.metrics import calibration_errors as metrics
from flatcal_dist.calibration.records.record_files import METADATA_KEY
from flatcal_dist.calibration.records.records import Records, Scores, Source
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.report.writing import render_report, write_report
from flatcal_dist.calibration.softmax import score_images
from tests.support.synthetic import make_logits


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
    assert table.num_columns == 17 + len(records.ranking)
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
        ({"logits": [[0.0, 1.0], [np.nan, 0.0], [1.0, 1.0]]}, "of 1 image are NaN"),
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


def test_hold_out_keeps_the_images_fitted_on_out_of_the_records() -> None:
    ids, labels, logits = make_logits(300)
    records = Records.from_logits(ids, labels, logits, hold_out=0.3)
    chosen = HoldOut(0.3).chosen(ids)
    assert records.held_out == chosen.sum()
    assert records.id.tolist() == [i for i, c in zip(ids, chosen, strict=True) if not c]
    alone = TemperatureScaling().fit(logits[chosen], labels[chosen]).temperature
    assert records.temperature == alone
    assert records.fold_temperatures == ()
    direct = score_images(logits[~chosen].astype(float) / alone, labels[~chosen])
    assert records.after.nll == pytest.approx(direct.nll, rel=1e-9)
    assert records.compared.all(), "tuning used the images that are left out"
    with pytest.raises(ValueError, match="cross-fitted"):
        Records.from_logits(ids, labels, logits, clean=records)
    assert records.temperature_interval[0] < alone < records.temperature_interval[1]


def test_hold_out_survives_the_file(tmp_path) -> None:
    records = Records.from_logits(*make_logits(100), hold_out=0.3, seed=4)
    records.save(tmp_path / "r.parquet")
    assert_same(Records.load(tmp_path / "r.parquet"), records)


def test_scores_of_the_records_are_those_of_the_logits(records: Records) -> None:
    ids, labels, logits = make_logits(400)
    direct = compare_scores(ids, logits, labels, resamples=2)
    assert records.tuning == direct.tuning
    assert records.compared.sum() == direct.images
    table = {name: score[records.compared] for name, score in records.ranking.items()}
    again = score_table(table, records.correct[records.compared], resamples=2)
    for a, b in zip(again, direct.rows, strict=True):
        assert a.name == b.name
        assert a.values["aurc"].value == pytest.approx(b.values["aurc"].value, abs=1e-12)


def test_classwise_errors_are_those_of_the_logits(records: Records) -> None:
    ids, labels, logits = make_logits(400)
    fit = fit_out_of_sample("temperature", ids, logits, labels)
    for suffix, z in (
        ("", logits),
        ("_after_temperature", logits / fit.temperatures(ids)[:, None]),
    ):
        expected = metrics.classwise_calibration_error(z, labels)
        assert records.classwise["classwise_ece" + suffix] == pytest.approx(expected, abs=1e-12)
        expected = metrics.thresholded_classwise_calibration_error(z, labels)
        found = records.classwise["thresholded_classwise_ece" + suffix]
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64"])
def test_logits_of_any_precision(dtype: str) -> None:
    ids, labels, logits = make_logits(80)
    given = logits.astype(dtype)
    records = Records.from_logits(ids, labels, given)
    assert records.logits_dtype == dtype
    assert (records.before.nll == score_images(given.astype(np.float64), labels).nll).all()


@pytest.mark.filterwarnings("ignore:too few images", "ignore:no finite temperature")
@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_handful_of_images(images: int, tmp_path) -> None:
    records = Records.from_logits(*make_logits(images))
    assert len(records) == images
    for scores in (records.before, records.after):
        assert np.isfinite([scores.nll, scores.log_confidence, scores.entropy]).all()
    records.save(tmp_path / "r.parquet")
    assert_same(Records.load(tmp_path / "r.parquet"), records)


def rewritten(path: Path, table: Callable = lambda t: t, settings: Callable = lambda s: s) -> Path:
    """The file, with its table and its settings changed as another version would write them."""
    found = pq.read_table(path)
    stored = settings(json.loads(found.schema.metadata[METADATA_KEY]))
    changed = table(found).replace_schema_metadata({METADATA_KEY: json.dumps(stored)})
    pq.write_table(changed, path)
    return path


@pytest.fixture
def saved(records: Records, tmp_path: Path) -> Path:
    records.save(tmp_path / "r.parquet")
    return tmp_path / "r.parquet"


@pytest.mark.filterwarnings("error")
def test_records_from_before_a_score_was_added(records: Records, saved: Path) -> None:
    rewritten(saved, lambda t: t.drop_columns(["score_energy", "score_doctor", "score_msp"]))
    older = Records.load(saved)
    kept = {k: v for k, v in records.ranking.items() if k not in ("energy", "doctor")}
    assert older.missing == ("doctor", "energy")
    assert_same(older, replace(records, ranking=kept))
    own, m = (summarize(r, resamples=5).scores.model_dump() for r in (records, older))
    assert m.pop("missing") == ["doctor", "energy"]
    assert own.pop("missing") == []
    own["rows"] = [row for row in own["rows"] if row["name"] in kept]
    assert m == own
    softmax_only = replace(older, source=Source(probabilities=True))
    assert softmax_only.missing == ("doctor",), "of probabilities there is no energy"


def test_the_page_names_what_older_records_lack(records: Records, saved: Path, tmp_path) -> None:
    rewritten(saved, lambda t: t.drop_columns(["score_energy", "score_doctor"]))
    write_report(Records.load(saved), tmp_path / "report", resamples=5)
    page = (tmp_path / "report/index.html").read_text()
    assert "older than these scores and lack them: DOCTOR, Energy. Evaluate again" in page
    metrics_file = tmp_path / "report/metrics.json"
    m = json.loads(metrics_file.read_text())
    del m["scores"]["missing"]  # as written before scores could be missing
    m["scores"]["rows"][1]["name"] = "of_the_future"
    metrics_file.write_text(json.dumps(m))
    render_report(tmp_path / "report")
    page = (tmp_path / "report/index.html").read_text()
    assert "of_the_future" in page
    assert "older than these scores" not in page


def test_what_a_newer_version_added_is_named_and_left_out(records: Records, saved: Path) -> None:
    def newer(settings: dict) -> dict:
        settings["weather"] = "fine"
        settings["source"]["camera"] = "old"
        settings["tuning"]["split"]["by"] = "hash"
        return settings

    rewritten(saved, lambda t: t.append_column("score_x", t["nll"]).append_column("y", t["nll"]))
    with pytest.warns(RuntimeWarning, match="does not know the columns score_x, y, and leaves"):
        assert_same(Records.load(saved), records)
    rewritten(saved, lambda t: t.drop_columns(["score_x", "y"]), newer)
    with pytest.warns(RuntimeWarning) as found:
        assert_same(Records.load(saved), records)
    named = [str(w.message).split("settings ")[1].split(",")[0] for w in found]
    assert named == ["weather", "camera", "by"]


@pytest.mark.parametrize(
    ("table", "settings", "named"),
    [
        (lambda t: t.drop_columns(["nll", "id"]), None, "columns id, nll"),
        (lambda t: t.drop_columns(["compared"]), None, "columns compared"),
        (None, lambda s: {k: v for k, v in s.items() if k != "tuning"}, "settings tuning"),
        (None, lambda s: s | {"tuning": {"power": 2}}, "settings temperature, images, split"),
    ],
)
def test_records_that_lack_more_are_refused_by_name(saved, table, settings, named) -> None:
    rewritten(saved, table or (lambda t: t), settings or (lambda s: s))
    with pytest.raises(ValueError, match=rf"r\.parquet lacks the .*{named}.*evaluate"):
        Records.load(saved)


def test_computed_scores_travel_with_the_records(tmp_path) -> None:
    ids, labels, logits = make_logits(90)
    order = np.random.default_rng(3).permutation(90)
    trust = np.arange(90.0)
    shuffled = {"mc_dropout": -(trust[order] ** 2), "trust_score": trust[order]}
    records = Records.from_logits(
        [ids[i] for i in order], labels[order], logits[order], scores=shuffled, hold_out=0.2
    )
    kept = [ids.index(i) for i in records.id.tolist()]
    assert records.ranking["trust_score"].tolist() == trust[kept].tolist()
    assert list(records.ranking)[-2:] == ["trust_score", "mc_dropout"], "as in the list"
    records.save(tmp_path / "r.parquet")
    assert_same(Records.load(tmp_path / "r.parquet"), records)
    rows = {row.name: row for row in summarize(records, resamples=5).scores.rows}
    expected = roc_auc_score(records.correct, trust[kept])
    assert rows["trust_score"].values["auroc"].value == pytest.approx(expected, abs=1e-12)
    assert rows["trust_score"].difference["aurc"].low is not None


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"fantasy": [1, 2, 3]}, "'fantasy' is no score that needs more than logits; .*trust_sco"),
        ({"energy": [1, 2, 3]}, "'energy' is no score that needs more"),
        ({"trust_score": [1, 2]}, r"trust_score: expected 3 values, got shape \(2,\)"),
        ({"mc_dropout": [[1, 2, 3]]}, "mc_dropout: expected 3 values"),
        ({"trust_score": [1, np.nan, np.inf]}, "trust_score of 2 images is NaN or infinite"),
    ],
)
def test_computed_scores_that_cannot_be(scores: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Records.from_logits(["a", "b", "c"], [0, 1, 0], np.eye(3)[:, :2], scores=scores)
