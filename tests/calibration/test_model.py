"""metrics.json as a model: its schema, files of earlier versions, and files that it refuses."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from flatcal_dist.calibration.comparison.writing import write_comparison
from flatcal_dist.calibration.metrics.entries import GROUPS, METRICS, STATISTICS
from flatcal_dist.calibration.report import model
from flatcal_dist.calibration.report.metrics_csv import metrics_csv
from flatcal_dist.calibration.report.summary import About
from flatcal_dist.calibration.report.writing import render_report, write_report
from tests.support.synthetic import make_records

ABOUT = About(data_identity="0" * 64)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for seed in (0, 1):
        write_report(make_records(200, seed=seed), folder / f"run_{seed}", ABOUT, resamples=20)
    return folder


def changed(run: Path, change: object) -> None:
    m = json.loads((run / "metrics.json").read_text())
    change(m)
    (run / "metrics.json").write_text(json.dumps(m))


def test_schema_is_the_generated_one() -> None:
    command = "python -m flatcal_dist.calibration.report.model"
    assert json.loads(model.SCHEMA.read_text()) == model.schema(), f"write it anew: {command}"


def test_what_is_read_is_what_was_written(reports: Path) -> None:
    file = reports / "run_0" / "metrics.json"
    assert model.read_metrics(file).as_json() == json.loads(file.read_text())


def test_every_metric_has_one_entry_and_is_described() -> None:
    keys = [metric.key for group in GROUPS for metric in group.metrics]
    assert len(keys) == len(set(keys)) == len(METRICS)
    side = model.schema()["$defs"]["AfterTemperature"]
    assert set(METRICS) <= set(side["required"])
    for key, metric in METRICS.items():
        assert metric.name.removeprefix("… ") in side["properties"][key]["description"]
        assert "default" not in side["properties"][key]


def test_report_of_before_a_metric_was_there_is_rendered_and_compared(
    reports: Path, tmp_path: Path
) -> None:
    shutil.copytree(reports, tmp_path, dirs_exist_ok=True)

    def older(m: dict) -> None:
        for side in (m, m["after_temperature"]):
            for key in ("ks", "auroc"):
                del side[key], side["intervals"][key]
        del m["after_temperature"]["difference"]["ks"]

    changed(tmp_path / "run_0", older)
    assert model.read_metrics(tmp_path / "run_0" / "metrics.json").ks is None
    runs = [tmp_path / "run_0", tmp_path / "run_1"]
    found = write_comparison(runs, tmp_path / "compared", resamples=20)
    assert [run["auroc"] is None for run in found["runs"]] == [True, False]
    # The bootstrap goes by the records, which know all that the metric needs.
    assert found["differences"][0]["before"]["auroc"]["value"] is not None
    (tmp_path / "run_0" / "index.html").unlink()
    render_report(tmp_path / "run_0")
    assert "KS error" in (tmp_path / "run_0" / "index.html").read_text()


@pytest.mark.parametrize(
    ("older", "settings"),
    [
        ({"rho": 0.05, "gamma": 0.5}, {"rho": 0.05, "gamma": 0.5}),
        ({"rho": 0.05, "gamma": None}, {"rho": 0.05}),
        ({"rho": None, "gamma": None}, {}),
    ],
)
def test_rho_and_gamma_of_older_files_are_settings(
    older: dict, settings: dict, reports: Path, tmp_path: Path
) -> None:
    shutil.copytree(reports, tmp_path, dirs_exist_ok=True)

    def with_columns(m: dict) -> None:
        del m["about"]["settings"]
        m["about"] |= older

    changed(tmp_path / "run_0", with_columns)
    m = model.read_metrics(tmp_path / "run_0" / "metrics.json")
    assert m.about.settings == settings
    (row,) = csv.DictReader(metrics_csv(m).splitlines())
    assert row["settings"] == ", ".join(f"{key} {value}" for key, value in settings.items())
    assert not {"rho", "gamma"} & row.keys()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(surprise=1), "surprise"),
        (lambda m: m.update(ece="much"), "ece"),
        (lambda m: m["bins"][3].pop("count"), "bins.3.count"),
        (lambda m: m.pop("per_class"), "per_class"),
        (lambda m: m.update(after_temperature=[]), "after_temperature"),
        (lambda m: m["about"].update(seed="seven"), "about.seed"),
    ],
)
def test_other_files_are_refused_in_one_line(
    change: object, named: str, reports: Path, tmp_path: Path
) -> None:
    shutil.copytree(reports, tmp_path, dirs_exist_ok=True)
    changed(tmp_path / "run_1", change)
    with pytest.raises(ValueError, match="evaluate the run again") as error:
        write_comparison([tmp_path / "run_0", tmp_path / "run_1"], tmp_path / "compared")
    assert f" {named}: " in str(error.value)
    assert str(tmp_path / "run_1" / "metrics.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_every_statistic_is_in_the_report_with_its_interval(reports: Path) -> None:
    m = model.read_metrics(reports / "run_0" / "metrics.json")
    for side in (m, m.after_temperature):
        assert list(side.intervals) == list(STATISTICS)
    assert set(m.after_temperature.difference) == set(STATISTICS) - {"accuracy"}
    with pytest.raises(KeyError):
        m.value("intervals")
