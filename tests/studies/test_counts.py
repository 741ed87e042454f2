"""What a study counts, ranks and waits for: small mistakes would change a figure or an exit."""

import json
import os
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flatcal_dist.files import write_json
from flatcal_dist.runs.directory import RunError, State
from flatcal_dist.studies import command, jobs
from flatcal_dist.studies.elements import Element, elements
from flatcal_dist.studies.estimate import estimate
from flatcal_dist.studies.figures import mean_curves
from flatcal_dist.studies.file import Study, load_study
from flatcal_dist.studies.jobs import How, Jobs
from flatcal_dist.studies.page import beside, write_study
from flatcal_dist.studies.panels import as_json, panels_of, ranks
from flatcal_dist.studies.published import Published
from flatcal_dist.studies.results import read_results
from flatcal_dist.studies.trade import FEWEST, Trade, correlations
from tests.calibration.test_compare import write_run
from tests.support.quick_reports import quick_reports


@pytest.fixture
def study(written) -> Study:
    axes = "axes: {method: {over: {}, under: {sharpness.rule: sam}}}\n"
    return load_study(written(f"{axes}grid: {{run.seed: [0, 1, 2]}}\n"))


def end(element: Element, **state) -> None:
    write_json(element.run / "state.json", asdict(State(phase="finished", **state)))


@pytest.fixture
def evaluated(study: Study) -> list[Element]:
    """Five runs with reports: one arm claims too much, the other too little. The sixth is new."""
    found = elements(study)
    for element in found[:5]:
        method, seed = element.point["method"], element.point["run.seed"]
        write_run(element.run, method, seed, {"over": 2.0, "under": 0.1}[method])
        end(element)
    return found


def test_a_signed_gap_is_ranked_by_its_distance_from_zero(study, evaluated):
    (panel,) = panels_of(study, read_results(evaluated))
    over, under = (arm.mean("signed_gap") for arm in panel.arms)
    assert under < 0 < over < -under, "the runs are made so that sign and distance disagree"
    placed = ranks([panel])
    assert (placed["over"]["signed_gap"], placed["under"]["signed_gap"]) == (1.0, 2.0)


def test_only_runs_with_a_report_count_as_seeds_of_an_arm(study, evaluated):
    (panel,) = panels_of(study, read_results(evaluated))
    arms = as_json(panel)["arms"]
    assert [arm["seeds"] for arm in arms] == [[0, 1, 2], [0, 1]]
    assert [len(arm["runs"]) for arm in arms] == [3, 3]


def test_a_published_figure_stands_beside_mean_and_spread_of_its_arm(study, evaluated):
    results = read_results(evaluated)
    (panel,) = panels_of(study, results)
    (row,) = beside(panel, [Published({"method": "under"}, "ece", 0.1, None, "nobody", "")])
    each = [json.loads((e.run / "report/metrics.json").read_text())["ece"] for e in evaluated[3:5]]
    assert row["measured"] == pytest.approx(statistics.mean(each))
    assert row["measured_sd"] == pytest.approx(statistics.stdev(each))


def test_the_command_of_a_run_has_the_ranks_that_it_ran_on(study, evaluated, tmp_path):
    """`--report` may be given without `--processes`."""
    write_json(evaluated[0].run / "environment.json", {"world_size": 3})
    results = read_results(evaluated[:1])
    with quick_reports(calibrators=False):
        write_study(study, tmp_path / "study.yaml", results, How(processes=2))
    (run,) = json.loads((tmp_path / "runs/study.json").read_text())["runs"]
    assert "--num_processes 3" in run["command"]


