"""What contradicts a study is refused before anything is trained: files, words and other runs."""

import os
import signal
import sys

import pytest

from flatcal_dist import config as configuration
from flatcal_dist.config import ConfigError
from flatcal_dist.ranks.signals import SIGNALS
from flatcal_dist.runs.directory import RunError
from flatcal_dist.studies import command, jobs
from flatcal_dist.studies import file as study_file
from flatcal_dist.studies.elements import elements
from flatcal_dist.studies.file import load_study
from flatcal_dist.studies.jobs import How, Jobs, refuse_other_runs
from flatcal_dist.studies.published import published_beside

AXES = "axes: {method: {sgd: {}, sam: {sharpness.rule: sam}}}\ngrid: {run.seed: [0, 1]}\n"


def told(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    """Return with what the command of a study ends."""
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        command.main()
    return left.value.code


@pytest.mark.parametrize("words", [["--list"], ["--report"], []])
def test_a_run_of_another_configuration_is_not_taken_for_the_study_s(written, monkeypatch, words):
    file = written(AXES)
    (first, *_) = elements(load_study(file))
    first.run.mkdir(parents=True)
    configuration.write(first.config, first.run / "config.yaml")
    refuse_other_runs(elements(load_study(file)))  # its own
    refuse_other_runs(elements(load_study(file), ["wandb.mode=offline", "evaluate.folds=3"]))
    said = told(monkeypatch, file, *words, "train.epochs=7")
    assert f"{first.run} holds a run of another configuration than the study's" in said
    assert "train.epochs: the run has 150, now 7" in said
    assert "--directory" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"set: {{run: {{dir: /x}}}}\n{AXES}", r"run\.dir follows from the study"),
        (f"set: {{wandb: {{name: x}}}}\n{AXES}", r"wandb\.name follows from the study"),
        (f"set: {{run: {{seed: 5}}}}\n{AXES}", r"run\.seed stands in grid\.run\.seed and in set"),
        ("axes: {m: {a: {run: {seed: 5}}}}\ngrid: {run.seed: [0]}", r"run\.seed and in axes\.m"),
        ("axes: {ece: {a: {}}}", r"axes\.ece has the name of a column of results\.csv"),
        ("axes: {run: {a: {}}}", r"axes\.run has the name of a column"),
        (f"panels: [run.seed]\n{AXES}", r"panels names run\.seed, which is not .* other than"),
        ("exclude: {run.seed: 0}\n" + AXES, r"exclude: expected a list of combinations"),
        ("grid: {data.mean: [[0.0], [0.5]]}\nexclude: [{data.mean: [0.0]}]", r"list: \[\[0\.0\]\]"),
        ("axes: {m: {é: {}}}", "a letter from A to Z"),
    ],
)  # fmt: skip
def test_a_study_that_contradicts_itself_is_refused(written, text, message):
    with pytest.raises(ConfigError, match=message):
        elements(load_study(written(text)))


def test_sections_that_set_other_keys_do_not_contradict_each_other(written):
    text = "set: {sharpness.scope: rank}\naxes: {m: {a: {sharpness: {rule: sam}}}}\n"
    text += "grid: {sharpness.rho: [0.1, 0.2]}"
    found = elements(load_study(written(text)))
    assert [one.config.sharpness.rho for one in found] == [0.1, 0.2]
    assert all(one.config.sharpness.scope == "rank" for one in found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run={dir: /x}", "run.dir follows from the study"),
        ("run={seed: 3}", "run.seed is set by axes or grid"),
        ("sharpness={rule: none}", "sharpness.rule is set by axes or grid"),
    ],
)
def test_a_section_on_the_command_line_is_what_it_holds(written, override, message):
    study = load_study(written(AXES))
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        elements(study, [override])
    assert len(elements(study, ["sharpness={}", "train={epochs: 3}"])) == 4


def test_words_are_checked_as_the_file_is(written, monkeypatch):
    file = written(AXES)
    monkeypatch.setattr(study_file, "MOST_RUNS", 5)
    assert "at most 5 are read" in told(monkeypatch, file, "--seeds", "3", "--list")
    seeded = written("axes: {m: {a: {run.seed: 5}, b: {sharpness.rule: sam}}}")
    assert "run.seed stands in" in told(monkeypatch, seeded, "--seeds", "2", "--list")
    missing = told(monkeypatch, written(AXES), "--launcher", "nope.yaml", "--dry-run")
    assert "--launcher nope.yaml: there is no such file" in missing


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("method,metric,value,source\n\n\nsam,ece,5.0,x\n", "line 4: value=5.0 is no fraction"),
        ("method,metric,value,source,sd\nsam,ece,0.05,x,-1\n", "line 2: sd=-1 is negative"),
        ("method,run.seed,metric,value,source\nsam,0,ece,0.1,x\n", "run.seed"),
        ("method,metric,value,source\nsgd,nll,1.5,x\n", "no run of the study is at method=sgd"),
        (None, "cannot read the published figures"),
    ],
)
def test_published_figures_are_read_before_anything_is_trained(
    written, tmp_path, monkeypatch, rows, message
):
    if rows is not None:
        (tmp_path / "published.csv").write_text(rows)
    file = written(f"published: published.csv\n{AXES}exclude: [{{method: sgd}}]\n")
    monkeypatch.setattr(Jobs, "run", lambda *_: pytest.fail("it began"))
    assert message in told(monkeypatch, file)


def test_published_figures_may_be_large_where_no_rate_is_meant(written, tmp_path):
    (tmp_path / "published.csv").write_text("method,metric,value,source\nsam,nll,3.5,x\n")
    study = load_study(written(f"published: published.csv\n{AXES}"))
    (figure,) = published_beside(study, elements(study))
    assert figure.value == 3.5


def test_a_damaged_run_is_named_and_stops_no_other(written, monkeypatch, capsys):
    file = written(AXES)
    first, *others = elements(load_study(file))
    first.run.mkdir(parents=True)
    (first.run / "state.json").write_text('{"phase"')
    monkeypatch.setattr(sys, "argv", ["study.py", str(file), "--list"])
    command.main()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "damaged", "new", "new", "new",
    ]  # fmt: skip
    finish = (
        "import sys; from pathlib import Path; run = Path(sys.argv[1]); run.mkdir(parents=True)"
    )
    finish += "; (run / 'state.json').write_text('{\"phase\": \"finished\"}')"
    monkeypatch.setattr(
        jobs, "command", lambda _, one, __: [sys.executable, "-c", finish, str(one.run)]
    )
    assert told(monkeypatch, file) == "error: 1 of 4 runs did not finish"
    assert "state.json cannot be read" in capsys.readouterr().out
    assert {jobs.phase_of(one) for one in others} == {"finished"}
    with pytest.raises(RunError):
        jobs.phase_of(first)


def test_before_any_run_there_is_nothing_to_report(written, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", str(written(AXES)), "--report"])
    command.main()
    assert "no run is finished yet" in capsys.readouterr().out


def test_a_closed_terminal_stops_the_runs_and_handlers_are_given_back(written, monkeypatch):
    """While the page is written afterwards, Ctrl-C ends the command as it always does."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    study = load_study(written(AXES))
    running = Jobs(study, How())
    heeds = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(75)); "

    def started(*_: object) -> list[str]:
        os.kill(os.getpid(), SIGNALS[-1])
        return [sys.executable, "-c", heeds + "time.sleep(60)"]

    monkeypatch.setattr(jobs, "command", started)
    running.run(elements(study)[:1])
    assert running.stopping
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
