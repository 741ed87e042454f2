"""Requests to end, the watchdog, and what is said of a run that diverged; in one process."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from torch import nn

from flatcal_dist.config import TrainConfig
from flatcal_dist.ranks.signals import SIGNALS
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.training import watchdog
from flatcal_dist.training.diagnosis import first_not_finite
from flatcal_dist.training.stopping import StopRequest, deadline
from flatcal_dist.training.watchdog import Watchdog
from tests.support.launching import ROOT


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest() as request:
        assert not request.asked
        os.kill(os.getpid(), number)
        assert request.asked
    assert request.reason == number.name
    assert signal.getsignal(number) == before


def test_a_stop_file_has_its_way_once(tmp_path):
    request = StopRequest(tmp_path / "STOP")
    assert not request.asked
    (tmp_path / "STOP").touch()
    request.looked -= 10  # it looks once in a second only
    assert request.asked
    request.heeded()
    assert not (tmp_path / "STOP").exists()


def test_a_directory_that_asks_to_stop_goes_as_well(tmp_path):
    """Else each start would stop again after a step."""
    request = StopRequest(tmp_path / "STOP")
    (tmp_path / "STOP").mkdir()
    assert request.asked
    request.heeded()
    assert not (tmp_path / "STOP").exists()


def test_a_stop_file_that_a_signal_preceded_is_for_the_next_start(tmp_path):
    """The job may requeue itself for the signal; the file is to end it for good."""
    with StopRequest(tmp_path / "STOP") as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "STOP").touch()
        assert request.asked
        request.heeded()
    assert (tmp_path / "STOP").exists()


def test_the_deadline_is_the_earlier_one(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline(TrainConfig(), 1000.0) == (None, None)
    config = TrainConfig(stop_after_minutes=10.0, stop_margin_minutes=2.0)
    assert deadline(config, 1000.0) == (1600.0, None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1500")
    assert deadline(config, 1000.0) == (1380.0, None)
    assert StopRequest(deadline=time.time() - 1).asked
    assert not StopRequest(deadline=time.time() + 100).asked


@pytest.mark.parametrize(
    "text", ["0", "word", "-5", "nan", "inf", "900", "1000", "１５００", "1e999"]
)
def test_what_cannot_be_the_end_of_the_job_is_ignored_and_named(text, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    for config, expected in ((TrainConfig(), None), (TrainConfig(stop_after_minutes=1.0), 1060.0)):
        end, remark = deadline(config, 1000.0)
        assert end == expected
        assert f"SLURM_JOB_END_TIME={text} in the environment" in remark
    monkeypatch.setenv("SLURM_JOB_END_TIME", "99999999999")
    assert deadline(TrainConfig(), 1000.0) == (99999999999.0 - 300, None)


def test_the_watchdog_barks_when_no_step_comes(monkeypatch, capfd):
    """Not while there are beats; then once it has been silent for the limit, with all stacks."""
    monkeypatch.setattr(watchdog, "TICK", 0.01)
    said, barked = [], threading.Event()

    def end(cause):
        said.append(cause)
        barked.set()
        threading.Event().wait()  # as os._exit, it does not return

    dog = Watchdog(end, minutes=1 / 60)
    for _ in range(150):
        time.sleep(0.01)
        dog.beat()
    assert not said
    assert barked.wait(60)
    assert "this rank hangs in wait" in said[0]
    assert "most recent call first" in capfd.readouterr().err


class Explodes(nn.Module):
    """Gives infinity from its n-th call on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def forward(self, x):
        self.calls += 1
        return x * torch.inf if self.calls >= self.at else x


@pytest.mark.parametrize(
    ("at", "where"),
    [
        (1, "the output of 1 (Explodes), in the first pass"),
        (3, "the output of 1 (Explodes), in the second pass, at the perturbed weights"),
    ],
)
def test_the_layer_and_the_pass_where_it_began(at, where):
    network = nn.Sequential(nn.Linear(3, 4), Explodes(at), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    step = SharpnessAwareStep(ReplicatedEngine(network, optimizer), SAM(0.1))
    batches = [(torch.randn(2, 3), torch.tensor([0, 1]))] * 2
    assert first_not_finite(step, 2, lambda: step(batches)) == where


def test_a_gradient_that_overflows_is_named():
    class Steep(nn.Module):
        def forward(self, x):
            return torch.sqrt(x * 0)

    network = nn.Sequential(nn.Linear(3, 4), Steep(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    step = SharpnessAwareStep(ReplicatedEngine(network, optimizer), None)
    found = first_not_finite(step, 1, lambda: step([(torch.randn(2, 3), torch.tensor([0, 1]))]))
    assert found == "the gradient at the output of 0 (Linear), in the pass"


def test_a_rank_that_is_importing_ends_with_its_launcher(tmp_path):
    """Imports take seconds, and what comes after them waits for the launcher: minutes."""
    (tmp_path / "torch.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('there').touch()\ntime.sleep(50)\n"
    )
    words = [sys.executable, str(ROOT / "recipes/imagenet_csam.py")]
    rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run({words})"],
        env=os.environ | rank | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "there").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ranks = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for rank in alive:
        rank.kill()
    assert ranks
    assert not alive
