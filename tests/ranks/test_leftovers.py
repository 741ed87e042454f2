"""A process starts alone beside variables of an earlier launch, or names what misleads."""

import os

import pytest
from accelerate.state import AcceleratorState, PartialState

from flatcal_dist.ranks.distributed import LaunchError, start

SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_NPROCS": "8"}

LEFTOVERS = [
    {"MASTER_PORT": "29500"},
    {"LOCAL_RANK": "5"},
    {"WORLD_SIZE": ""},
    {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "192.0.2.1",
     "MASTER_PORT": "29500"},
    {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "x"},
    SALLOC,
]  # fmt: skip


@pytest.mark.parametrize("environment", LEFTOVERS, ids=str)
def test_after_settling_the_libraries_see_one_process(environment, monkeypatch):
    """Accelerate reads the same variables by rules of its own."""
    monkeypatch.setattr(os, "environ", os.environ.copy() | environment)
    AcceleratorState._reset_state(True)
    try:
        accelerator = start("ddp", "fp32")
        assert accelerator.num_processes == 1
        assert PartialState().distributed_type == "NO"
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2"),
        (SALLOC | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8"),
        ({"RANK": "9", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, "RANK=9"),
        ({"FLATCAL_EXIT_PREEMPTED": "abc"}, "FLATCAL_EXIT_PREEMPTED=abc"),
        ({"ACCELERATE_TORCH_DEVICE": "word"}, "ACCELERATE_TORCH_DEVICE"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION"),
    ],
    ids=str,
)
def test_the_variable_that_misleads_is_named(environment, named, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy() | environment)
    AcceleratorState._reset_state(True)
    try:
        with pytest.raises(LaunchError) as error:
            start("ddp", "fp32")
        assert named in str(error.value)
    finally:
        AcceleratorState._reset_state(True)
