"""Jobs on this machine: the time that they may take, failures, and what follows a run."""

import sys
from dataclasses import asdict

import pytest

from flatcal_dist.files import write_json
from flatcal_dist.runs.directory import State
from flatcal_dist.studies import jobs
from flatcal_dist.studies.elements import Element, elements
from flatcal_dist.studies.file import Study, load_study
from flatcal_dist.studies.jobs import How, Jobs

# Stands for a recipe: it says that it runs, then waits for a signal, and is preempted.
WAITS = """
import json, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
run.mkdir(parents=True)
def say(phase):
    (run / "state.json").write_text(json.dumps({"phase": phase}))
def stop(*_):
    say("preempted")
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
say("running")
time.sleep(60)
"""


@pytest.fixture
def study(written) -> Study:
    return load_study(
        written("grid: {run.seed: [0, 1, 2]}\nevaluate: [--data, clean.tar, --data, other.tar]\n")
    )


def test_when_the_time_is_over_runs_are_asked_to_stop_and_no_other_begins(
    study, monkeypatch, capfd
):
    monkeypatch.setattr(
        jobs, "command", lambda _, element, __: [sys.executable, "-c", WAITS, str(element.run)]
    )
    found = elements(study)
    running = Jobs(study, How(parallel=2, seconds=3.0))
    running.run(found)
    assert running.stopping
    assert running.out_of_time
    assert running.failed == [], "who was asked to stop has not failed"
    assert [jobs.phase_of(element) for element in found] == ["preempted", "preempted", "new"]
    assert "the time is over" in capfd.readouterr().out


def ends_at_once(element: Element, phase: str, code: int) -> list[str]:
    state = element.run / "state.json"
    write_json(state, asdict(State(phase=phase)))
    return [sys.executable, "-c", f"import sys; sys.exit({code})"]


def test_a_trained_run_is_evaluated_next_and_a_failure_stops_no_other(study, monkeypatch, capfd):
    outcomes = {0: ("finished", 0), 1: ("failed", 1), 2: ("finished", 0)}
    order = []

    def train(_: Study, element: Element, __: How) -> list[str]:
        order.append(("train", element.index))
        return ends_at_once(element, *outcomes[element.index])

    def evaluate(_: Study, element: Element, __: How) -> list[str]:
        order.append(("evaluate", element.index))
        shift = element.run / "report/shift.json"
        return [sys.executable, "-c", "import sys, pathlib; p = pathlib.Path(sys.argv[1]);"
                "p.parent.mkdir(); p.write_text('{}')", str(shift)]  # fmt: skip

    monkeypatch.setattr(jobs, "command", train)
    monkeypatch.setattr(jobs, "evaluation", evaluate)
    found = elements(study)
    running = Jobs(study, How())
    running.run(found)
    assert order == [
        ("train", 0), ("evaluate", 0), ("train", 1), ("train", 2), ("evaluate", 2)
    ]  # fmt: skip
    assert running.failed == [found[1]]
    assert not running.stopping
    assert "failed (exit code 1)" in capfd.readouterr().out


def test_a_damaged_state_stops_no_other_run(study, monkeypatch):
    monkeypatch.setattr(jobs, "command", lambda _, e, __: ends_at_once(e, "finished", 0))
    study = study.model_copy(update={"evaluate": []})
    found = elements(study)
    found[0].run.mkdir(parents=True)
    (found[0].run / "state.json").write_text("{")
    running = Jobs(study, How())
    running.run(found)
    assert running.failed == [found[0]]
    assert [jobs.phase_of(element) for element in found[1:]] == ["finished", "finished"]


@pytest.mark.parametrize("code", [0, 1])
def test_an_evaluation_without_result_is_a_failure_and_is_not_tried_for_ever(
    study, monkeypatch, code
):
    monkeypatch.setattr(jobs, "command", lambda _, e, __: ends_at_once(e, "finished", 0))
    fails = [sys.executable, "-c", f"import sys; sys.exit({code})"]
    monkeypatch.setattr(jobs, "evaluation", lambda *_: fails)
    (element, *_) = elements(study)
    running = Jobs(study, How())
    running.run([element])
    assert running.failed == [element]
