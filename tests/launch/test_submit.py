"""launch/submit.py: the scripts it writes, and what they do, with SLURM's commands replaced.

A real cluster is in tests/slurm.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flatcal_dist import config as configuration
from flatcal_dist.config import Config
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.runs.status import status
from tests.support.launching import ROOT

GOLDEN = Path(__file__).parents[1] / "support/submitted.sh"
PREEMPTED = '{"phase": "preempted"}'
DIGITS = str(ROOT / "configs/digits/csam.yaml")


def _load():
    spec = importlib.util.spec_from_file_location("submit", ROOT / "launch/submit.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["submit"] = module
    spec.loader.exec_module(module)
    return module


launcher = _load()


@pytest.fixture
def submit(monkeypatch, capsys):
    """submit.py in this process: what it prints; its error ends as SystemExit."""

    def call(*words: str) -> str:
        # A dry run may be for another machine.
        there = "/opt/env/bin/python" if "--dry-run" in words else sys.executable
        command = ["submit.py", "--python", there, *map(str, words)]
        monkeypatch.setattr(sys, "argv", command)
        launcher.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """SLURM's commands, replaced: each notes its arguments in `called`; srun runs `srun.sh`."""
    directory = tmp_path / "commands"
    directory.mkdir()
    programs = {
        "sbatch": "echo 41$(wc -l < {called})",
        "scontrol": "[ $1 = show ] && [ $2 = node ] && echo 'NodeAddr=10.0.0.7 NodeHostName=x'",
        "scancel": "",
        "squeue": "cat {directory}/queue 2>/dev/null",
        "srun": "exec bash {directory}/srun.sh",
    }
    for name, text in programs.items():
        text = text.format(called=directory / "called", directory=directory)
        head = f"#!/bin/bash\necho {name} $* $MASTER_ADDR:$MASTER_PORT >> {directory}/called\n"
        (directory / name).write_text(f"{head}{text}\n:\n" if name != "srun" else head + text)
        (directory / name).chmod(0o755)
    (directory / "called").touch()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def called(commands: Path, name: str) -> list[str]:
    lines = (commands / "called").read_text().splitlines()
    return [line for line in lines if line.startswith(f"{name} ")]


def test_the_scripts_are_these(submit, monkeypatch):
    monkeypatch.chdir("/")
    printed = submit(
        "--dry-run", "--config", DIGITS, "run.dir=/runs/csam", "--nodes", "2",
        "--sbatch=--qos=long", "--evaluate", "--data v2=/data/v2", "--compare", "/runs/sgd",
    )  # fmt: skip
    assert printed == GOLDEN.read_text()
    assert not Path("/runs/csam").exists()


@pytest.mark.parametrize("name", ["srun", "accelerate", "torchrun", "deepspeed"])
def test_shellcheck_finds_nothing(submit, name, tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "_finished", lambda run: False)
    study = tmp_path / "study.yaml"
    study.write_text(f"base: {DIGITS}\ndirectory: {tmp_path}/s\ngrid: {{run.seed: [0, 1]}}\n")
    setup = tmp_path / "setup.sh"
    setup.write_text("export NCCL_DEBUG=WARN\n")
    for what in (["--config", DIGITS, "run.dir=/runs/a"], ["--study", str(study)]):
        arguments = ["--launcher", name, "--setup", str(setup), "--evaluate", "--compare", *what]
        values = launcher._parser().parse_intermixed_args(arguments)
        job = launcher._study(values) if values.study else launcher._run(values)
        for text in launcher.render(job, values).values():
            done = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


ENDS = {  # what the ranks leave behind, environment -> exit code, whether it is requeued
    "finished": ('{"phase": "finished"}', {}, 0, False),
    "preempted": ('{"phase": "preempted", "restarts": 1}', {}, 0, True),
    "preempted too often": (
        '{"phase": "preempted", "restarts": 1}', {"SLURM_RESTART_COUNT": "20"}, 75, False,
    ),
    "stopped by hand": (
        '{"phase": "preempted", "cause": "the file RUN/STOP", "restarts": 1}', {}, 75, False,
    ),
    "failed": ('{"phase": "failed", "cause": "rank 1: no more"}', {}, 1, False),
    "killed": ('{"phase": "running"}', {}, 1, False),
    "another start's": ('{"phase": "preempted"}', {}, 1, False),
    "nothing": ("", {}, 1, False),
}  # fmt: skip


