"""Settings that images kept apart choose: which run, its figures, and what contradicts a choice."""

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from flatcal_dist.config import ConfigError
from flatcal_dist.files import write_json
from flatcal_dist.runs.directory import State
from flatcal_dist.studies import command
from flatcal_dist.studies.choice import check_settings
from flatcal_dist.studies.elements import Element, elements
from flatcal_dist.studies.file import load_study
from flatcal_dist.studies.jobs import How
from flatcal_dist.studies.page import write_study
from flatcal_dist.studies.panels import Panel
from flatcal_dist.studies.results import read_results
from tests.calibration.test_compare import write_run
from tests.calibration.test_report import Page, assert_sound_page
from tests.support.quick_reports import quick_reports

TEXT = """
set: {data.holdout: 0.2}
axes:
  method:
    sgd: {sharpness.rule: none}
    low: {sharpness.rule: sam, sharpness.rho: 0.02}
    middle: {sharpness.rule: sam, sharpness.rho: 0.05}
    high: {sharpness.rule: sam, sharpness.rho: 0.1}
grid: {run.seed: [0, 1, 2, 3]}
choose:
  sam:
    among: {method: [low, middle, high]}
    against: {method: middle}
    by: [nll, signed_gap, accuracy]
"""
# By seed, of low, middle and high. Seed 2 has equal figures, seed 3 lacks a run.
NLL = [(0.9, 0.8, 0.7), (0.3, 0.4, 0.5), (0.5, 0.5, 0.6), (0.1, 0.2, 0.3)]
GAP = [(-0.02, 0.03, 0.04), (0.2, 0.1, -0.05), (0.1, 0.2, 0.0), (0.0, 0.0, 0.0)]
ACCURACY = [(0.7, 0.9, 0.8), (0.7, 0.6, 0.5), (0.5, 0.6, 0.9), (0.1, 0.2, 0.3)]
CHOSEN = {  # written out by hand from these
    "nll": {0: "high", 1: "low", 2: "low"},
    "signed_gap": {0: "low", 1: "high", 2: "high"},
    "accuracy": {0: "middle", 1: "low", 2: "high"},
}
TITLES = {
    "nll": "chosen by NLL",
    "signed_gap": "chosen by Signed gap",
    "accuracy": "chosen by Accuracy",
}
SCALES = {"sgd": 4.0, "low": 3.0, "middle": 2.5, "high": 1.6}
LEFT_OUT = "high-seed3"


@pytest.fixture
def made(written: Callable[[str], Path]) -> tuple[Path, list[Element]]:
    file = written(TEXT)
    found = elements(load_study(file))
    for element in found:
        if element.name != LEFT_OUT:
            finished(element)
    return file, found


def finished(element: Element) -> None:
    method, seed = element.point["method"], element.point["run.seed"]
    write_run(element.run, method, seed, SCALES[method])
    path = element.run / "report/metrics.json"
    m = json.loads(path.read_text())
    place = ["low", "middle", "high"].index(method) if method != "sgd" else 0
    figures = {key: v[seed][place] for key, v in
               (("nll", NLL), ("signed_gap", GAP), ("accuracy", ACCURACY))}  # fmt: skip
    m["images_apart"] = {"images": 80, "figures": figures}
    write_json(path, m)
    write_json(element.run / "state.json", asdict(State(phase="finished", step=30, seconds=3.0)))


def page_of(file: Path, found: list[Element]) -> Page:
    folder = Path(load_study(file).directory)
    reports = {f"{e.name}/report/index.html" for e in found}
    files = {"results.csv", "study.json", "comparison/index.html", "chosen/index.html"}
    return assert_sound_page(folder / "index.html", reports | files)


def panels(file: Path, found: list[Element]) -> dict[str, Panel]:
    with quick_reports(calibrators=False):
        written = write_study(load_study(file), file, read_results(found), How())
    return {panel.name: panel for panel in written}


def test_each_seed_has_the_best_by_images_kept_apart(made):
    file, found = made
    chosen = panels(file, found)["sam"]
    assert [arm.name for arm in chosen.arms] == ["middle", *TITLES.values()]
    assert chosen.chosen == {TITLES[key]: by_seed for key, by_seed in CHOSEN.items()}
    test_nll = {
        (e.point["method"], e.point["run.seed"]): json.loads(
            (e.run / "report/metrics.json").read_text()
        )["nll"]
        for e in found
        if e.name != LEFT_OUT
    }
    for arm, by_seed in zip(chosen.arms[1:], CHOSEN.values(), strict=True):
        own = [test_nll[method, seed] for seed, method in by_seed.items()]
        assert arm.mean("nll") == pytest.approx(statistics.mean(own), rel=1e-12)
        constant = [test_nll["middle", seed] for seed in by_seed]
        d = chosen.difference(arm, "nll")
        expected = statistics.mean(a - b for a, b in zip(own, constant, strict=True))
        assert d["value"] == pytest.approx(expected, rel=1e-9)


