"""What a study ends in: results.csv, study.json and the page, from runs whose figures are known."""

import csv
import json
import re
import statistics
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy.stats import rankdata, spearmanr

from flatcal_dist.config import ConfigError
from flatcal_dist.files import write_json
from flatcal_dist.runs.directory import RunError, State
from flatcal_dist.studies.elements import Element, elements
from flatcal_dist.studies.file import Study, load_study
from flatcal_dist.studies.jobs import How, evaluation, to_do
from flatcal_dist.studies.page import write_study
from flatcal_dist.studies.results import SHIFTED, read_results
from tests.calibration.test_compare import write_run
from tests.calibration.test_report import assert_sound_page, strict_json
from tests.support.launching import ROOT
from tests.support.quick_reports import quick_reports

SCALES = {"sgd": 4.0, "sam": 3.0, "csam": 1.8, "focal": 1.2}
SECONDS = {"sgd": 0.1, "sam": 0.2, "csam": 0.21, "focal": 0.1}
STUDY = """
base: {root}/configs/digits/sgd.yaml
directory: {directory}
question: Which one?
published: published.csv
axes:
  method:
    sgd: {{sharpness.rule: none}}
    sam: {{sharpness.rule: sam}}
    csam: {{sharpness.rule: csam, sharpness.gamma: 1.0}}
    focal: {{objective.name: focal}}
  network: {{small: {{model.options.width: 8}}, large: {{model.options.width: 16}}}}
grid: {{run.seed: [0, 1, 2]}}
"""
PUBLISHED = """method,network,metric,value,sd,source,differs
sam,,ece,0.05,0.01,"Nobody (2020), table 1",another network
csam,large,nll_after_temperature,0.5,,"Nobody (2020), table 2",
"""
LEFT_OUT = "csam-large-seed2"  # a run that was not trained yet


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, list[Element], Path]:
    folder = tmp_path_factory.mktemp("study")
    (folder / "published.csv").write_text(PUBLISHED)
    file = folder / "which.yaml"
    file.write_text(STUDY.format(root=ROOT, directory=folder / "runs"))
    study = load_study(file)
    found = elements(study)
    for element in found:
        if element.name != LEFT_OUT:
            finished(element)
    with quick_reports(calibrators=False):
        write_study(study, file, read_results(found), How(processes=2))
    return study, found, folder