@pytest.mark.parametrize("end", list(ENDS))
def test_only_a_preempted_run_is_requeued(submit, commands, tmp_path, end):
    left, environment, code, requeued = ENDS[end]
    run = tmp_path / "run"
    left = left.replace("RUN", str(run))
    submit("--config", DIGITS, f"run.dir={run}", "--cpu")
    if end == "another start's":
        (run / "state.json").write_text(left)
    (commands / "srun.sh").write_text(f"[ -z '{left}' ] || echo '{left}' > {run}/state.json\n")
    if end == "another start's":
        (commands / "srun.sh").write_text("exit 1\n")
    done = _run_script(run / "slurm/train.sh", environment)
    assert done.returncode == code, done.stderr
    asked = [line for line in called(commands, "scontrol") if "requeue 4242" in line]
    assert bool(asked) == requeued
    assert "10.0.0.7:14242" in called(commands, "srun")[0]
    if end == "failed":
        assert "rank 1: no more" in done.stderr


def test_the_signal_goes_on_to_the_ranks_until_they_end(submit, commands, tmp_path):
    run = tmp_path / "run"
    submit("--config", DIGITS, f"run.dir={run}", "--cpu")
    (commands / "srun.sh").write_text(
        f"kill -USR1 $PPID; until grep -q 'scancel --signal=USR1 4242.0' {commands}/called; do "
        f"sleep 0.1; done; echo '{PREEMPTED}' > {run}/state.json\n"
    )
    done = _run_script(run / "slurm/train.sh", {})
    assert "SLURM asks to stop" in done.stdout
    assert any("requeue 4242" in line for line in called(commands, "scontrol"))


