"""Records of images under shift, and the table made of them, against plain sums."""

import json

import numpy as np
import pytest

from flatcal_dist.calibration.calibrators.of_logits import TemperatureScaling
from flatcal_dist.calibration.records.records import Records, Source
from flatcal_dist.calibration.shift.groups import (
    ALEXNET_ERROR,
    SEVERITIES,
    mean_corruption_error,
)
from flatcal_dist.calibration.shift.report import Shifted, read_shift, save_shifted, write_shift
from flatcal_dist.calibration.shift.rows import measure, real_figures
from flatcal_dist.calibration.softmax import score_images
from tests.calibration.test_records import assert_same
from tests.support.synthetic import make_logits


@pytest.fixture(scope="module")
def clean() -> Records:
    return Records.from_logits(*make_logits(300), source=Source("val", "imagenet"))


def softmax_nll(logits: np.ndarray, labels: np.ndarray, temperature) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]


def test_other_images_are_scaled_by_the_overall_clean_temperature(clean):
    ids, labels, logits = make_logits(200, seed=1)
    ids = [f"other_{i}" for i in ids]
    records = Records.from_logits(ids, labels, 3 * logits, clean=clean, source=Source("v2"))
    order = np.argsort(ids)
    expected = softmax_nll(3 * logits[order], labels[order], clean.temperature)
    assert records.after.nll == pytest.approx(expected, rel=1e-9)
    assert records.temperature == clean.temperature
    assert records.source.temperature_from == "val"
    own = TemperatureScaling().fit(3 * logits, labels).temperature
    assert records.source.own_temperature == pytest.approx(own, rel=1e-9)
    assert own > 2 * clean.temperature, "so the two can be told apart"


def test_the_same_photographs_are_scaled_by_a_temperature_not_fitted_on_them(clean):
    ids, labels, logits = make_logits(300)
    corrupted = (logits * 0.3 + np.random.default_rng(2).normal(size=logits.shape)).astype("f4")
    ids[0] = "not among the clean ones"
    records = Records.from_logits(ids, labels, corrupted, clean=clean)
    order = np.argsort(ids)
    known = dict(zip(clean.id, clean.fold, strict=True))
    t = [
        clean.fold_temperatures[known[i]] if i in known else clean.temperature
        for i in np.array(ids)[order]
    ]
    expected = softmax_nll(corrupted[order], labels[order], np.array(t)[:, None])
    assert records.after.nll == pytest.approx(expected, rel=1e-9)
    assert len(set(t)) == 6, "five folds and the overall one"


def test_source_and_real_labels_survive_the_file(clean, tmp_path):
    ids, labels, logits = make_logits(50, seed=3)
    source = Source("c", "imagenet_c", (1, 4, 9), "fog", 3, generated=True)
    real = [[] if i % 5 == 0 else [labels[i], 2] for i in range(50)]
    records = Records.from_logits(ids, labels, logits, clean=clean, source=source, real_labels=real)
    records.save(tmp_path / "r.parquet")
    loaded = Records.load(tmp_path / "r.parquet")
    assert_same(loaded, records)
    assert loaded.source.generated
    assert loaded.source.classes == (1, 4, 9)


@pytest.mark.filterwarnings("ignore:too few images")
def test_real_labels_count_any_of_them_and_leave_out_images_without():
    logits = np.log(np.array([[0.7, 0.2, 0.1]] * 4))
    ids, labels = ["d", "c", "b", "a"], [1, 0, 0, 2]
    records = Records.from_logits(
        ids, labels, logits, real_labels=[[1, 2], [0, 2], [], [0]], folds=2
    )
    assert records.real.tolist() == [1, -1, 1, 0]  # sorted by id: a, b, c, d
    real = real_figures(records)
    assert real["images"] == 3
    assert real["accuracy"] == pytest.approx(2 / 3)
    assert real["signed_gap"] == pytest.approx(0.7 - 2 / 3)
    assert real["ece"] == pytest.approx(0.7 - 2 / 3)


@pytest.mark.filterwarnings("ignore:no finite temperature")
def test_real_labels_of_another_number_of_images_are_refused():
    with pytest.raises(ValueError, match="ReaL labels of 3 images, but 4 images"):
        Records.from_logits("abcd", [0, 1, 0, 1], np.eye(2)[[0, 1, 0, 0]], real_labels=[[0]] * 3)


def subsets(clean: Records, corruptions=("fog", "snow"), severities=(1, 5)) -> list[Records]:
    found = []
    for number, corruption in enumerate(corruptions):
        for severity in severities:
            ids, labels, logits = make_logits(60, seed=10 * number + severity)
            source = Source("imagenet_c", "imagenet_c", None, corruption, severity)
            found.append(Records.from_logits(ids, labels, logits, clean=clean, source=source))
    return found


def test_the_table_and_its_means(clean, tmp_path):
    rows = [save_shifted(Shifted(records, "hash"), tmp_path) for records in subsets(clean)]
    other = Records.from_logits(*make_logits(40, seed=9), clean=clean, source=Source("v2"))
    rows.append(save_shifted(Shifted(other, "hash2"), tmp_path))
    write_shift(measure(clean, "hash0", tmp_path / "records.parquet"), rows, tmp_path)
    table = read_shift(tmp_path)
    assert [r["name"] for r in table["sets"]] == ["imagenet_c"] * 4 + ["v2"]
    for r in table["sets"]:
        records = Records.load(tmp_path / r["records"])
        for side, scores in (("before", records.before), ("after", records.after)):
            assert r[side]["accuracy"] == scores.correct.mean()
            assert r[side]["nll"] == scores.nll.mean()
        assert r["temperature"] == clean.temperature
        assert r["temperature_from"] == "val"
    assert table["clean"]["temperature_from"] == "val"
    (group,) = table["corruptions"]
    by_hand = np.array([r["before"]["accuracy"] for r in table["sets"][:4]]).reshape(2, 2)
    before = group["before"]
    assert before["all"]["accuracy"] == pytest.approx(by_hand.mean(), abs=1e-15)
    assert before["by_severity"]["5"]["accuracy"] == pytest.approx(by_hand[:, 1].mean(), abs=1e-15)
    assert before["by_corruption"]["snow"]["accuracy"] == pytest.approx(by_hand[1].mean())
    assert group["mean_corruption_error"] is None, "two of fifteen corruptions"


