"""A recipe's ranks without a launcher: to be killed, hung and starved at a chosen moment.

They are forked from the server of tests/support/ranks.py, so that a start costs a second and no
imports.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from flatcal_dist.checkpoints.format import load_progress
from flatcal_dist.tracking.tracker import read_metrics
from flatcal_dist.training.stopping import StopRequest
from tests.support.launching import ROOT, digits
from tests.support.ranks import FORKING, free_port

PATIENCE = 60  # seconds in which every rank must have ended, whatever happened to one of them
TINY = ("model.options.width=128", "train.max_steps=30", "train.log_every_steps=1")
SAVING = ("train.checkpoint_every_steps=4", "train.validate_every_epochs=1")


class Job:
    """The ranks of one start. fault(rank): called in each before anything else."""

    def __init__(
        self, arguments: list[str], log: Path, ranks: int = 2, fault: Callable | None = None
    ) -> None:
        self.log = log
        port = free_port()
        calls = [(rank, ranks, port, arguments, log, fault) for rank in range(ranks)]
        self.ranks = [FORKING.Process(target=_rank, args=call) for call in calls]
        for process in self.ranks:
            process.start()

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.ranks)):
            self.ranks[rank].kill()

    def send(self, number: int, rank: int) -> None:
        os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = 4 * PATIENCE) -> list[int]:
        """Exit codes; the ranks are dead after it. AssertionError if one was alive too long."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        for process in self.ranks:
            process.join()
        assert None not in codes, f"after {seconds} s: {codes}\n{self.output()}"
        return codes

    def until(self, moment: Callable[[], bool]) -> bool:
        """Wait for a moment; whether it came before the ranks ended."""
        while not moment():
            if not all(process.is_alive() for process in self.ranks):
                return False
            time.sleep(0.001)
        return True

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _rank(
    rank: int, ranks: int, port: int, arguments: list[str], log: Path, fault: Callable | None
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    for name in ("TORCHELASTIC_ERROR_FILE", "ACCELERATE_MIXED_PRECISION"):
        os.environ.pop(name, None)
    from flatcal_dist.training.main import main

    sys.argv = ["recipe", *arguments]
    if fault:
        fault(rank)
    main(ROOT / "configs/digits/csam.yaml")


class Run:
    """A run directory of a tiny digits run, and the command for it."""

    def __init__(self, path: Path, data: Path, engine: str = "ddp", *overrides: str) -> None:
        self.path, self.data, self.overrides = path, data, overrides
        self.engine = engine
        self.log = path.with_name(f"{path.name}.log")

    def start(
        self, *more: str, ranks: int = 2, fault: Callable | None = None, engine: str | None = None
    ) -> Job:
        arguments = digits("csam", self.path, self.data, *TINY, *SAVING, *self.overrides)
        arguments += [f"train.engine={engine or self.engine}", *more]
        return Job(arguments, self.log, ranks, fault)

    def finish(self, *more: str, **options) -> "Run":
        job = self.start(*more, **options)
        assert set(job.wait()) == {0}, job.output()
        return self

    def state(self) -> dict:
        return json.loads((self.path / "state.json").read_text())

    def step(self) -> int:
        """The last one logged."""
        try:
            return max((r["step"] for r in read_metrics(self.path / "metrics.jsonl")), default=0)
        except OSError:
            return 0

    def saving(self) -> bool:
        return any((self.path / "checkpoints").glob(".step_*"))

    def saved(self) -> list[int]:
        return [load_progress(p).step for p in sorted(self.path.glob("checkpoints/step_*"))]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def records(self) -> dict[tuple[int, bool], dict]:
        """By step, and whether of a validation: the last one, without times."""
        return {
            (record["step"], "val/nll" in record): {
                key: value for key, value in record.items() if not key.startswith("perf/")
            }
            for record in read_metrics(self.path / "metrics.jsonl")
        }


def same(ours: Run, theirs: Run) -> bool:
    """Bit for bit: final weights and the log."""
    a, b = ours.weights(), theirs.weights()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ours.records() == theirs.records()
    return True


def stop_after_six(rank):
    """Ask for the end after six steps of this start."""
    asked = iter([False] * 5)
    StopRequest.asked = property(lambda self: next(asked, True))


def slow_disk(rank: int) -> None:
    """Every sync takes a while, so that a save is under way most of the time."""
    original = os.fsync

    def slow(descriptor) -> None:
        time.sleep(0.02)
        original(descriptor)

    os.fsync = slow


def kill(run: Run, random: Random, way: int) -> bool:
    """Start, and kill at a random moment; whether that hit a run that was going.

    way, modulo 4: one rank after a random step; all in the middle of a save; one in the middle of
    a save; all after a random step.
    """
    in_save, everyone = way % 4 in (1, 2), way % 4 in (1, 3)
    job = run.start(fault=slow_disk)
    after = run.step() + random.randint(5, 10)
    hit = job.until(lambda: run.step() >= after)
    if in_save:
        hit = job.until(run.saving) and hit
    time.sleep(random.random() * 0.03)
    job.kill(*([] if everyone else [random.randrange(2)]))
    job.wait(PATIENCE)  # those left end by themselves
    return hit