def _run_script(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    slurm = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    return subprocess.run(
        ["bash", str(script)], env=os.environ | slurm | environment, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def test_what_is_submitted_holds_code_and_configuration(submit, commands, tmp_path):
    run = tmp_path / "run"
    printed = submit("--config", DIGITS, f"run.dir={run}", "--cpu", "--evaluate", "--compare")
    assert (run / "code/flatcal_dist/config/loading.py").read_bytes() == (
        ROOT / "flatcal_dist/config/loading.py"
    ).read_bytes()
    assert "commit" in json.loads((run / "code/snapshot.json").read_text())
    first, second, third = called(commands, "sbatch")
    assert f"sbatch --parsable {run}/slurm/train.sh" in first
    assert "--dependency=afterok:411 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afterok:412 --kill-on-invalid-dep=yes" in third
    assert "job 411: " in printed
    assert status([run])[0].phase == "not begun"
    (commands / "queue").write_text("411|PENDING||Priority\n")
    assert (status([run])[0].phase, status([run])[0].queue) == ("submitted", "pending (Priority)")
    with pytest.raises(SystemExit, match="is in the queue: job 411"):
        submit("--config", DIGITS, f"run.dir={run}", "--cpu")


def test_a_method_goes_over_the_configuration_that_is_submitted(submit, commands, tmp_path):
    run, method = tmp_path / "run", ROOT / "configs/methods/crl.yaml"
    submit("--config", ROOT / "configs/digits/sgd.yaml", "--config", method, f"run.dir={run}")
    config = configuration.load(run / "slurm/config.yaml")
    assert (config.objective.name, config.sharpness.rule) == ("crl", "none")
    assert config.data.image_size == 8


def test_a_study_is_an_array_of_what_is_missing(submit, commands, tmp_path):
    file = tmp_path / "seeds.yaml"
    file.write_text(f"base: {DIGITS}\ndirectory: {tmp_path}/seeds\ngrid: {{run.seed: [5, 6, 7]}}\n")
    done = tmp_path / "seeds/seed6"
    done.mkdir(parents=True)
    (done / "state.json").write_text('{"phase": "finished"}')
    submit("--study", file, "--cpu", "--parallel", "2", "--evaluate", "--compare")
    script = (tmp_path / "seeds/slurm/train.sh").read_text()
    assert "#SBATCH --array=0,2%2" in script
    run = tmp_path / "seeds/seed7"
    assert (tmp_path / "seeds/slurm/2.run").read_text() == f"{run}\n"
    config = configuration.load(tmp_path / "seeds/slurm/2.yaml")
    assert (config.run.dir, config.run.seed) == (str(run), 7)
    assert (run / "slurm/job").read_text() == "411_2\n"
    _, evaluation, comparison = called(commands, "sbatch")
    assert "--dependency=aftercorr:411" in evaluation
    assert "--dependency=afterok:412" in comparison
    assert str(done) in (tmp_path / "seeds/slurm/compare.sh").read_text()
    (commands / "srun.sh").write_text(f"echo '{PREEMPTED}' > {run}/state.json\n")
    array = {"SLURM_ARRAY_JOB_ID": "411", "SLURM_ARRAY_TASK_ID": "2"}
    _run_script(tmp_path / "seeds/slurm/train.sh", array)
    (line,) = called(commands, "srun")
    assert f"--config {tmp_path}/seeds/slurm/2.yaml" in line
    assert any("requeue 411_2" in line for line in called(commands, "scontrol"))


def test_what_cannot_be_submitted(submit, tmp_path, monkeypatch):
    def refused(text: str, *words: str) -> None:
        with pytest.raises(SystemExit, match=text):
            submit("--config", DIGITS, *words)

    refused("run.world_size=3, but 1 nodes with 8 ranks are 8", "run.world_size=3")
    refused("SLURM takes no blanks", f"run.dir={tmp_path}/a b")
    refused("did you mean sharpness.rho", "sharpness.roh=1")
    refused("--time 5 is no more than the 300 s", "--time", "5")
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "state.json").write_text('{"phase": "finished"}')
    refused("is finished already", f"run.dir={finished}")
    run = f"run.dir={tmp_path}/run"
    # Each would be another line of the job's script, or other code than the copy.
    refused("a line break", run, "--time", "5:00:00\ntouch /tmp/x")
    refused("a line break", run, "--time-after", "5:00:00\r")
    refused("a line break", run, "--sbatch", "--qos=a\n#SBATCH --wrap=x")
    refused("a colon, which separates", f"run.dir={tmp_path}/10:30")
    refused("SLURM takes no", f"run.dir={tmp_path}/a#b")
    refused("--recipe nosuch: expected one of evaluate, imagenet_csam", run, "--recipe", "nosuch")
    refused("--recipe ../launch/submit", run, "--recipe", "../launch/submit")
    refused("there is no program /nowhere/python", run, "--python", "/nowhere/python")
    refused("holds credentials", run, "--evaluate", "--data http://me:secret@h/x.tar")
    assert not (tmp_path / "run").exists(), "noticed before anything is written"
    monkeypatch.setenv("PATH", "/nowhere")
    refused("submit from a login node", run)


def test_wrong_options_and_directories_are_named_without_a_traceback(submit, tmp_path, monkeypatch):
    def refused(text: str, *words: str) -> None:
        with pytest.raises(SystemExit, match=rf"error: .*{text}"):
            submit(*words)

    monkeypatch.chdir(tmp_path)
    refused("Name --config FILE", "--dry-run")
    run = ("--config", DIGITS, "run.dir=run")
    (tmp_path / "binary").write_bytes(b"\xb1\x00")
    for file in ("nowhere", ".", "binary"):
        refused(f"--setup {re.escape(file)} cannot be read", *run, "--setup", file)
    refused("@binary: expected a text file", *run, "@binary")
    refused("--evaluate .*: no closing quotation", *run, "--evaluate", "--data 'x")
    # What lies in the run directory.
    (tmp_path / "letter").write_text("dear all")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/state.json").write_text("{")
    refused("letter is a file", *run, f"run.dir={tmp_path}/letter")
    refused(
        "no directory can be made as .*letter/run/slurm", *run, f"run.dir={tmp_path}/letter/run"
    )
    refused("other holds files but no config.yaml", *run, f"run.dir={tmp_path}/other")
    refused("state.json cannot be read", *run, f"run.dir={tmp_path}/damaged")


@pytest.mark.parametrize("said", ["", "\n", "Submitted batch job 7", "error: slow", ";cluster"])
def test_an_answer_of_sbatch_without_a_number_is_no_job(submit, commands, tmp_path, said):
    sbatch = commands / "sbatch"
    sbatch.write_text(f"#!/bin/bash\necho '{said}'\n")
    with pytest.raises(SystemExit, match="gave no job number"):
        submit("--config", DIGITS, f"run.dir={tmp_path}/run", "--cpu")
    assert not (tmp_path / "run/slurm/job").exists()
    sbatch.write_text("#!/bin/bash\necho Welcome to the 7th cluster\necho '42;big'\n")
    submit("--config", DIGITS, f"run.dir={tmp_path}/run", "--cpu")
    assert (tmp_path / "run/slurm/job").read_text() == "42\n"


def test_credentials_of_a_study_stand_in_private_files(submit, commands, tmp_path):
    file = tmp_path / "seeds.yaml"
    url = "http://me:hunter2pw@h/x.tar?sig=SeKret9"
    file.write_text(
        f"base: {DIGITS}\ndirectory: {tmp_path}/seeds\ngrid: {{run.seed: [5, 6]}}\n"
        f"set: {{data.prepare: null, data.train: '{url}'}}\n"
    )
    printed = submit("--study", file, "--cpu")
    for written in (tmp_path / "seeds").rglob("*"):
        if written.is_file() and not written.name.endswith(".private.yaml"):
            assert b"hunter2pw" not in written.read_bytes(), written
            assert b"SeKret9" not in written.read_bytes(), written
    assert "hunter2pw" not in printed + (commands / "called").read_text()
    assert configuration.load(tmp_path / "seeds/slurm/1.yaml").data.train == url
    private = tmp_path / "seeds/slurm/1.private.yaml"
    assert private.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-1", 176400),
        ("1-2:3", 93780),
        ("1-0:0:1", 86401),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times_as_sbatch_reads_them(time, seconds):
    assert launcher._seconds(time) == seconds


def test_status_of_a_running_job(commands, tmp_path):
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/job").write_text("7\n")
    (run / "config.yaml").write_text("train: {epochs: 10}\n")
    (run / "environment.json").write_text('{"host": "h", "slurm": {"SLURM_JOB_NODELIST": "n1"}}')
    state = {"phase": "running", "step": 30, "epoch": 2, "restarts": 3, "seconds": 60.0}
    (run / "state.json").write_text(json.dumps(state))
    (run / "metrics.jsonl").write_text(
        '{"step": 24, "epoch": 2, "val/nll": 0.5}\n{"step": 30, "epoch": 2.5, "train/loss": 0.7}\n'
    )
    (commands / "queue").write_text("7|RUNNING|n[1-2]|None\n")
    (one,) = status([run])
    assert (one.phase, one.step, one.total_steps, one.restarts) == ("running", 30, 120, 3)
    assert one.seconds_left == pytest.approx(180.0)  # 90 steps at two seconds
    assert (one.where, one.queue, one.loss, one.val) == ("n[1-2]", "running", 0.7, {"val/nll": 0.5})
    (run / "environment.json").unlink()
    (run / "metrics.jsonl").write_bytes(
        b'{"epoch": 1}\n[1]\n\x00\xff\n{"step": 30, "epoch": 2.5}\n{"st'
    )
    shutil.copytree(run, tmp_path / "other")
    (tmp_path / "other/config.yaml").unlink()
    odd, stranger, again = status([tmp_path / "other", tmp_path, run])  # others are shown still
    assert (odd.phase, stranger.phase) == ("unreadable", "unreadable")
    assert "config.yaml" in odd.cause
    assert "not a run directory" in stranger.cause
    assert (again.phase, again.total_steps, again.where) == ("running", 120, "n[1-2]")


def test_a_run_that_was_killed_is_not_shown_as_running(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open(Config(), {"host": "h"})
    assert status([directory.path])[0].phase == "running"
    directory.lock.close()  # what the system does when the process is gone
    assert status([directory.path])[0].phase == "dead"
    (directory.path / ".lock").write_text("host of.another.machine, process 7")
    assert status([directory.path])[0].phase == "running", "locks may not reach that far"
