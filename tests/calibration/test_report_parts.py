"""The parts of a report beyond its headline: classes, thresholds, errors, curves, literature."""

import csv
import json
import re
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from flatcal_dist.calibration.comparison.writing import _csv
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.pages.display import percent
from flatcal_dist.calibration.pages.palette import PALETTE, contrast, text_on
from flatcal_dist.calibration.records.records import Records, Source
from flatcal_dist.calibration.report import curves, metrics_csv, model, operating
from flatcal_dist.calibration.report.classes import per_class
from flatcal_dist.calibration.report.confident_errors import (
    most_confident_errors,
    read_thumbnails,
    save_thumbnails,
    thumbnail,
)
from flatcal_dist.calibration.report.confusions import confusions
from flatcal_dist.calibration.report.operating import operating_points
from flatcal_dist.calibration.report.summary import About, summarize
from flatcal_dist.calibration.report.training_curves import training_curves
from flatcal_dist.calibration.report.writing import render_report, write_report
from flatcal_dist.calibration.report_page.verdict import verdict
from tests.calibration.test_report import ABOUT, assert_sound_page, files, strict_json
from tests.support.quick_reports import quick_reports
from tests.support.report_inputs import CORRUPTIONS, TRAINING, encoded_digit, write_some_shift
from tests.support.synthetic import make_logits, make_records

SCHEMA = json.loads(model.SCHEMA.read_text())


@pytest.fixture(scope="module")
def looked_at_again() -> Records:
    """Records with ReaL labels: none of every fifth image, any class of every third."""
    ids, labels, logits = make_logits(400)
    real = [[] if i % 5 == 0 else list(range(10)) if i % 3 == 0 else [int(y)]
            for i, y in enumerate(labels)]  # fmt: skip
    return Records.from_logits(ids, labels, logits, real_labels=real)