def finished(element: Element) -> None:
    """What a run leaves, with a network of known confidence."""
    method, seed = element.point.get("method", "sgd"), element.point.get("run.seed", 0)
    scale = SCALES[method] * (1.5 if element.point.get("network") == "large" else 1.0)
    write_run(element.run, method, seed, scale)
    write_json(element.run / "state.json", asdict(State(phase="finished", step=30, seconds=3.0)))
    records = [
        {"step": step, "perf/step_seconds": seconds * SECONDS[method] * (1 + 0.1 * seed)}
        for step, seconds in ((10, 9.0), (20, 1.0), (30, 1.0))
    ]
    records += [
        {"step": 10 * e, "epoch": e, "val/accuracy": 0.5 + 0.1 * e + 0.01 * seed, "val/ece": 0.1,
         "val/aurc": 0.05 * e} for e in (1, 2, 3)
    ]  # fmt: skip
    (element.run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_json(element.run / "environment.json", {
        "python": "3.11", "packages": {"torch": "2.14", "timm": "1"}, "cpu_count": 2, "devices": [],
        "code": {"commit": "abc123", "diff_sha256": None}, "engine": "ddp", "precision": "fp32",
        "world_size": 2,
    })  # fmt: skip


def metrics(element: Element) -> dict:
    return json.loads((element.run / "report/metrics.json").read_text())


def of(found: list[Element], method: str, network: str) -> list[Element]:
    wanted = {"method": method, "network": network}
    return [e for e in found if wanted.items() <= e.point.items() and e.name != LEFT_OUT]


def test_every_run_is_a_row_with_its_figures_and_what_made_it(made):
    study, found, _ = made
    with (Path(study.directory) / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["run"] for row in rows] == [element.name for element in found]
    for row, element in zip(rows, found, strict=True):
        assert (row["method"], row["network"]) == (
            element.point["method"],
            element.point["network"],
        )
        assert int(row["seed"]) == element.point["run.seed"]
        if element.name == LEFT_OUT:
            assert (row["phase"], row["ece"], row["commit"]) == ("new", "", "")
            continue
        m = metrics(element)
        for key in ("accuracy", "nll", "ece", "aurc", "auroc", "temperature"):
            assert float(row[key]) == m[key]
        assert float(row["ece_after_temperature"]) == m["after_temperature"]["ece"]
        assert (row["commit"], row["uncommitted_changes"]) == ("abc123", "none")
        assert (row["machine"], row["torch"]) == ("2 CPU cores", "2.14")
        assert f"run.seed={row['seed']}" in row["overrides"]


def test_means_spreads_differences_and_cost(made):
    study, found, _ = made
    written = strict_json(Path(study.directory) / "study.json")
    assert [panel["name"] for panel in written["panels"]] == ["small", "large"]
    for panel in written["panels"]:
        assert panel["baseline"] == "sgd"
        for arm in panel["arms"]:
            runs = of(found, arm["name"], panel["name"])
            for key in ("accuracy", "ece", "aurc", "nll_after_temperature"):
                name, _, after = key.partition("_after_")
                each = [metrics(e)["after_temperature"][name] if after else metrics(e)[name]
                        for e in runs]  # fmt: skip
                figure = arm["figures"][key]
                assert figure["mean"] == pytest.approx(statistics.mean(each), rel=1e-12)
                assert figure["sd"] == pytest.approx(statistics.stdev(each), rel=1e-9)
            ratio = SECONDS[arm["name"]] / SECONDS["sgd"]
            assert arm["step_seconds_over_baseline"]["mean"] == pytest.approx(ratio, rel=1e-9)
        for row in panel["differences"]:
            shared = [0, 1] if (row["method"], panel["name"]) == ("csam", "large") else [0, 1, 2]
            assert row["shared_seeds"] == shared
            of_seeds = [
                metrics(a)["ece"] - metrics(b)["ece"]
                for a, b in zip(of(found, row["method"], panel["name"]),
                                of(found, "sgd", panel["name"]), strict=False)
            ]  # fmt: skip
            assert row["before"]["ece"]["value"] == pytest.approx(
                statistics.mean(of_seeds), abs=1e-12
            )
        folder = Path(study.directory) / panel["comparison"]
        assert json.loads((folder / "comparison.json").read_text())["baseline"] == "sgd"


def test_ranks_are_those_of_scipy(made):
    study, found, _ = made
    written = strict_json(Path(study.directory) / "study.json")
    for key, sign in (("accuracy", -1), ("ece", 1), ("auroc", -1)):
        each = []
        for network in ("small", "large"):
            means = [
                statistics.mean(metrics(e)[key] for e in of(found, m, network)) for m in SCALES
            ]
            each.append(rankdata([sign * value for value in means]))
        wanted = dict(zip(SCALES, sum(each) / 2, strict=True))
        assert {name: of[key] for name, of in written["ranks"].items()} == pytest.approx(wanted)


def test_calibration_beside_failure_prediction(made):
    study, _, _ = made
    written = strict_json(Path(study.directory) / "study.json")
    rows = [row["before"] for panel in written["panels"] for row in panel["differences"]]
    columns = {k: [row[k]["value"] for row in rows] for k in ("ece", "aurc")}
    wanted = spearmanr(columns["ece"], columns["aurc"]).statistic
    text = " ".join(written["calibration_and_failure_prediction"])
    assert f"{abs(wanted):.2f} with AURC" in text
    shown = {
        f"{row['method']} ({panel['name']})"
        for panel in written["panels"] for row in panel["differences"]
        if row["before"]["ece"]["shown"] and row["before"]["ece"]["value"] < 0
    }  # fmt: skip
    assert shown, "the networks were made so that some calibrate better"
    for name in re.findall(r"\w+ \((?:small|large)\)", text):
        assert name in shown, "what is not shown is not claimed"


def test_published_figures_stand_beside_ours(made):
    study, found, _ = made
    rows = strict_json(Path(study.directory) / "study.json")["published"]
    assert [(row["panel"], row["arm"], row["metric"]) for row in rows] == [
        ("small", "sam", "ece"), ("large", "sam", "ece"),
        ("large", "csam", "nll_after_temperature"),
    ]  # fmt: skip
    ours = [metrics(e)["after_temperature"]["nll"] for e in of(found, "csam", "large")]
    assert rows[-1]["measured"] == pytest.approx(statistics.mean(ours))
    assert rows[-1]["seeds"] == 2
    assert (rows[0]["value"], rows[0]["sd"], rows[0]["differs"]) == (0.05, 0.01, "another network")


def test_the_page_leads_from_each_number_to_its_run(made):
    study, found, _ = made
    folder = Path(study.directory)
    written = strict_json(folder / "study.json")
    files = {"results.csv", "study.json"}
    files |= {f"{panel['comparison']}/index.html" for panel in written["panels"]}
    assert all((folder / file).is_file() for file in files)
    reports = {run["report"] for run in written["runs"] if run["report"]}
    assert {(folder / file).resolve() for file in reports} == {
        element.run / "report/index.html" for element in found if element.name != LEFT_OUT
    }
    page = assert_sound_page(folder / "index.html", files | reports)
    assert reports <= set(page.targets)
    for element in found:
        assert element.name in page.text
        assert str(element.run) in page.text
    assert page.text.count("recipes/imagenet_csam.py --config") == len(found)
    assert "1 run of this study has no report yet" in page.text
    assert "Which one?" in page.text
    assert "another network" in page.text


def test_what_the_study_evaluates_under_shift_is_averaged_over_its_sets(tmp_path):
    file = tmp_path / "shift.yaml"
    file.write_text(
        f"base: {ROOT}/configs/digits/sgd.yaml\ndirectory: {tmp_path}/r\n"
        "axes: {method: {sgd: {}, sam: {sharpness.rule: sam}}}\ngrid: {run.seed: [0, 1]}\n"
        "evaluate: [--data, clean.tar, --data, blurred=blurred.tar]\n"
    )
    study = load_study(file)
    found = elements(study)
    for element in found:
        finished(element)
        assert to_do(study, element) == "evaluate"
        assert evaluation(study, element, How(processes=2))[-6:] == [
            str(ROOT / "recipes/evaluate.py"), str(element.run), *study.evaluate
        ]  # fmt: skip
        seed = element.point["run.seed"]
        each = [dict.fromkeys(SHIFTED, value + 0.01 * seed) for value in (0.1, 0.2, 0.6)]
        write_json(element.run / "report/shift.json", {
            "schema_version": 2,
            "clean": {},
            "sets": [
                {"name": "blurred", "corruption": None, "before": each[0]},
                {"name": "other", "corruption": None, "before": each[1]},
                {"name": "noise", "corruption": "noise", "before": dict.fromkeys(SHIFTED, 9.0)},
            ],
            "corruptions": [{"name": "noise", "before": {"all": each[2]}}],
        })  # fmt: skip
        assert to_do(study, element) is None
    with quick_reports(calibrators=False):
        write_study(study, file, read_results(found), How())
    (panel,) = strict_json(tmp_path / "r/study.json")["panels"]
    for arm in panel["arms"]:
        assert arm["figures"]["ece_under_shift"]["mean"] == pytest.approx(0.3 + 0.005)
        assert arm["figures"]["ece_under_shift"]["sd"] == pytest.approx(0.01 / 2**0.5)
    assert "ECE under shift" in (tmp_path / "r/index.html").read_text()


@pytest.mark.parametrize(
    "axes",
    [
        "grid: {sharpness.rule: [none, sam], run.seed: [0, 1]}",
        "grid: {model.options: [{width: 8}, {width: 16, depth: 3}], run.seed: [0]}",
        "grid: {optimizer.clip_norm: [null, 1.0], model.options.drop_rate: [0, 0.1]}",
        "grid: {model.options.x: [[a, b], ['x<y']], train.epochs: [3, 9]}\npanels: [train.epochs]",
        "grid: {model.options.x: ['müsli $1_2$', '<b>', _u]}\nquestion: '<i>Is 1 < 2?'",
        "grid: {run.seed: [3]}",
    ],
)
def test_studies_of_all_kinds_of_values(axes, tmp_path):
    file = tmp_path / "kinds.yaml"
    file.write_text(
        f"base: {ROOT}/configs/digits/sgd.yaml\ndirectory: {tmp_path}/a b\n"
        f"set: {{data.workers: 0}}\n{axes}\n"
    )
    study = load_study(file)
    found = elements(study)
    for element in found:
        finished(element)
    with quick_reports(calibrators=False):
        panels = write_study(study, file, read_results(found), How(processes=2))
    assert sum(len(arm.results) for panel in panels for arm in panel.arms) == len(found)
    written = strict_json(tmp_path / "a b/study.json")
    pages = {f"{p['comparison']}/index.html" for p in written["panels"] if p["comparison"]}
    reports = {run["report"] for run in written["runs"]}
    page = assert_sound_page(
        tmp_path / "a b/index.html", pages | reports | {"results.csv", "study.json"}
    )
    for panel in panels:
        for arm in panel.arms:
            assert arm.name in page.text
    with (tmp_path / "a b/results.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == len(found)


def test_panels_whose_names_look_alike_have_pages_of_their_own(tmp_path):
    file = tmp_path / "alike.yaml"
    file.write_text(
        f"base: {ROOT}/configs/digits/sgd.yaml\ndirectory: {tmp_path}/r\npanels: [data, network]\n"
        "axes:\n  data: {a_b: {}, a: {train.epochs: 20}}\n"
        "  network: {c: {model.options.width: 8}, b_c: {model.options.width: 16}}\n"
        "  method: {sgd: {}, sam: {sharpness.rule: sam}}\ngrid: {run.seed: [0]}\n"
    )
    study = load_study(file)
    found = elements(study)
    for element in found:
        finished(element)
    with quick_reports(calibrators=False):
        write_study(study, file, read_results(found), How())
    written = strict_json(tmp_path / "r/study.json")
    pages = {f"{panel['comparison']}/index.html" for panel in written["panels"]}
    assert len(pages) == len(written["panels"]) == 4
    reports = {run["report"] for run in written["runs"]}
    assert_sound_page(tmp_path / "r/index.html", pages | reports | {"results.csv", "study.json"})


def test_one_run_alone_and_damaged_runs(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text(
        f"base: {ROOT}/configs/digits/sgd.yaml\ndirectory: {tmp_path}/r\n"
        "axes: {method: {sgd: {}}, network: {small: {model.options.width: 8}}}\n"
        "grid: {run.seed: [0]}\n"
    )
    study = load_study(file)
    (element,) = elements(study)
    finished(element)
    with quick_reports(calibrators=False):
        write_study(study, file, read_results([element]), How())
    written = strict_json(tmp_path / "r/study.json")
    (panel,) = written["panels"]
    assert panel["differences"] == []
    assert panel["comparison"] is None
    environment = element.run / "environment.json"
    for text, what in (("{", "cannot be read"), ("[1]", "holds no keys and values")):
        environment.write_text(text)
        with pytest.raises(RunError, match=f"environment.json {what}.*Move it away"):
            read_results([element])
    environment.unlink()
    assert read_results([element])[0].environment == {}
    (element.run / "report/metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"sgd-small-seed0 cannot be read.*flatcal evaluate"):
        read_results([element])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,metric,value\nsam,ece,1\n", "lacks the column source"),
        ("method,metric,value,source,colour\n", "has a column 'colour'"),
        ("metric,metric,value,source\n", "two columns of one name"),
        ("method,metric,value,source\nsan,ece,1,x\n", "'san' is not a place on method"),
        ("method,metric,value,source\nsam,eec,1,x\n", "line 2: metric 'eec' is no metric"),
        ("method,metric,value,source\nsam,mce_after_temperature,1,x\n", "nor one of nll, brier"),
        ("method,metric,value,source\nsam,ece,one,x\n", "value=one is not a finite number"),
        ("method,metric,value,source\nsam,ece,,x\n", "value is empty"),
        ("method,metric,value,source\nsam,ece,1,\n", "source is empty"),
        ("method,metric,value,source\nsam,ece,nan,x\n", "not a finite number"),
        ("method,metric,value,source\nsam,ece,1\n", "another number of cells"),
        ("method,metric,value,source\nsam,ece,1,x,y\n", "another number of cells"),
        ("", "lacks the column metric"),
        (None, "cannot read the published figures"),
        ("\xff", "cannot read the published figures"),
    ],
)
def test_published_figures_that_cannot_be_used(text, message, made, tmp_path):
    study, found, folder = made
    file = tmp_path / "published.csv"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    other = study.model_copy(update={"published": str(file), "directory": str(tmp_path)})
    with pytest.raises(ConfigError, match=message):
        write_study(other, folder / "which.yaml", read_results(found), How())
