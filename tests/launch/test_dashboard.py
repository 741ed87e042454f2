"""Dashboards as code: built without a network, and of nothing that a run does not write."""

import importlib.util
import json
from pathlib import Path

import pytest

from flatcal_dist.data import prepare_digits
from flatcal_dist.tracking.tracker import read_metrics
from tests.support.launching import ROOT, digits, launch

spec = importlib.util.spec_from_file_location("dashboard", ROOT / "launch/dashboard.py")
dashboard = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dashboard)

STUDY = ROOT / "configs/studies/digits_rho_gamma.yaml"


def names(value: object) -> set[str]:
    """Every string of a specification that looks like a metric of ours."""
    if isinstance(value, dict):
        return set().union(*map(names, value.values()))
    if isinstance(value, list):
        return set().union(*map(names, value))
    families = ("train/", "optim/", "perf/", "val/", "calibration/")
    text = value.removeprefix("summary:") if isinstance(value, str) else ""
    return {text} if text.startswith(families) else set()


@pytest.mark.parametrize(
    ("kind", "subject"), [("run", "csam-seed0"), ("rules", None), ("study", str(STUDY))]
)
def test_specifications_are_built_offline_and_show_what_they_say(kind, subject, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody there
    name, grid, project = dashboard._subject(kind, subject)
    for make in (dashboard.workspace, dashboard.report):
        built = dashboard.specification(make(kind, "title", name, grid, "", project))
        text = json.dumps(built)
        assert names(json.loads(json.dumps(built))) <= dashboard.metrics_shown()
        assert {"val/ece", "train/perturbed_loss", "calibration/nll"} <= names(built)
        assert ("setting.value" in text) == (kind != "run"), "only seeds are pooled"
        if kind != "rules":
            assert name in text
    assert grid == ([] if kind != "study" else list(dashboard.load_study(STUDY).grid))


def test_every_metric_on_a_panel_is_one_that_a_run_writes(tmp_path):
    data, run = prepare_digits(tmp_path / "digits"), tmp_path / "run"
    done = launch(
        "imagenet_csam",
        *digits("csam", run, data, "train.max_steps=4", "train.log_every_steps=1"),
        "evaluate.at_end=true",
        "train.validate_every_epochs=1",
        processes=1,
    )
    assert done.returncode == 0, done.stdout
    written = {key for record in read_metrics(run / "metrics.jsonl") for key in record}
    assert dashboard.metrics_shown() <= written
    for figure in dashboard.MEDIA:  # what the W&B process sends of the report
        assert Path(run, "report/figures", figure.removeprefix("report/") + ".svg").exists()


@pytest.mark.parametrize(
    "name", ["a<b", "it's", 'a"b', "a\\b", "x' or State = 'y", "m\u00fcsli+1", "="]
)
@pytest.mark.parametrize("kind", ["run", "study"])
def test_any_name_is_looked_for_as_it_is(name, kind):
    title = dashboard.plain(f"One run: {name}")
    for make in (dashboard.workspace, dashboard.report):
        built = json.dumps(dashboard.specification(make(kind, title, name, [], "", "project")))
        assert f'"value": {json.dumps(name)}' in built or f'"query": {json.dumps(name)}' in built


@pytest.mark.parametrize("error", [ConnectionError("refused"), RuntimeError("no such entity")])
def test_what_keeps_a_dashboard_from_the_server_is_said(error, monkeypatch):
    """W&B, requests and gql each raise errors of their own."""

    def save(_view: object) -> None:
        raise error

    monkeypatch.setattr(dashboard.ws.Workspace, "save", save)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("sys.argv", ["dashboard.py", "run", "x", "--push", "--entity", "team"])
    with pytest.raises(
        SystemExit, match=rf"(?s)workspace was not made: {error}.*127.0.0.1:9.*team/"
    ):
        dashboard.main()


def test_specifications_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dashboard.py", "rules", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: --output .*no regular file"):
        dashboard.main()