def test_page_and_files_show_them(made):
    file, found = made
    panels(file, found)
    folder = Path(load_study(file).directory)
    written = json.loads((folder / "study.json").read_text())
    (own,) = written["chosen"]
    assert own["baseline"] == "middle"
    assert own["comparison"] == "chosen"
    assert own["chosen"]["chosen by NLL"] == {"0": "high", "1": "low", "2": "low"}
    assert [panel["name"] for panel in written["panels"]] == ["study"], "no other panel changes"
    page = page_of(file, found)
    assert "Chosen without the test images" in page.text
    assert "chosen by NLL: high for seed 0, low for seed 1, low for seed 2." in page.text
    assert (folder / "chosen/index.html").is_file()
    rows = json.loads((folder / "chosen/comparison.json").read_text())["runs"]
    names = [row["run"] for row in rows]
    assert "middle-seed0 (middle)" in names
    assert "middle-seed0 (chosen by Accuracy)" in names, "the constant was chosen here"
    assert "nll_of_images_apart" in (folder / "results.csv").read_text().splitlines()[0]


def test_without_runs_of_all_settings_nothing_is_chosen(made):
    file, found = made
    few = [e for e in found if e.point["method"] != "low"]
    missing = [e for e in found if e.point["method"] == "low"]
    for element in missing:
        (element.run / "report/metrics.json").unlink()
    chosen = panels(file, [*few, *missing])["sam"]
    assert chosen.chosen == {title: {} for title in TITLES.values()}
    page = page_of(file, found)
    assert "chosen by NLL: no seed has all settings yet." in page.text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[low, middle, high]", "[low, mddle]",
         r"choose.sam.among.method = 'mddle' is not one of its values, which are \['sgd', 'low'"),
        ("against: {method: middle}", "against: {rho: middle}",
         "choose.sam.against.rho is not an axis or a key of the grid"),
        ("by: [nll, signed_gap, accuracy]", "by: [nll, eec]",
         "choose.sam.by names 'eec'; images kept apart have the figures accuracy, mean_confidence"),
        ("by: [nll, signed_gap, accuracy]", "by: []", "choose.sam.by: "),
        ("    against: {method: middle}\n", "",
         "choose.sam.against: this key is missing. The setting among them"),
        ("    by:", "    bye:", r"choose.sam.bye: no such key; did you mean by\?"),
        ("  sam:\n    among", "  sam: 3\n  other:\n    among",
         "choose.sam: expected a section with among, against, by"),
        ("  sam:\n    among", "  a b:\n    among", "choose.a b: the name of a choice begins with"),
        ("against: {method: middle}", "against: {method: sgd}",
         "choose.sam: no run matches both among and against"),
        ("against: {method: middle}", "against: {method: [low, middle]}",
         "choose.sam.against matches several settings of one table .*: name one of them"),
        ("set: {data.holdout: 0.2}", "set: {}",
         r"choose.sam: run low-seed0 keeps no images apart .* set: \{data.holdout: 0.2\}"),
    ],
)  # fmt: skip
def test_what_contradicts_a_choice_is_named(old, new, message, written):
    assert TEXT.count(old) == 1
    file = written(TEXT.replace(old, new))

    def read() -> None:
        study = load_study(file)
        check_settings(study.choose, elements(study), study.apart())

    with pytest.raises(ConfigError, match=message):
        read()


def test_it_is_said_before_anything_is_trained(written, monkeypatch):
    file = written(TEXT.replace("set: {data.holdout: 0.2}", "set: {}"))
    monkeypatch.setattr("sys.argv", ["study.py", str(file)])
    with pytest.raises(SystemExit, match="keeps no images apart to choose by"):
        command.main()
    assert not Path(load_study(file).directory).exists()


def test_each_table_has_its_own_constant(written):
    """One setting in each of two tables; in one table they would be two settings."""
    text = TEXT.replace("grid: {run", "grid: {model.options.width: [8, 16], run")
    for panels, several in (("panels: [model.options.width]", False), ("", True)):
        study = load_study(written(text + panels))
        found = elements(study)
        if several:
            with pytest.raises(ConfigError, match="several settings of one table"):
                check_settings(study.choose, found, study.apart())
        else:
            check_settings(study.choose, found, study.apart())