def test_the_time_of_a_step_is_the_median_after_the_first_record(study):
    """The first steps of a run warm up, and single steps wait for others on the machine."""
    (element, *_) = elements(study)
    lines = [{"step": n, "perf/step_seconds": s} for n, s in enumerate((9.0, 1.0, 1.0, 4.0))]
    element.run.mkdir(parents=True)
    (element.run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (result,) = read_results([element])
    assert result.step_seconds == 1.0


def test_curves_are_means_over_the_epochs_that_every_seed_has(study):
    found = elements(study)[:2]
    for element, epochs in zip(found, ((1, 2, 3, 4), (1, 2, 3)), strict=True):
        element.run.mkdir(parents=True)
        lines = [{"step": e, "epoch": e, "val/accuracy": e / 10 + element.index, "val/ece": 0.1,
                  "val/aurc": 0.1} for e in epochs]  # fmt: skip
        (element.run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (panel,) = panels_of(study, read_results(found))
    curves = mean_curves(panel.arms[0])
    assert curves["epoch"] == [1, 2, 3]
    assert curves["accuracy"] == pytest.approx([0.6, 0.7, 0.8])


def test_few_comparisons_have_no_correlation(study):
    (panel,) = panels_of(study, read_results(elements(study)))
    found = [
        Trade(panel, panel.arms[0], {k: {"value": float(n)} for k in ("ece", "aurc", "auroc")})
        for n in range(FEWEST)
    ]
    assert FEWEST == 5
    assert correlations(found[:4]) == {"aurc": None, "auroc": None}
    assert correlations(found) == pytest.approx({"aurc": 1.0, "auroc": 1.0})


# Stands for a recipe: it goes on for five seconds unless somebody ends it, and then it is finished.
STUBBORN = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
run = Path(sys.argv[1])
run.mkdir(parents=True)
(run / "began").touch()
time.sleep(5)
(run / "state.json").write_text('{"phase": "finished"}')
"""
HEEDS = STUBBORN.replace("signal.SIG_IGN", "lambda *_: sys.exit(75)")


def test_a_run_that_does_not_stop_is_ended_when_patience_is(study, monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE", 0.5)
    (element, *_) = elements(study)
    words = [sys.executable, "-c", STUBBORN, str(element.run)]
    monkeypatch.setattr(jobs, "command", lambda *_: words)
    running = Jobs(study, How(seconds=1.0))
    running.run([element])
    assert jobs.phase_of(element) == "new", "it was killed before it could finish"


def test_a_signal_that_comes_while_a_run_is_started_reaches_it(study, monkeypatch):
    (element, *_) = elements(study)
    running = Jobs(study, How())

    def interrupted(*_: object) -> list[str]:
        os.kill(os.getpid(), jobs.signal.SIGINT)
        return [sys.executable, "-c", HEEDS, str(element.run)]

    monkeypatch.setattr(jobs, "command", interrupted)
    running.run([element])
    assert running.stopping
    assert jobs.phase_of(element) == "new", "it was asked to stop and did not finish"


def test_an_evaluation_without_result_is_tried_once(study, monkeypatch):
    """And a mistake shows at once, not after the time limit of the tests."""
    study = study.model_copy(update={"evaluate": ["--data", "clean.tar"]})
    (element, *_) = elements(study)
    end(element)
    tried = []

    def evaluate(*_: object) -> list[str]:
        tried.append(element.name)
        if len(tried) > 1:
            raise RunError("tried again")
        return [sys.executable, "-c", ""]

    monkeypatch.setattr(jobs, "evaluation", evaluate)
    running = Jobs(study, How())
    running.run([element])
    assert tried == [element.name]
    assert running.failed == [element]


@pytest.mark.parametrize(("given", "wanted"), [(None, "1"), ("3", "3")])
def test_a_rank_has_one_thread_unless_the_user_says_otherwise(given, wanted, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert jobs.surroundings()["OMP_NUM_THREADS"] == wanted


@pytest.mark.parametrize(
    ("stopping", "out_of_time", "failures", "code"),
    [
        (True, False, 0, 130),
        (True, True, 0, 75),
        (False, False, 0, 75),
        (False, False, 2, "error: 2 of 6 runs did not finish"),
        (True, True, 1, "error: 1 of 6 runs did not finish"),
    ],
)
def test_the_exit_code_tells_why_the_runs_ended(
    study, monkeypatch, stopping, out_of_time, failures, code
):
    monkeypatch.delenv("FLATCAL_EXIT_PREEMPTED", raising=False)
    found = elements(study)
    ended = Jobs(study, How())
    ended.stopping, ended.out_of_time, ended.failed = stopping, out_of_time, found[:failures]
    with pytest.raises(SystemExit) as left:
        command._end(study, Path("study.yaml"), found, ended)
    assert left.value.code == code


def test_the_seeds_of_the_command_line_begin_at_zero(study, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["study.py", str(tmp_path / "study.yaml"), "--seeds", "2", "--list"]
    )
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("run.seed=")[1][0] for line in lines] == ["0", "1", "0", "1"]


def test_the_time_of_finished_runs_is_that_of_their_other_seeds(study, capsys):
    """Nothing is measured, finished runs count no more, and runs side by side share the time."""
    found = elements(study)
    end(found[0], seconds=3600.0)
    end(found[3], seconds=7200.0)
    end(found[4], seconds=7200.0)
    estimate(study, found, replace(How(), parallel=2))
    *each, total = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in each] == [
        "[1] over-seed1", "[2] over-seed2", "[5] under-seed2"
    ]  # fmt: skip
    assert total.startswith("about 2 h 00 min for the missing runs, 2 at a time")
