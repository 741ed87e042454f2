"""launch/submit.py on a real cluster: two nodes with two ranks each, daemons and all."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.cluster import cluster, install, missing, query, until
from tests.support.launching import ROOT, digits

SECONDS = 600  # for a job; a busy machine takes several times as long as an idle one
STEPS = 120
# So wide that a signal comes long before the last step.
SLOW = ("model.options={width: 2048, depth: 2}",)
pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    if missing():
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("only root can install SLURM: apt-get install slurm-wlm munge")
        if problem := install():
            pytest.skip(f"slurm-wlm and munge cannot be installed: {problem}")
    with cluster() as environment:
        yield environment


@pytest.fixture(scope="module")
def data(digits_shards: Path) -> Path:
    return digits_shards


def submit(slurm: dict[str, str], *words: str, ranks: str = "2") -> list[str]:
    """The numbers of the jobs, in the order of their submission."""
    command = [
        sys.executable, str(ROOT / "launch/submit.py"), "--cpu", "--nodes", "2",
        "--ranks-per-node", ranks, "--cpus-per-rank", "1", "--time", "30", *words,
    ]  # fmt: skip
    done = subprocess.run(command, env=slurm, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line.split()[1][:-1] for line in done.stdout.splitlines() if line.startswith("job ")]


def training(run: Path, data: Path, *overrides: str) -> list[str]:
    steps = (f"train.max_steps={STEPS}", "train.log_every_steps=5")
    return digits("csam", run, data, *steps, *SLOW, *overrides)


def job_state(slurm: dict[str, str], job: str) -> str:
    lines = query(slurm, "scontrol", "show", "job", job).split()
    return next((word[9:] for word in lines if word.startswith("JobState=")), "gone")


def wait_for(slurm: dict[str, str], job: str, *states: str) -> None:
    ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}

    def there() -> bool:
        state = job_state(slurm, job)
        assert state in states or state not in ends, (state, logs(slurm, job))
        return state in states

    try:
        until(there, SECONDS, f"job {job} was not {' or '.join(states).lower()}")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{logs(slurm, job)}") from None


def logs(slurm: dict[str, str], job: str) -> str:
    lines = query(slurm, "scontrol", "show", "job", job).split()
    files = [Path(word[7:]) for word in lines if word.startswith("StdOut=")]
    return "\n".join(file.read_text() for file in files if file.exists())


def state(run: Path) -> dict:
    file = run / "state.json"
    return json.loads(file.read_text()) if file.exists() else {"step": 0}


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(run / "model.safetensors") for run in (one, other))
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_job_that_is_asked_to_stop_requeues_itself_and_ends_as_if_it_had_not(
    slurm, data, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    job, evaluation, comparison = submit(
        slurm, *training(broken, data), "--evaluate", "--compare", str(whole), ranks="1"
    )
    until(lambda: state(broken)["step"] > 0, SECONDS, "no first record")
    query(slurm, "scancel", "--batch", "--signal=USR1", job)  # as before the limit: --signal=B:USR1
    wait_for(slurm, job, "PENDING")
    stopped = state(broken)
    assert stopped["phase"] == "preempted"
    assert 0 < stopped["step"] < STEPS
    assert (broken / f"checkpoints/step_{stopped['step']:08d}").exists()
    assert job_state(slurm, evaluation) == "PENDING"

    (reference,) = submit(slurm, "--launcher", "torchrun", *training(whole, data), ranks="1")
    wait_for(slurm, reference, "COMPLETED")
    query(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now")  # not two minutes later
    wait_for(slurm, job, "COMPLETED")
    finished = state(broken)
    assert (finished["phase"], finished["step"], finished["restarts"]) == ("finished", STEPS, 1)
    assert state(whole)["restarts"] == 0
    assert same_weights(whole, broken)
    assert f"going on after step {stopped['step']}" in logs(slurm, job)  # one log, appended to

    wait_for(slurm, evaluation, "COMPLETED")
    assert "ece" in json.loads((broken / "report/metrics.json").read_text())
    query(slurm, "scancel", comparison)
    environment = json.loads((broken / "environment.json").read_text())
    assert environment["world_size"] == 2, "one rank on each of two nodes"
    assert environment["slurm"]["SLURM_JOB_NODELIST"] == "n[1-2]"


@pytest.mark.exhaustive
def test_every_launcher_trains_the_same_network(slurm, data, tmp_path):
    launchers = ("srun", "accelerate", "torchrun", "deepspeed")
    steps = ("train.max_steps=20", "evaluate.at_end=false")
    for launcher in launchers:
        (job,) = submit(slurm, "--launcher", launcher, *training(tmp_path / launcher, data, *steps))
        wait_for(slurm, job, "COMPLETED")
    assert all(same_weights(tmp_path / "srun", tmp_path / other) for other in launchers)


RANKS = """export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=4 LOCAL_WORLD_SIZE=2
export MASTER_ADDR=127.0.0.1 MASTER_PORT=29501
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("before", "key", "told"),
    [
        pytest.param(
            RANKS, "sharpness.roh=1", "sharpness.roh: no such key", marks=pytest.mark.exhaustive
        ),
        (RANKS, "$([ $RANK = 3 ] && echo sharpness.roh=1 || echo run.seed=1)",
         "error on rank 3: sharpness.roh: no such key"),
        pytest.param(
            "", "run.seed=1", "SLURM_STEP_NUM_TASKS=4 says that this process is one of 4",
            marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_srun_ends_with_the_reason(slurm, tmp_path, before, key, told):
    recipe, config = ROOT / "recipes/imagenet_sam.py", ROOT / "configs/digits/sam.yaml"
    code = f"{before}exec {sys.executable} {recipe} --config {config} run.dir={tmp_path}/run {key}"
    words = ["srun", "--nodes=2", "--ntasks=4", "--kill-on-bad-exit=1", "bash", "-c", code]
    done = subprocess.run(
        words, env=slurm | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode
    assert told in "\n".join(done.stdout.splitlines()[-10:]), done.stdout
