"""Runs that are killed, hung, starved and moved: they end soon, say why, and go on exactly."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.tracking.tracker import Tracker
from flatcal_dist.training import loop, main
from tests.support.jobs import PATIENCE, SAVING, TINY, Run, kill, same, stop_after_six
from tests.support.launching import command, digits, flatcal


@pytest.fixture(scope="session")
def data(digits_shards: Path) -> Path:
    return digits_shards


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    """By engine, a run that nothing happened to."""
    path, runs = tmp_path_factory.mktemp("runs"), {}

    def get(engine: str) -> Run:
        if engine not in runs:
            runs[engine] = Run(path / engine, data, engine).finish()
        return runs[engine]

    return get


@pytest.mark.parametrize(
    ("engine", "kills"),
    [
        ("ddp", 2), ("fsdp2", 1), pytest.param("zero2", 1, marks=pytest.mark.exhaustive),
    ],
)  # fmt: skip
def test_killed_runs_end_with_the_same_bits(engine, kills, data, tmp_path, uninterrupted):
    _kill_test(engine, kills, data, tmp_path, uninterrupted, damage=engine == "ddp")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_killed_twenty_times(engine, data, tmp_path, uninterrupted):
    _kill_test(engine, 20, data, tmp_path, uninterrupted)


def _kill_test(engine, kills, data, tmp_path, uninterrupted, damage=False):
    run = Run(tmp_path / "run", data, engine)
    hits = tries = 0
    while hits < kills:  # a kill that came after the run's end is none
        assert tries < 3 * kills, f"only {hits} of {tries} kills hit a run that was going"
        if run.path.exists() and run.state()["phase"] == "finished":
            shutil.rmtree(run.path)  # from the start again, until there were enough kills
        hits += kill(run, Random(f"{engine} {tries}"), tries + (engine == "zero2"))
        tries += 1
    if damage:
        newest = max(run.path.glob("checkpoints/step_*")) / "state_00000.pt"
        newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    run.finish()
    if damage:
        assert "passed over a checkpoint" in run.log.read_text()
    assert same(run, uninterrupted(engine))


def full_disk(rank):
    """Rank 1 can write no file of more than 100 kB; a state has 200."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def hang(rank):
    original = loop.Trainer._after_step

    def after_step(self, result):
        original(self, result)
        if self.done == 10:
            self.watchdog.limit = 6.0  # only now: on a busy machine a start may take long
            if rank == 1:
                time.sleep(3600)

    loop.Trainer._after_step = after_step


def slow(rank):
    original = loop.Trainer._after_step

    def after_step(self, result):
        original(self, result)
        time.sleep(0.2)

    loop.Trainer._after_step = after_step


def test_what_goes_wrong_is_named_and_the_run_goes_on(data, tmp_path, uninterrupted):
    """One ZeRO-2 run through all of it, to the bits of the one that nothing happened to."""
    run = Run(tmp_path / "run", data, "zero2")

    job = run.start(fault=full_disk)
    assert job.wait() == [1, 1]
    assert "the checkpoint of step 4 could not be written" in run.state()["cause"], job.output()
    assert "File too large" in run.state()["cause"]
    assert run.state()["phase"] == "failed"

    job = run.start(fault=hang)
    assert job.wait() == [1, 1]
    assert run.state()["cause"].startswith("rank 1: no step for 6 s"), run.state()
    assert "hangs in after_step" in run.state()["cause"]
    assert "most recent call first" in job.output(), "all stacks"
    assert run.saved()[-1] == 8

    job = run.start(fault=slow)
    assert job.until(lambda: run.step() >= 12)
    run.path.rename(tmp_path / "elsewhere")
    assert job.wait(PATIENCE)[0] == 1
    assert "has vanished" in job.output() or "could not be written" in job.output()
    # W&B's process may have put a folder of its own there, if it started late.
    begun = [path.name for path in run.path.glob("*") if path.name != "wandb"]
    assert not begun, "an empty one is not begun in its place"
    shutil.rmtree(run.path, ignore_errors=True)
    (tmp_path / "elsewhere").rename(run.path)

    job = run.start(fault=slow)
    assert job.until(lambda: run.step() >= 14)
    job.send(signal.SIGUSR1, rank=1)
    assert job.wait(PATIENCE) == [75, 75], job.output()
    assert (run.state()["phase"], run.state()["cause"]) == ("preempted", "SIGUSR1")
    assert run.saved()[-1] == run.state()["step"]

    job = run.start(fault=slow)
    before = run.state()["step"]
    assert job.until(lambda: run.step() > before)
    (run.path / "STOP").touch()
    assert job.wait(PATIENCE) == [75, 75], job.output()
    assert "STOP" in run.state()["cause"]
    assert not (run.path / "STOP").exists()

    job = run.start("train.stop_after_minutes=0.0001")
    before = run.state()["step"]
    assert job.wait(PATIENCE) == [75, 75], job.output()
    assert (run.state()["step"], run.state()["cause"]) == (before + 1, "deadline")

    run.finish()
    assert same(run, uninterrupted("zero2"))
    assert run.state()["restarts"] == 6