@pytest.fixture(scope="module")
def whole(looked_at_again: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything that can be in it."""
    folder = tmp_path_factory.mktemp("whole")
    write_some_shift(looked_at_again, folder)
    with quick_reports(draw=True):
        write_report(
            looked_at_again, folder, ABOUT, image_of=encoded_digit, training=TRAINING, resamples=20
        )
    return folder


def test_page_of_a_report_with_everything(whole: Path) -> None:
    page = assert_sound_page(whole / "index.html")
    m, shift = strict_json(whole / "metrics.json"), strict_json(whole / "shift.json")
    errors, read = m["confident_errors"], model.read_metrics(whole / "metrics.json")
    assert page.tags.count("img") == len(errors) == len(list((whole / "errors").glob("*.jpg")))
    accepted = sum(bool(e["consistent"]) for e in errors)
    assert accepted > 0
    assert page.text.count("ReaL accepts the answer") == accepted
    assert f"Top-5 accuracy is {percent(m['top5_accuracy'])}." in page.text
    assert f"accuracy is {percent(m['real']['accuracy'])}, ECE {percent(m['real']['ece'])}" in (
        page.text
    )
    for text in ("Under shift", "digits-c", "elsewhere", "Training", "jpeg compression"):
        assert text in page.text
    assert [f.topic for f in verdict(read, shift)][-3:] == ["Labels", "Shift", "Corruptions"]
    for finding in verdict(read, shift):
        assert finding.text in page.text
    drawn = {p.stem for p in (whole / "figures").glob("*.svg")}
    assert {"training", "shift_0_severity", "shift_0_accuracy_before"} <= drawn


@pytest.mark.usefixtures("drawn")
def test_page_is_rendered_again_with_pictures_and_shift(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for name in ("index.html", "figures", "metrics.csv", "table.csv", "table.tex"):
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
    render_report(copy)
    expected = files(whole)
    for name in ("metrics.csv", "table.csv", "table.tex"):
        expected.pop(name)
    assert files(copy) == expected


def test_shift_of_another_evaluation_is_left_out_and_said(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shift = strict_json(copy / "shift.json")
    shift["clean"]["before"]["accuracy"] += 0.01
    (copy / "shift.json").write_text(json.dumps(shift))
    render_report(copy)
    page = assert_sound_page(copy / "index.html")
    assert "Under shift" not in page.text
    assert "shift.json in this folder belongs to another evaluation" in page.text


def test_metrics_json_keeps_to_its_schema(whole: Path, tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    m = strict_json(whole / "metrics.json")
    validator.validate(m)
    ids, labels, logits = make_logits(60, classes=3)
    bare = summarize(Records.from_logits(ids, np.zeros_like(labels), logits), resamples=5)
    validator.validate(bare.as_json())
    for spoiled in ({"ece": "0.1"}, {"accuracy": 1.2}, {"schema_version": 2}, {"surprise": 0}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(m | spoiled)
    short = {k: v for k, v in m.items() if k != "signed_gap"}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(short)


def test_per_class_against_a_plain_loop(records: Records) -> None:
    table = per_class(records, ["zero", "one"])
    assert table["class"] == sorted(set(records.label.tolist()))
    assert table["name"][:3] == ["zero", "one", None]
    for row, k in enumerate(table["class"]):
        mine = [i for i in range(len(records)) if records.label[i] == k]
        answered = [i for i in range(len(records)) if records.prediction[i] == k]
        right = [i for i in mine if records.correct[i]]
        gap = np.mean([records.confidence[i] for i in mine]) - len(right) / len(mine)
        assert table["images"][row] == len(mine)
        assert table["accuracy"][row] == pytest.approx(len(right) / len(mine))
        assert table["signed_gap"][row] == pytest.approx(gap)
        assert table["gap_low"][row] < gap < table["gap_high"][row]
        assert table["nll"][row] == pytest.approx(np.mean(records.before.nll[mine]))
        assert table["answers"][row] == len(answered)
        assert table["precision"][row] == pytest.approx(len(right) / len(answered))
        wrong = [int(records.prediction[i]) for i in mine if not records.correct[i]]
        counts = {c: wrong.count(c) for c in wrong}
        most = max(counts.values())
        assert table["confused_with"][row] == min(c for c in counts if counts[c] == most)
        assert table["confused_share"][row] == most / len(mine)
        assert (table["correct"][row], table["confused_images"][row]) == (len(right), most)


def test_classes_of_a_part_of_the_label_space_have_the_networks_numbers() -> None:
    ids, labels, logits = make_logits(100, classes=3)
    source = Source(name="few", classes=(5, 2, 9))
    table = per_class(Records.from_logits(ids, labels, logits, source=source), list("abcdefghij"))
    assert table["class"] == [5, 2, 9]
    assert table["name"] == ["f", "c", "j"]
    assert set(table["confused_with"]) <= {5, 2, 9}


def test_thresholds_and_what_they_give_on_other_images(records: Records) -> None:
    points = operating_points(records.before, records.fold)
    c, correct = records.confidence, records.correct
    for point in points["by_threshold"]:
        chosen = c >= point["confidence"]
        assert point["images"] == chosen.sum()
        assert point["wrong"] == (chosen & ~correct).sum()
        assert point["low"] < point["accuracy"] <= point["high"]
    for point in points["by_accuracy"]:
        chosen = c >= point["confidence"] * (1 - 1e-12)
        assert chosen.mean() == pytest.approx(point["coverage"])
        assert correct[chosen].mean() >= point["accuracy_wanted"]
        answered = np.zeros(len(records), bool)
        for f in range(5):
            here = records.fold == f
            risk = 1 - point["accuracy_wanted"]
            threshold = selective.threshold_at_risk(c[~here], correct[~here], risk)
            answered[here] = c[here] >= threshold
        assert point["held_out"]["images"] == answered.sum()
        assert point["held_out"]["accuracy"] == pytest.approx(correct[answered].mean())


def test_most_confident_errors(looked_at_again: Records) -> None:
    records, errors = looked_at_again, most_confident_errors(looked_at_again)
    assert len(errors) == 24
    wrong = np.sort(records.confidence[~records.correct])[::-1]
    assert [e.confidence for e in errors] == wrong[:24].tolist()
    number = {name: i for i, name in enumerate(records.id.tolist())}
    for e in errors:
        i = number[e.id]
        assert (e.label, e.answer) == (records.label[i], records.prediction[i])
        assert e.label_probability == pytest.approx(np.exp(-records.before.nll[i]))
        assert e.consistent == {1: True, 0: False, -1: None}[int(records.real[i])]
    assert {e.consistent for e in errors} == {True, False, None}


def test_pictures_of_another_evaluation_are_not_taken_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "flatcal_dist.calibration.report.writing._write_page", lambda m, output: None
    )
    records = make_records(90, images_seed=5)
    write_report(records, tmp_path, image_of=encoded_digit, resamples=2)
    assert list((tmp_path / "errors").glob("*.jpg"))
    write_report(records, tmp_path, resamples=2)
    assert not list((tmp_path / "errors").glob("*.jpg"))


@pytest.mark.parametrize("name", ["metrics.json", "shift.json"])
def test_a_damaged_file_is_named(name: str, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "report")
    content = (folder / name).read_text()
    (folder / name).write_text(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        render_report(folder)


def test_a_damaged_picture_is_left_out(records: Records, tmp_path: Path) -> None:
    assert thumbnail(b"no image at all") is None
    assert thumbnail(encoded_digit("x"))[:2] == b"\xff\xd8"  # a JPEG
    given, errors = iter([b"damaged", None]), most_confident_errors(records)
    save_thumbnails(errors, lambda name: next(given, encoded_digit(name)), tmp_path)
    pictures = read_thumbnails(tmp_path, len(errors))
    assert pictures[:2] == [None, None]
    assert all(p.startswith("data:image/jpeg;base64,") for p in pictures[2:])
    save_thumbnails(errors, lambda name: None, tmp_path)
    assert set(read_thumbnails(tmp_path, len(errors))) == {None}  # none of an earlier report


def test_training_curves() -> None:
    again = {"step": 20, "epoch": 2, "val/accuracy": 0.99}
    found = training_curves([*TRAINING, again])
    assert found["epoch"] == [1, 2, 3, 4, 5]
    assert found["accuracy"][1] == 0.99  # the last record of an epoch counts
    assert found["mean_entropy"] == [1.2, None, 1.2 / 3, 0.3, 0.24]
    assert "nll" not in found
    assert training_curves([{"step": 1, "train/loss": 2.0}]) is None


def test_smooth_curve_against_a_plain_loop(records: Records) -> None:
    c, correct, width = records.confidence, records.correct, 0.05
    found = curves.smooth_reliability(c, correct, width)
    for place in (0, 40, 100):
        t = found["confidence"][place]
        weight = sum(np.exp(-(((t - x) / width) ** 2) / 2) for x in (c, -c, 2 - c))
        assert found["accuracy"][place] == pytest.approx(
            (weight @ correct) / weight.sum(), abs=2e-3
        )
        half = 1.959964 * np.sqrt(weight**2 @ (c * (1 - c))) / weight.sum()
        middle = weight @ c / weight.sum()
        assert found["calibrated_low"][place] == pytest.approx(max(middle - half, 0), abs=2e-3)
        assert found["calibrated_high"][place] == pytest.approx(min(middle + half, 1), abs=2e-3)


def test_smooth_band_holds_a_calibrated_network() -> None:
    random, outside = np.random.default_rng(0), []
    for _ in range(60):
        c = random.beta(4, 1, 800)
        found = curves.smooth_reliability(c, random.random(800) < c, 0.05)
        y, low, high = (
            np.array(found[k]) for k in ("accuracy", "calibrated_low", "calibrated_high")
        )
        outside.append(((y < low) | (y > high))[60:].mean())  # where there are images enough
    assert 0.02 < np.mean(outside) < 0.08


def test_histogram_and_thinned_curve(records: Records) -> None:
    histogram = curves.confidence_histogram(records.before)
    assert sum(histogram["correct"]) == records.correct.sum()
    assert sum(histogram["wrong"]) == (~records.correct).sum()
    assert histogram["mean_wrong"] == records.confidence[~records.correct].mean()
    ids, labels, logits = make_logits(3000)
    many = Records.from_logits(ids, labels, logits).before
    thinned = curves.risk_coverage(many)
    coverage, risk = selective.risk_coverage_curve(many.log_confidence, many.correct)
    known = dict(zip(coverage.tolist(), risk.tolist(), strict=True))
    assert len(thinned["coverage"]) <= curves.CURVE_POINTS
    assert thinned["coverage"][-1] == 1
    assert all(known[x] == y for x, y in zip(*thinned.values(), strict=True))


def test_csv_has_every_number_of_both_sides(whole: Path) -> None:
    m = strict_json(whole / "metrics.json")
    written = metrics_csv.metrics_csv(model.Report.model_validate(m))
    header = written.splitlines()[0].split(",")
    after = m["after_temperature"]
    scores = [k for k, v in after.items() if isinstance(v, float | None)]
    assert {"classwise_ece", "naurc", "rmsce_debiased"} <= set(scores)
    assert set(scores) | {f"{k}_after_temperature" for k in scores} <= set(header)


def test_heat_map_has_every_corruption(whole: Path) -> None:
    svg = (whole / "figures" / "shift_0_signed_gap_after.svg").read_text()
    assert all(c.replace("_", " ") in svg for c in CORRUPTIONS)


def test_a_run_called_like_a_formula_is_a_text_in_spreadsheets():
    name = "=cmd|' /C calc'!A0"
    run = {"run": name, "nll": -0.5, "settings": {}, "difference": {}}
    _, row = _csv({"runs": [run]}).splitlines()
    assert row.startswith(f"'{name},-0.5,")


def test_thresholds_by_cost(records: Records) -> None:
    scores, fold = records.before, records.fold
    for point in operating_points(scores, fold)["by_cost"]:
        cost = point["cost_of_error"]
        answered = scores.confidence >= 1 - 1 / cost
        spent = [
            (cost if not right else 0) if sure else 1
            for sure, right in zip(answered, scores.correct, strict=True)
        ]
        assert point["cost"] == pytest.approx(np.mean(spent))
        assert point["cost_low"] < point["cost"] < point["cost_high"]
        assert point["coverage"] == pytest.approx(answered.mean())
        assert point["cost_of_all"] == pytest.approx(cost * (1 - records.correct.mean()))
        held_out = np.zeros(len(records), bool)
        for f in range(5):
            here = fold == f
            c, right = scores.confidence[~here], scores.correct[~here]
            costs = {t: np.where(c >= t, cost * ~right, 1).sum() for t in [*c.tolist(), 2.0]}
            least = min(costs.values())
            best = max(t for t, v in costs.items() if v <= least + 1e-9)
            reached = np.where(c >= operating.cheapest_threshold(c, right, cost), cost * ~right, 1)
            assert reached.sum() == pytest.approx(least)
            assert best <= 2
            at = operating.cheapest_threshold(scores.log_confidence[~here], right, cost)
            held_out[here] = scores.log_confidence[here] >= at
        assert point["held_out"]["images"] == held_out.sum()


def test_chows_rule_is_cheapest_where_confidences_are_true() -> None:
    random = np.random.default_rng(0)
    c = random.beta(4, 1, 200_000)
    right = random.random(len(c)) < c
    for cost in operating.COSTS:
        by_rule = np.where(c >= 1 - 1 / cost, cost * ~right, 1).mean()
        for threshold in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.1):
            other = np.where(c >= threshold, cost * ~right, 1).mean()
            assert by_rule <= other + 0.02


def test_confusions_against_a_plain_loop(records: Records) -> None:
    found = confusions(records)
    expected = np.zeros((10, 10), int)
    for label, answer in zip(records.label, records.prediction, strict=True):
        expected[label, answer] += 1
    assert found["matrix"] == expected.tolist()
    wrong = {(i, j): n for (i, j), n in np.ndenumerate(expected) if i != j and n}
    assert [p["images"] for p in found["pairs"]] == sorted(wrong.values(), reverse=True)[:20]
    for p in found["pairs"]:
        assert wrong[p["label"], p["answer"]] == p["images"]
        assert p["of"] == expected[p["label"]].sum()
        assert p["back"] == expected[p["answer"], p["label"]]
    many = confusions(make_records(500, classes=60))
    assert many["matrix"] is None
    assert many["pairs"]


def test_text_in_the_heat_map_can_be_read(whole: Path) -> None:
    """Contrast on every colour in both themes (WCAG: 4.5), and size in a column of 352 pixels."""
    for name in [n for n in PALETTE if n.startswith(("blue-", "vermillion-"))] + ["paper"]:
        text = PALETTE[text_on(name)]
        assert contrast(text.light, PALETTE[name].light) >= 4.5
        assert contrast(text.dark, PALETTE[name].dark) >= 4.5
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    svg = (whole / "figures" / "shift_0_accuracy_before.svg").read_text()
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    sizes = [float(s) for s in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
    assert min(sizes) * 352 / width >= 10


def test_what_is_not_known_of_a_training_is_said_to_be_unknown(tmp_path: Path) -> None:
    write_report(make_records(60), tmp_path, About(title="elsewhere"), resamples=20)
    page = (tmp_path / "index.html").read_text()
    assert "method unknown" in page
    assert "<dt>Training seed</dt><dd>unknown</dd>" in page
    (row,) = csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines())
    assert row["method"] == row["seed"] == ""
