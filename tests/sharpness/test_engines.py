"""The real recipe on every engine: the same run, resumed, verified, or refused."""

import json
import os
import re
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launching import ROOT, digits, launch
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, far, make_batch, make_network, make_optimizer

ENGINES = ("zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="session")
def data(digits_shards: Path) -> Path:
    return digits_shards


def start(engine: str, run: Path, data: Path, *overrides: str, launcher=None, **how):
    arguments = digits("csam", run, data, f"train.engine={engine}", *overrides)
    return launch("imagenet_csam", *arguments, launcher=f"cpu_{launcher or engine}", **how)


@pytest.fixture(scope="session")
def replicated(data, tmp_path_factory) -> dict[str, torch.Tensor]:
    run = tmp_path_factory.mktemp("ddp") / "run"
    done = start("ddp", run, data, "train.max_steps=24", through_accelerate=True)
    assert done.returncode == 0, done.stdout
    return load_file(run / "model.safetensors")


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "engine",
    ENGINES,
)
def test_the_recipe_gives_the_same_network_on_every_engine(engine, data, replicated, tmp_path):
    """24 steps of CSAM on 2 ranks, stopped and resumed in the middle: DDP's weights.

    The first start is by `accelerate launch` itself.
    """
    first = ("train.checkpoint_every_epochs=1", "train.epochs=2")
    done = start(engine, tmp_path / "run", data, *first, through_accelerate=True)
    assert done.returncode == 0, done.stdout
    last = max((tmp_path / "run/checkpoints").glob("step_*"))
    assert len(list(last.glob("state_*.pt"))) == 2, "each rank its own part"
    (last / "manifest.json").unlink()  # back to the epoch before
    state = json.loads((tmp_path / "run/state.json").read_text())
    (tmp_path / "run/state.json").write_text(json.dumps(state | {"phase": "running"}))
    done = start(engine, tmp_path / "run", data, *first)
    assert done.returncode == 0, done.stdout
    assert "going on after step 12" in done.stdout
    ours = load_file(tmp_path / "run/model.safetensors")
    assert ours.keys() == replicated.keys()
    scale = max(float(w.abs().max()) for w in replicated.values())
    # 24 steps of rounding in another order, on a network of 300,000 weights.
    assert max(float((ours[n] - replicated[n]).abs().max()) for n in ours) < 1e-5 * scale


def test_launcher_and_configuration_must_agree(data, tmp_path):
    done = start("zero2", tmp_path / "run", data, launcher="ddp")
    assert done.returncode != 0
    assert "was asked for ddp, the configuration has train.engine=zero2" in done.stdout
    done = start("zero2", tmp_path / "run", data, launcher="zero3")
    assert "was asked for zero3, the configuration has train.engine=zero2" in done.stdout
    assert not (tmp_path / "run").exists()


def test_a_scope_that_an_engine_cannot_do_is_refused_before_training(data, tmp_path):
    done = start("zero3", tmp_path / "run", data, "sharpness.scope=rank")
    assert done.returncode != 0
    assert "ZeRO-3 cannot do scope 'rank'" in done.stdout
    assert not (tmp_path / "run").exists()


def test_another_number_of_ranks_in_rank_scope_goes_on_when_it_is_allowed_by_name(data, tmp_path):
    """Another number of samples per perturbation is another algorithm."""
    options = ("sharpness.scope=rank", "train.checkpoint_every_epochs=1", "train.epochs=1")
    assert start("ddp", tmp_path / "run", data, *options).returncode == 0
    state = json.loads((tmp_path / "run/state.json").read_text())
    (tmp_path / "run/state.json").write_text(json.dumps(state | {"phase": "running"}))
    options = (*options[:2], "train.epochs=1")
    done = start("ddp", tmp_path / "run", data, *options, processes=1)
    assert done.returncode == 1
    for words in ("(2 ranks), here it would be", "(1 ranks)", "sharpness.allow_other_samples=true"):
        assert words in done.stdout
    assert json.loads((tmp_path / "run/state.json").read_text())["phase"] == "running"
    allowed = "sharpness.allow_other_samples=true"
    done = start("ddp", tmp_path / "run", data, *options, allowed, processes=1)
    assert done.returncode == 0, done.stdout
    assert "going on after step" in done.stdout


@pytest.mark.parametrize("engine", ["zero2", "fsdp2"])
def test_the_verification_holds(engine, tmp_path):
    done = launch(
        "verify_step",
        "--output",
        tmp_path / "out.json",
        f"train.engine={engine}",
        launcher=f"cpu_{engine}",
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", ["ddp", *ENGINES])
@pytest.mark.parametrize("fault", [None, "restore", "norm", "sync", "rng", "batch_norm"])
def test_the_verification_on_every_engine(engine, fault, tmp_path):
    options = ["--fault", fault] if fault else []
    done = launch(
        "verify_step",
        "--output",
        tmp_path / "out.json",
        *options,
        f"train.engine={engine}",
        launcher=f"cpu_{engine}",
    )
    assert (done.returncode == 0) == (fault is None), done.stdout


def loops_in(readme: str) -> list[str]:
    text = (ROOT / readme).read_text()
    return re.findall(r"```python\n(# [^\n]*loop\n.*?)```", text, flags=re.DOTALL)


BLOCKS = loops_in("flatcal_dist/sharpness/README.md")


@pytest.mark.parametrize("number", range(3))
def test_the_loops_of_the_readme(number):
    """The very lines, on the same batches: plain on one process, the others on two."""
    assert len(BLOCKS) == 3
    assert set(loops_in("README.md")) <= set(BLOCKS), "the main one shows the same loops"
    expected = on_ranks(1, _run_block, BLOCKS[0])[0]
    full = on_ranks(1 if number == 0 else 2, _run_block, BLOCKS[number])[0]
    assert far(full, expected) < CLOSE


def _run_block(rank, world_size, block):
    network = make_network()
    batches = [
        tuple(t.tensor_split(world_size)[rank] for t in make_batch(number)) for number in range(4)
    ]
    names = {"model": network, "optimizer": make_optimizer(network), "loader": batches}
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    exec(textwrap.dedent(block), names)
    return names["step"].engine.full_weights()  # whole on rank 0
