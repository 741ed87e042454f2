"""What the environment says of this process: alone, a rank, or a variable that misleads."""

import os
import signal
import subprocess
import sys

import pytest

from flatcal_dist.ranks.distributed import start
from flatcal_dist.ranks.launcher import Launch, LaunchError, launch_of, preempted_code, settle
from tests.support.launching import ROOT
from tests.support.ranks import free_port

RANK = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500",
}  # fmt: skip
SALLOC = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
ALONE = Launch()

TABLE = [
    # left over or harmless: one process
    ({}, ALONE),
    ({"MASTER_PORT": "29500"}, ALONE),
    ({"MASTER_PORT": "abc", "MASTER_ADDR": "old"}, ALONE),
    ({"LOCAL_RANK": "0"}, ALONE),
    ({"LOCAL_RANK": "5"}, ALONE),
    ({"LOCAL_RANK": "-1"}, ALONE),
    ({"RANK": "3"}, ALONE),
    ({"WORLD_SIZE": ""}, ALONE),
    ({"WORLD_SIZE": " "}, ALONE),
    ({"WORLD_SIZE": "1"}, ALONE),
    ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}, ALONE),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "gone", "MASTER_PORT": "1"}, ALONE),
    ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, ALONE),
    ({"PMI_SIZE": "x"}, ALONE),
    (SALLOC, ALONE),
    (SALLOC | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ALONE),  # the script of a batch job
    (SALLOC | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ALONE),  # an interactive step
    # ranks
    (RANK, Launch(1, 4, True)),
    (RANK | {"RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Launch(0, 4, True)),
    (RANK | SALLOC | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, Launch(1, 4, True)),
    ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "a"}, Launch(watched=True)),
    # misleading: the variable is named
    ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 says that 8 processes were started, but RANK is not set"),
    ({"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "RANK is not set"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc in the environment is not a whole number"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
    ({"WORLD_SIZE": "２"}, "WORLD_SIZE=２"),
    ({"RANK": "abc"}, "`unset RANK` if it is left over"),
    (RANK | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    (RANK | {"LOCAL_RANK": ""}, "LOCAL_RANK="),
    (RANK | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    (RANK | {"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE=two"),
    (RANK | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 says"),
    ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE=2 says"),
    ({"MV2_COMM_WORLD_SIZE": "3"}, "MV2_COMM_WORLD_SIZE=3 says"),
    (SALLOC | {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8 says"),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "expected"), TABLE, ids=str)
def test_one_process_a_rank_or_the_variable_that_misleads(environment, expected):
    if isinstance(expected, Launch):
        assert launch_of(environment) == expected
    else:
        with pytest.raises(LaunchError) as error:
            launch_of(environment)
        assert expected in str(error.value)


def test_ranks_keep_their_variables():
    environment = RANK | {"OMPI_COMM_WORLD_RANK": "7"}
    settle(environment, launch_of(environment))
    assert environment == RANK


def test_the_exit_code_of_a_preempted_run(monkeypatch):
    monkeypatch.delenv("FLATCAL_EXIT_PREEMPTED", raising=False)
    assert preempted_code() == 75
    for text, code in (("0", 0), ("", 75), ("3", 3)):
        monkeypatch.setenv("FLATCAL_EXIT_PREEMPTED", text)
        assert preempted_code() == code
    for text in ("abc", "256", "-1", "1.5"):
        monkeypatch.setenv("FLATCAL_EXIT_PREEMPTED", text)
        with pytest.raises(LaunchError, match=f"FLATCAL_EXIT_PREEMPTED={text} in the environment"):
            start("ddp", "fp32")


def test_a_left_over_rank_does_not_tie_a_run_to_the_shell():
    """Nor does it silence an error: somebody has to say it."""
    code = "from flatcal_dist.ranks.launcher import end_with_the_launcher as e;"
    code += "from flatcal_dist.ranks.launcher import rank_to_speak as r; e();"
    code += "import ctypes; n = ctypes.c_int(); ctypes.CDLL(None).prctl(2, ctypes.byref(n));"
    code += "print(n.value, r())"

    def told(**environment: str) -> str:
        words = [sys.executable, "-c", code]
        variables = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        return subprocess.run(words, env=variables, capture_output=True, text=True).stdout.strip()

    assert told(RANK="3") == "0 0"
    assert told(RANK="3", WORLD_SIZE="abc") == "0 0"
    assert told(**RANK) == f"{int(signal.SIGTERM)} 1"


def test_a_variable_that_accelerate_cannot_read_is_named():
    """And not the other ranks, which are not to blame."""
    code = "from flatcal_dist.ranks.distributed import start, LaunchError as E\n"
    code += "try: start('ddp', 'fp32')\nexcept E as error: print(error)"
    variables = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "4,2"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables | rendezvous,
    )  # fmt: skip
    assert done.stdout.startswith("Accelerate does not start: ")
    assert done.stdout.endswith("OMP_NUM_THREADS: mend it, or `unset OMP_NUM_THREADS`\n")
    assert "RANK" not in done.stdout
