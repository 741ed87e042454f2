"""Many nodes without SLURM: one launcher on each "node" of this machine, as the README says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatcal_dist.data import prepare_digits
from tests.support.launching import ROOT, TIMEOUT, digits
from tests.support.ranks import free_port

RECIPE = str(ROOT / "recipes/imagenet_csam.py")


def accelerate(node: int, port: int) -> list[str]:
    config = str(ROOT / "configs/accelerate/cluster_ddp.yaml")
    return [
        "accelerate.commands.launch", "--config_file", config, "--num_machines", "2",
        "--num_processes", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port),
    ]  # fmt: skip


def torchrun(node: int, port: int) -> list[str]:
    return [
        "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank",
        str(node), "--master_addr", "127.0.0.1", "--master_port", str(port),
    ]  # fmt: skip


@pytest.mark.exhaustive  # from day to day tests/slurm start two nodes
@pytest.mark.parametrize("launcher", [torchrun, accelerate])
def test_two_launchers_are_one_run(launcher, tmp_path):
    data, run, port = prepare_digits(tmp_path / "digits"), tmp_path / "run", free_port()
    words = [RECIPE, *digits("csam", run, data, "train.max_steps=2", "run.world_size=2")]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", *launcher(node, port), *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        printed = [node.communicate(timeout=TIMEOUT)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    assert json.loads((run / "state.json").read_text())["phase"] == "finished"
    assert Path(run / "model.safetensors").exists()