@pytest.mark.parametrize("steps", [100, 25])
def test_a_run_that_diverged_says_where(steps, data, tmp_path):
    """A rate that blows the weights up within some steps: every later one is skipped."""
    run = Run(tmp_path / "run", data, "ddp", "optimizer.learning_rate=1e6")
    job = run.start(f"train.max_steps={steps}", ranks=1)
    assert job.wait() == [1]
    cause = run.state()["cause"]
    found = re.search(r"no finite gradient in (\d+) steps in a row, up to step (\d+):", cause)
    assert found, job.output()
    skipped, last = map(int, found.groups())
    assert (skipped == 50) if steps == 100 else (8 <= skipped < 25 == last)
    assert re.search(r"is the output of \S+ \(\w+\), in the first pass, on rank 0", cause), cause
    assert "There is no checkpoint yet" in cause
    assert not run.saved()


# LookSAM remembers a gradient, AdamW keeps two moments and a count: all of it changes hands.
CHANGING = (
    "sharpness.rule=looksam", "optimizer.name=adamw", "optimizer.learning_rate=0.001",
    "average.name=ema", "average.decay=0.8", "optimizer.momentum=0.9",
)  # fmt: skip


def test_a_run_goes_on_on_other_engines_and_numbers_of_ranks(data, tmp_path):
    """Six steps on each of five, against one that stayed: equal to rounding; then exported."""
    run = Run(tmp_path / "run", data, "ddp", *CHANGING)
    for engine, ranks in (("ddp", 2), ("fsdp2", 1), ("fsdp2", 2), ("zero3", 2)):
        job = run.start(engine=engine, ranks=ranks, fault=stop_after_six)
        assert job.wait() == [75] * ranks, job.output()
    run.finish(engine="zero2", ranks=2)
    assert run.log.read_text().count("was cut for") == 4
    stayed = Run(tmp_path / "stayed", data, "ddp", *CHANGING).finish()
    ours, theirs = run.weights(), stayed.weights()
    # 30 steps whose sums were rounded in other orders; AdamW divides by small numbers.
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 2e-5
    losses = [[r["train/loss"] for k, r in x.records().items() if not k[1]] for x in (run, stayed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    last = max(run.path.glob("checkpoints/step_*"))
    assert len(list(last.glob("state_*.pt"))) == 2

    done = flatcal("export", run.path, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stdout
    exported = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(exported[name], ours[name]) for name in ours), "the average, as the run"

    for network, output in ((last, "of_checkpoint"), (run.path, "of_run")):
        done = flatcal("evaluate", network, "--data", data, "--output", tmp_path / output)
        assert done.returncode == 0, done.stdout
    one, other = (
        Records.load(tmp_path / f / "records.parquet") for f in ("of_checkpoint", "of_run")
    )
    assert np.array_equal(one.before.nll, other.before.nll), "of sharded parts as of the whole"


def signalled_report(rank):
    """While ranks wait for each other in the report rank 1 is signalled, and rank 0 not yet."""
    if os.environ["RANK"] == "1":
        loop.finishing.export_and_report = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    else:
        loop.finishing.export_and_report = lambda *_, **__: torch.distributed.barrier()


def signalled_load(rank):
    loop.resuming.load = lambda *_: os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_outside_the_steps_is_a_preemption(data, tmp_path):
    """So that a SLURM job requeues itself: in the report, and while a checkpoint is loaded."""
    run = Run(tmp_path / "run", data, "ddp", "train.max_steps=4")
    job = run.start(fault=signalled_report)
    assert job.wait(PATIENCE)[1] == 75, job.output()
    assert (run.state()["phase"], run.state()["cause"]) == ("preempted", "SIGTERM"), job.output()
    job = run.start(fault=signalled_load)
    assert job.wait(PATIENCE) == [75, 75], job.output()
    assert (run.state()["phase"], run.state()["cause"]) == ("preempted", "SIGUSR1")
    run.finish()
    assert run.saved() == [4]


def closes_slowly(marker: Path, rank: int) -> None:
    """Rank 0 is slow to close what tracks the run; the other one notes whether it waited."""
    stop_after_six(rank)
    close = Tracker.close

    def slowly(self: Tracker, exit_code: int = 0) -> None:
        time.sleep(2)
        close(self, exit_code)
        marker.touch()

    if rank == 0:
        Tracker.close = slowly
    else:
        main.tell_launcher = lambda _: marker.with_name(f"waited {marker.exists()}").touch()


def test_no_rank_leaves_preempted_before_rank_0_has_closed(data, tmp_path):
    """The launcher would end rank 0, with what it has still to send."""
    run = Run(tmp_path / "run", data, "ddp")
    job = run.start(fault=partial(closes_slowly, tmp_path / "closed"))
    assert job.wait(PATIENCE) == [75, 75], job.output()
    assert (tmp_path / "waited True").exists(), job.output()


def test_every_validation_is_saved_where_the_best_is_kept(data, tmp_path):
    words = ("train.keep_best=nll", "train.checkpoint_every_steps=null")
    words += ("train.checkpoint_every_epochs=100", "train.keep_checkpoints=9")
    run = Run(tmp_path / "run", data).finish(*words, ranks=1)
    assert run.saved() == [12, 24, 30]


def test_workers_of_a_dead_launcher_end(data, tmp_path):
    """SIGKILL to `accelerate launch` alone: its ranks save, and are gone within a minute."""
    path = tmp_path / "run"
    words = command("imagenet_csam", *digits("csam", path, data, *TINY, *SAVING))
    words += ["train.max_steps=100000", "train.checkpoint_every_steps=50000"]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    run = Run(path, data)
    deadline = time.monotonic() + 200
    while run.step() < 5:
        assert launcher.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    assert len(workers) >= 2
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    for process in alive:
        process.kill()
    assert not alive, (tmp_path / "log").read_text()
    assert run.state()["phase"] == "preempted"
    assert run.saved() == [run.state()["step"]]