def test_an_undefined_figure_makes_the_mean_null_and_the_json_stays_valid(clean, tmp_path):
    ids, labels, _ = make_logits(30)
    right = np.eye(10)[labels] * 5  # all correct: AUROC is undefined
    source = Source("c", "imagenet_c", None, "fog", 1)
    with pytest.warns(RuntimeWarning, match="no finite temperature"):
        records = Records.from_logits(ids, labels, right, clean=clean, source=source)
    rows = [save_shifted(Shifted(records, "hash"), tmp_path)]
    write_shift(measure(clean, "", tmp_path), rows, tmp_path)
    table = json.loads((tmp_path / "shift.json").read_text())
    assert table["sets"][0]["before"]["auroc"] is None
    assert table["corruptions"][0]["before"]["all"]["auroc"] is None
    assert table["corruptions"][0]["before"]["all"]["accuracy"] == 1


def test_mean_corruption_error_is_one_for_alexnet():
    rows = [
        {"corruption": c, "severity": s, "generated": False, "before": {"accuracy": 1 - e}}
        for c, e in ALEXNET_ERROR.items()
        for s in SEVERITIES
    ]
    assert mean_corruption_error(rows) == pytest.approx(1)
    for r in rows[:5]:
        r["before"]["accuracy"] = 1 - ALEXNET_ERROR["gaussian_noise"] / 2
    assert mean_corruption_error(rows) == pytest.approx(1 - 0.5 / 15)
    assert mean_corruption_error(rows[1:]) is None
    rows[0]["generated"] = True
    assert mean_corruption_error(rows) is None


def test_temperature_of_clean_images_changes_no_prediction_under_shift(clean):
    records = subsets(clean)[0]
    assert np.array_equal(records.before.correct, records.after.correct)
    ids, labels, logits = make_logits(60, seed=1)
    direct = score_images(logits, labels)
    order = np.argsort(ids)
    assert np.array_equal(records.before.nll, direct.nll[order])


def gaps(records: Records) -> np.ndarray:
    """Confidence minus correctness of each image, before and after temperature scaling."""
    return np.stack([side.confidence - side.correct for side in (records.before, records.after)])


def test_intervals_are_of_the_same_photographs_in_all_subsets(clean, tmp_path):
    """Against a plain bootstrap that draws photographs once, for all corruptions."""
    found = subsets(clean)
    rows = [save_shifted(Shifted(records, "hash"), tmp_path) for records in found]
    write_shift(measure(clean, "hash0", tmp_path), rows, tmp_path)
    table = read_shift(tmp_path)
    for r in (table["clean"], *table["sets"]):
        for side in ("before", "after"):
            for name in ("accuracy", "signed_gap", "nll", "auroc", "aurc"):
                ends = r[side]["intervals"][name]
                assert ends["low"] < r[side][name] < ends["high"], name
    per_image = np.stack([gaps(records) for records in found]).mean(axis=0)  # [side, image]
    draws = np.random.default_rng(0).integers(60, size=(4000, 60))
    means = per_image[:, draws].mean(axis=2)
    (group,) = table["corruptions"]
    for side, replicates in zip(("before", "after"), means, strict=True):
        ends = group[side]["all"]["intervals"]["signed_gap"]
        low, high = np.quantile(replicates, (0.025, 0.975))
        # 200 draws leave 0.1 of the half width of an interval to chance, and more at times.
        assert ends["low"] == pytest.approx(low, abs=0.2 * (high - low))
        assert ends["high"] == pytest.approx(high, abs=0.2 * (high - low))
    moved = np.abs(means[1]) - np.abs(means[0])
    distance = group["effect"]["all"]["distance"]
    exact = np.abs(per_image.mean(axis=1))
    assert distance["value"] == pytest.approx(exact[1] - exact[0])
    low, high = np.quantile(moved, (0.025, 0.975))
    assert distance["low"] == pytest.approx(low, abs=0.2 * (high - low))
    assert distance["high"] == pytest.approx(high, abs=0.2 * (high - low))


def test_subsets_of_different_photographs_have_means_without_intervals(clean, tmp_path):
    found = subsets(clean)
    ids, labels, logits = make_logits(60, seed=4)
    source = Source("imagenet_c", "imagenet_c", None, "fog", 2)
    found.append(
        Records.from_logits([f"other/{i}" for i in ids], labels, logits, clean=clean, source=source)
    )
    rows = [save_shifted(Shifted(records, "hash"), tmp_path) for records in found]
    write_shift(measure(clean, "hash0", tmp_path), rows, tmp_path)
    (group,) = read_shift(tmp_path)["corruptions"]
    assert group["before"]["all"]["accuracy"] is not None
    assert group["before"]["all"]["intervals"]["accuracy"] == {"low": None, "high": None}
    assert group["effect"]["all"]["distance"]["low"] is None
    assert group["before"]["by_corruption"]["snow"]["intervals"]["accuracy"]["low"] is not None
