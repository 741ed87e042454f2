import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from flatcal_dist.calibration.comparison import writing as compare
from flatcal_dist.calibration.comparison.writing import write_comparison
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.pages.display import show_difference
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.summary import About, summarize
from flatcal_dist.calibration.softmax import Scores
from flatcal_dist.calibration.statistics.bootstrap import bootstrap
from flatcal_dist.files import write_json
from tests.calibration.test_report import assert_sound_page, strict_json
from tests.support.synthetic import make_logits


def write_bare_report(records: Records, folder: Path, about: About | None = None) -> None:
    """A report without page and figures, which a comparison does not read."""
    write_json(folder / "metrics.json", summarize(records, about, resamples=5).as_json())
    records.save(folder / "records.parquet")


def write_run(
    folder: Path, method: str, seed: int, scale: float = 2.0, learning_rate: float = 0.1, **about
) -> Path:
    ids, labels, logits = make_logits(300, seed=seed, scale=scale)
    configuration = {
        "run": {"dir": str(folder), "seed": seed},
        "optimizer": {"learning_rate": learning_rate},
    }
    told = About(
        model="lenet5", method=method, seed=seed, training_seconds=61.0,
        configuration=configuration, **about,
    )  # fmt: skip
    write_bare_report(Records.from_logits(ids, labels, logits), folder / "report", told)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    return [
        write_run(base / "sgd_0", "sgd", 0, 4.0),
        write_run(base / "sgd_1", "sgd", 1, 4.0),
        write_run(base / "csam_0", "csam", 0, 1.8),
    ]


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests ask for the numbers: drawing is tested with the first."""
    monkeypatch.setattr(compare, "_write_page", lambda *_: None)


@pytest.mark.usefixtures("drawn")
def test_files_and_page(runs: list[Path], tmp_path: Path) -> None:
    c = write_comparison(runs, tmp_path, resamples=100)
    names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    figures = ("reliability", "risk_coverage", "accuracy_ece", "accuracy_aurc")
    expected = {f"figures/{n}.{s}" for n in figures for s in ("png", "svg", "pdf")}
    assert names == expected | {"index.html", "comparison.json", "comparison.csv", "table.tex"}
    assert strict_json(tmp_path / "comparison.json") == json.loads(json.dumps(c))
    page = assert_sound_page(tmp_path / "index.html")
    assert "interval over seeds" not in page.text, "two seeds have none"
    assert "these networks, not the method" in page.text
    for text in (*c["verdict"], "sgd_0", "csam_0", "over training seeds", "2 methods, 3 runs"):
        assert text in page.text
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [r["run"] for r in rows] == ["sgd_0", "sgd_1", "csam_0"]
    assert rows[0]["nll_difference"] == rows[0]["against"] == ""
    tex = (tmp_path / "table.tex").read_text()
    assert tex.isascii()
    assert len(re.findall(r"^(sgd|csam) &.*\\\\$", tex, re.M)) == 4, "two methods, two sides"
    assert tex.count(r"$\pm$") == 15, "two seeds have a spread; the caption names it"
    assert rows[2]["against"] == "sgd_0"  # the baseline's run of the same seed
    assert float(rows[2]["nll_difference"]) == c["runs"][2]["difference"]["nll"]["value"]


@pytest.mark.usefixtures("without_figures")
def test_differences_are_paired_and_marks_need_them(runs: list[Path], tmp_path: Path) -> None:
    c = write_comparison([runs[0], runs[2]], tmp_path, resamples=200)
    (difference,) = c["differences"]
    first, second = c["runs"]
    for key in COMPARED:
        d = difference["before"][key]
        assert d["value"] == pytest.approx(second[key] - first[key], abs=1e-9)
        assert d["shown"] == (d["low"] > 0 or d["high"] < 0)
        assert d["over_seeds"] is None
        assert {k: d[k] for k in ("value", "low", "high")} == second["difference"][key]
    # The networks are one, but for the scale of the logits: same answers, other confidences.
    assert difference["before"]["accuracy"]["value"] == 0
    assert not difference["before"]["accuracy"]["shown"]
    assert second["mcnemar"] == {"only_first": 0, "only_second": 0, "exact": 1.0, "mid_p": 1.0}
    best = c["best"]["before"]
    assert best["accuracy"] is None
    assert best["nll"] == best["ece"] == "csam_0"
    assert best["signed_gap"] is None
    # What temperature scaling takes away is no difference after it.
    assert set(c["best"]["after"].values()) == {None}
    assert c["verdict"][0] == "Accuracy: no difference shown for csam_0."
    assert c["verdict"][1].startswith("NLL: lower (better) for csam_0 by ")
    assert "another training seed may turn them" in c["verdict"][-1]
    assert [m["runs"] for m in c["methods"]] == [["sgd_0"], ["csam_0"]]


@pytest.mark.usefixtures("without_figures")
def test_a_run_against_its_own_copy_shows_nothing(runs: list[Path], tmp_path: Path) -> None:
    copy = write_run(tmp_path / "copy", "sgd", 0, 4.0)
    c = write_comparison([runs[0], copy], tmp_path / "out", resamples=50)
    assert len(c["methods"]) == 2  # one seed given twice is no two seeds
    assert all("no difference shown for copy" in s for s in c["verdict"][:-1])
    assert {v for side in c["best"].values() for v in side.values()} == {None}


@pytest.mark.usefixtures("without_figures")
def test_seeds_are_one_method(runs: list[Path], tmp_path: Path) -> None:
    c = write_comparison(runs, tmp_path, resamples=20)
    sgd, csam = c["methods"]
    assert (sgd["name"], sgd["runs"], sgd["seeds"]) == ("sgd", ["sgd_0", "sgd_1"], [0, 1])
    accuracies = [r["accuracy"] for r in c["runs"][:2]]
    assert sgd["before"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert sgd["before"]["accuracy"]["sd"] == pytest.approx(np.std(accuracies, ddof=1))
    assert csam["before"]["accuracy"]["sd"] is None
    assert c["differences"][0]["before"]["ece"]["over_seeds"] is None


def test_seeds_of_the_best_method_do_not_stand_in_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undrawn = ("reliability", "risk_coverage", "accuracy_ece", "accuracy_aurc")
    monkeypatch.setattr(compare, "_figures", lambda *_: dict.fromkeys(undrawn, ""))
    base = tmp_path
    runs = [write_run(base / f"sgd_{s}", "sgd", s, 4.0) for s in range(3)]
    runs += [write_run(base / f"csam_{s}", "csam", s, 1.8) for s in range(3)]
    c = write_comparison(runs, base / "out", resamples=100)
    assert c["best"]["before"]["nll"] == c["best"]["before"]["ece"] == "csam"
    (difference,) = c["differences"]
    ece = [[r["ece"] for r in c["runs"] if r["method"] == m] for m in ("csam", "sgd")]
    over = difference["before"]["ece"]["over_seeds"]
    assert over["mean"] == pytest.approx(np.mean(ece[0]) - np.mean(ece[1]))
    assert over["mean"] == pytest.approx(difference["before"]["ece"]["value"])
    assert over["shown"]
    assert "over 3 training seeds or more" in c["verdict"][-1]
    assert "interval over seeds" in (tmp_path / "out/index.html").read_text()


@pytest.mark.usefixtures("without_figures")
def test_methods_whose_seeds_disagree_are_not_told_apart(tmp_path: Path) -> None:
    """Each pair differs far beyond its images, but not always in the same direction."""
    scales = {"sgd": (4.0, 4.0, 4.0), "sam": (1.8, 1.8, 12.0)}
    runs = [
        write_run(tmp_path / f"{method}_{seed}", method, seed, scale)
        for method, of_seeds in scales.items()
        for seed, scale in enumerate(of_seeds)
    ]
    c = write_comparison(runs, tmp_path / "out", resamples=100)
    nll = c["differences"][0]["before"]["nll"]
    assert nll["low"] > 0  # over images alone sam would be worse, by its third seed
    assert not nll["over_seeds"]["shown"]
    assert not nll["shown"]
    assert c["verdict"][1] == "NLL: no difference shown for sam."
    assert c["best"]["before"]["nll"] is None


@pytest.mark.usefixtures("without_figures")
def test_other_settings_are_no_seeds(runs: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "sgd_2", "sgd", 2, 4.0, learning_rate=0.2)
    c = write_comparison([runs[0], runs[1], other], tmp_path / "out", resamples=20)
    assert [m["runs"] for m in c["methods"]] == [["sgd_0", "sgd_1"], ["sgd_2"]]
    assert len({m["name"] for m in c["methods"]}) == 2
    c = write_comparison([runs[0], other], tmp_path / "out2", resamples=20)
    assert [m["name"] for m in c["methods"]] == ["sgd_0", "sgd_2"]


@pytest.mark.usefixtures("without_figures")
def test_runs_are_pooled_where_method_settings_and_configuration_agree(tmp_path: Path) -> None:
    """Each run but the second differs from the first by one thing beside the seed."""
    name, swa = "sam+swa", {"rho": 0.05, "swa.start": 0.75}
    told = [
        (name, swa, 0.1),
        (name, {"rho": 0.05, "swa.start": 0.75}, 0.1),
        ("sam+ema", swa, 0.1),
        (name, {"rho": 0.05, "swa.start": 0.5}, 0.1),
        (name, {"rho": 0.05}, 0.1),
        (name, swa, 0.2),
    ]
    runs = [
        write_run(tmp_path / f"run_{seed}", method, seed, learning_rate=rate, settings=settings)
        for seed, (method, settings, rate) in enumerate(told)
    ]
    c = write_comparison(runs, tmp_path / "out", resamples=5)
    pooled = [method["runs"] for method in c["methods"]]
    assert pooled == [["run_0", "run_1"], ["run_2"], ["run_3"], ["run_4"], ["run_5"]]
    names = [method["name"] for method in c["methods"]]
    assert names[1] == "sam+ema, ρ = 0.05, swa.start = 0.75"
    assert names[0] == "sam+swa, ρ = 0.05, swa.start = 0.75 (run_0)"
    rows = list(csv.DictReader((tmp_path / "out/comparison.csv").read_text().splitlines()))
    assert rows[3]["settings"] == "ρ 0.05, swa.start 0.5"


def test_one_method_alone(runs: list[Path], tmp_path: Path) -> None:
    c = write_comparison(runs[:2], tmp_path, resamples=20)
    assert c["differences"] == []
    assert "its spread" in c["verdict"][0]
    assert_sound_page(tmp_path / "index.html")


@pytest.mark.usefixtures("without_figures")
def test_report_directories_and_equal_names(runs: list[Path], tmp_path: Path) -> None:
    twin = write_run(tmp_path / "other" / "sgd_0", "sgd", 5, 4.0)
    c = write_comparison([runs[0] / "report", twin], tmp_path / "out", resamples=20)
    assert c["runs"][0]["run"].endswith("/sgd_0")
    assert c["runs"][1]["run"] == "other/sgd_0"


def test_missing_report(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"run .*empty has no report .*flatcal evaluate .*empty"):
        write_comparison([runs[0], tmp_path / "empty"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_few_or_equal_runs(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two"):
        write_comparison(runs[:1], tmp_path)
    with pytest.raises(ValueError, match="given twice"):
        write_comparison([runs[0], runs[0] / "report"], tmp_path)


def test_other_images_are_refused(runs: list[Path], tmp_path: Path) -> None:
    ids, labels, logits = make_logits(300)
    other = tmp_path / "other"
    renamed = [*ids[2:], "x", "y"]
    write_bare_report(Records.from_logits(renamed, labels, logits), other / "report")
    message = r"2 only in sgd_0 \(first 'image/00000'\) and 2 only in other \(first 'x'\), 298"
    with pytest.raises(ValueError, match=message):
        write_comparison([runs[0], other], tmp_path / "out")
    part = Records.from_logits(ids[:200], labels[:200], logits[:200])
    write_bare_report(part, other / "report")
    with pytest.raises(ValueError, match="100 only in sgd_0"):
        write_comparison([runs[0], other], tmp_path / "out")
    labels = np.where(np.arange(300) < 3, (labels + 1) % 10, labels)
    write_bare_report(Records.from_logits(ids, labels, logits), other / "report")
    with pytest.raises(ValueError, match="different labels for 3 of 300"):
        write_comparison([runs[0], other], tmp_path / "out")


def test_other_pixels_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", "sgd", 0, data_identity="0" * 64)
    second = write_run(tmp_path / "b", "sgd", 1, data_identity="1" * 64)
    with pytest.raises(ValueError, match=r"a and b .* other data .* ids \(0{16} and 1{16}\)"):
        write_comparison([first, second], tmp_path / "out")


def test_equal_networks_are_seldom_told_apart() -> None:
    """Under the null, a 95 % interval of a difference misses zero in about 5 % of draws."""
    random = np.random.default_rng(0)
    missed = dict.fromkeys(("accuracy", "ece", "aurc", "auroc"), 0)
    for seed in range(40):
        pair = []
        for _ in range(2):
            confidence = random.beta(4, 1, 400)
            correct = random.random(400) < confidence
            pair.append(Scores(correct, np.log(confidence), *np.zeros((3, 400))))
        samples = bootstrap(pair, 100, seed)
        for name in missed:
            missed[name] += samples.difference(1, 0, name).excludes_zero
    assert all(count <= 8 for count in missed.values()), missed


@pytest.mark.usefixtures("without_figures")
def test_methods_that_share_one_network_are_not_told_apart_by_their_others(tmp_path: Path) -> None:
    """The only shared seed is the same network; the other runs are of other seeds."""
    runs = [write_run(tmp_path / "sgd_0", "sgd", 0), write_run(tmp_path / "sgd_1", "sgd", 1, 4.0)]
    runs += [write_run(tmp_path / "new_0", "new", 0), write_run(tmp_path / "new_2", "new", 2, 1.0)]
    c = write_comparison(runs, tmp_path / "out", resamples=100)
    (row,) = c["differences"]
    assert row["shared_seeds"] == [0]
    assert row["same_predictions"]
    assert not any(row[side][key]["shown"] for side in ("before", "after") for key in COMPARED)
    assert not any("higher" in s or "lower" in s for s in c["verdict"])
    assert "Differences hold" not in c["verdict"][-1]
    assert "the same predictions for every image" in c["verdict"][-1]


@pytest.mark.usefixtures("without_figures")
def test_nothing_is_said_to_hold_where_nothing_is_shown(runs: list[Path], tmp_path: Path) -> None:
    copy = write_run(tmp_path / "copy", "sgd", 0, 4.0)
    c = write_comparison([runs[0], copy], tmp_path / "out", resamples=50)
    assert "Differences hold" not in c["verdict"][-1]
    assert "No difference is shown." in c["verdict"][-1]
    assert c["family"] == {"procedure": "Holm", "level": 0.05, "comparisons": 13}


def test_differences_show_their_sign() -> None:

    unit = METRICS["ece"].unit
    assert show_difference(0.00004, 0.00001, 0.0002, unit) == (
        "+0.004 points", "+0.001 to +0.020",
    )  # fmt: skip
    assert show_difference(-0.02, -0.03, -0.01, unit) == ("−2.00 points", "−3.00 to −1.00")
    assert show_difference(0.0, -0.0004, 0.0004, unit) == ("0.00 points", "−0.04 to +0.04")
    assert show_difference(0.01, None, None, unit) == ("+1.00 points", None)
    assert show_difference(3e-9, -1e-9, 1e-8, METRICS["nll"].unit)[0] == "0.0000"


def write_foreign(
    folder: Path, ids: list[str], network: int, seed: int | None = None, method: str | None = None
) -> Path:
    """A report of a network from elsewhere."""
    _, labels, logits = make_logits(300, seed=network)
    records = Records.from_logits(ids, labels, logits)
    write_bare_report(records, folder, About(title=folder.name, method=method, seed=seed))
    return folder


@pytest.mark.usefixtures("without_figures")
def test_rows_without_ids_are_said_to_pair_by_rows_alone(tmp_path: Path) -> None:
    rows = [f"row_{i:07d}" for i in range(300)]
    first, second = (write_foreign(tmp_path / f"n{network}", rows, network) for network in (0, 1))
    c = write_comparison([first, second], tmp_path / "out", resamples=20)
    assert c["pairing"]["by"] == "rows"
    assert "by their rows alone" in c["pairing"]["text"]
    assert c["pairing"]["disagreeing"] == []
    # The same network, its rows in another order that keeps every label in its place.
    _, labels, logits = make_logits(300)
    order = np.arange(300)
    for k in range(10):
        mine = np.flatnonzero(labels == k)
        order[mine] = np.random.default_rng(k).permutation(mine)
    turned = Records.from_logits(rows, labels, logits[order])
    write_bare_report(turned, tmp_path / "turned", About())
    c = write_comparison([first, tmp_path / "turned"], tmp_path / "out", resamples=20)
    assert c["pairing"]["disagreeing"] == ["turned"]
    assert "the rows seem to be in different orders" in c["pairing"]["text"]


@pytest.mark.usefixtures("without_figures")
def test_files_with_ids_pair_with_runs_by_them(runs: list[Path], tmp_path: Path) -> None:
    ids, *_ = make_logits(300)
    file = write_foreign(tmp_path / "file", ids, 0)
    c = write_comparison([runs[0], file], tmp_path / "out", resamples=20)
    assert c["pairing"]["by"] == "ids"
    seen = write_run(tmp_path / "seen", "sgd", 0, data_identity="0" * 64)
    assert write_comparison([seen, file], tmp_path / "out", resamples=20)["pairing"]["by"] == "ids"
    also = write_run(tmp_path / "also", "sgd", 1, data_identity="0" * 64)
    c = write_comparison([seen, also], tmp_path / "out", resamples=20)
    assert c["pairing"]["by"] == "images"


@pytest.mark.usefixtures("without_figures")
def test_unknown_methods_and_seeds_are_no_seeds_of_one_method(tmp_path: Path) -> None:
    ids, *_ = make_logits(300)
    unknown = [write_foreign(tmp_path / f"u{s}", ids, s) for s in range(3)]
    c = write_comparison(unknown, tmp_path / "out", resamples=20)
    assert [m["name"] for m in c["methods"]] == ["u0", "u1", "u2"]
    assert all(row["shared_seeds"] == [] for row in c["differences"])
    seeds = [write_foreign(tmp_path / f"s{s}", ids, s, seed=s) for s in range(2)]
    c = write_comparison(seeds, tmp_path / "out", resamples=20)
    assert len(c["methods"]) == 2  # seeds of what?
    told = [write_foreign(tmp_path / f"t{s}", ids, s, s, "sam") for s in range(3)]
    c = write_comparison([*told, unknown[0]], tmp_path / "out", resamples=20)
    assert [m["name"] for m in c["methods"]] == ["sam", "u0"]
    assert c["methods"][1]["seeds"] == [None]
