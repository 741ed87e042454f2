"""recipes/study.py on this machine: interrupted, gone on, passed over."""

import json
import sys
from pathlib import Path

import pytest

from flatcal_dist.data import prepare_digits
from flatcal_dist.studies.elements import elements
from flatcal_dist.studies.file import load_study
from tests.support.launching import ROOT, interrupt, script


@pytest.mark.exhaustive
def test_a_study_is_interrupted_and_goes_on(tmp_path):
    data = prepare_digits(tmp_path / "digits")
    file = tmp_path / "study.yaml"
    file.write_text(
        f"base: {ROOT}/configs/digits/csam.yaml\n"
        f"set: {{data.train: {data}, data.validation: {data}, wandb.mode: disabled,"
        " train.validate_every_epochs: null, train.log_every_steps: 1, train.max_steps: 60,"
        " evaluate.at_end: false}\n"
        "axes: {method: {sgd: {sharpness.rule: none}, csam: {sharpness.rule: csam}}}\n"
    )
    words = [str(file), "--parallel", "2", "--seeds", "1", "--directory", str(tmp_path / "runs")]
    runs = [tmp_path / "runs" / name for name in ("sgd-seed0", "csam-seed0")]

    study = [sys.executable, str(ROOT / "recipes/study.py")]
    code, output = interrupt([*study, *words], lambda: all(steps(run_) > 2 for run_ in runs))
    assert code == 130, output
    phases = [phase(run_) for run_ in runs]
    assert "preempted" in phases, output
    assert set(phases) <= {"preempted", "finished"}, output

    done = script(ROOT / "recipes/study.py", *words)
    assert done.returncode == 0, done.stdout
    assert [phase(run_) for run_ in runs] == ["finished", "finished"]
    assert [json.loads((run_ / "state.json").read_text())["step"] for run_ in runs] == [60, 60]
    assert "no run has a report" in done.stdout, "tests/studies/test_page.py has those"


def steps(run_: Path) -> int:
    file = run_ / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def phase(run_: Path) -> str:
    return json.loads((run_ / "state.json").read_text())["phase"]


def test_the_study_of_the_readme_is_one(tmp_path):
    text = (ROOT / "launch/README.md").read_text()
    (block,) = [part for part in text.split("```yaml\n")[1:] if part.startswith("base:")]
    (tmp_path / "digits").symlink_to(ROOT / "configs/digits")
    (tmp_path / "studies").mkdir()
    file = tmp_path / "studies/methods.yaml"
    file.write_text(block.partition("```")[0].replace("base: ..", f"base: {ROOT}/configs"))
    assert len(elements(load_study(file))) == 3 * 2 * 3 - 3
