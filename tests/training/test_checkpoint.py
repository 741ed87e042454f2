"""Checkpoints: whole or absent, verified, and without a way for code to come in."""

import os
import pickle

import pytest
import torch
from torch import nn

from flatcal_dist.sharpness import LookSAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.training import checkpoint
from flatcal_dist.training.checkpoint import Progress
from flatcal_dist.weights import WeightsError, load_weights, save_weights


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator), torch.randint(4, (6,), generator=generator)


def make(seed: int = 0) -> SharpnessAwareStep:
    """A step of LookSAM in fp16's scaling, which keeps every kind of state, after two steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    engine = ReplicatedEngine(network, optimizer, compute_dtype=torch.float16)
    step = SharpnessAwareStep(engine, LookSAM(0.1, every=4))
    for number in range(2):
        step([batch(number)])
    return step


def make_progress(step: int) -> Progress:
    return Progress(step, None, "ddp", world_size=2, sharded=False, seconds=1.5)


def save(path, step: int, seed: int = 0, keep: int = 2):
    return checkpoint.save(path, make(seed), make_progress(step), keep)


def test_a_step_goes_on_bit_for_bit(tmp_path):
    """Weights, buffers, momentum, loss scale and what the rule remembers."""
    ours, theirs = make(1), make(2)
    path = checkpoint.save(tmp_path, ours, make_progress(2), keep=2)
    assert checkpoint.load_progress(path) == make_progress(2)
    checkpoint.load(path, theirs)
    theirs.taken = 2
    for number in range(5):  # across the next sharp step
        assert ours([batch(number)]) == theirs([batch(number)])
    for a, b in zip(
        ours.engine.full_weights().values(), theirs.engine.full_weights().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_newest_whole_one_is_found_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000010"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step_00000010", [])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "state_00000.pt").write_bytes(b"x"),
        lambda path: (path / "state_00000.pt").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: _flip_a_byte(path / "state_00000.pt"),
    ],
)
def test_a_damaged_one_is_passed_over_and_named(tmp_path, damage):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    path, problems = checkpoint.newest(tmp_path)
    assert path == tmp_path / "step_00000001"
    assert len(problems) == 1
    assert "step_00000002" in problems[0]


def _flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_ones_do_not_count_when_old_ones_go(tmp_path):
    """A run goes on from step 1 although 5 is there, damaged: what it saves then is kept."""
    save(tmp_path, 1)
    _flip_a_byte(save(tmp_path, 5) / "state_00000.pt")
    checkpoint.set_aside(tmp_path, checkpoint.newest(tmp_path)[0])
    save(tmp_path, 2, keep=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged_step_00000005", "step_00000002"]


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    (tmp_path / ".step_00000003.tmp").mkdir()
    (tmp_path / ".step_00000003.tmp/state_00000.pt").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(save(tmp_path, 3).parent)[0] == tmp_path / "step_00000003"


@pytest.mark.parametrize("moment", ["state", "progress", "manifest", "rename"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, moment):
    save(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    target = {
        "state": (torch, "save"),
        "progress": (checkpoint, "write_json"),
        "manifest": (checkpoint, "sha256"),
        "rename": (checkpoint, "sync_directory"),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    path, _ = checkpoint.newest(tmp_path)
    assert path == tmp_path / ("step_00000002" if moment == "rename" else "step_00000001")
    save(tmp_path, 2)
    assert checkpoint.newest(tmp_path)[0] == tmp_path / "step_00000002"


class _Attack:
    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (self.witness,)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "was-here"
    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"w": _Attack(str(witness))}))
    with pytest.raises(WeightsError, match=r"weights.pth holds more than tensors|cannot read"):
        load_weights(make().engine.module, tmp_path / "weights.pth")
    assert not witness.exists()


def test_weight_files_of_other_kinds(tmp_path):
    network = make(1).engine.module
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}},
               tmp_path / "ddp.pth")  # fmt: skip
    save_weights(network.state_dict(), tmp_path / "plain.safetensors")
    for name in ("ddp.pth", "plain.safetensors"):
        other = make(2).engine.module
        load_weights(other, tmp_path / name)
        assert torch.equal(other[0].weight, network[0].weight)
    with pytest.raises(WeightsError, match=r"with 0\.weight \[4, 3\] instead of \[9, 3\]"):
        load_weights(nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9)), tmp_path / "ddp.pth")
    torch.save({"0.weight": network[0].weight, "0.bias": network[0].bias}, tmp_path / "part.pt")
    with pytest.raises(WeightsError, match=r"without 1\.weight"):
        load_weights(network, tmp_path / "part.pt")


def test_weights_that_share_a_tensor_are_loaded(tmp_path):
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    save_weights(Tied(1).state_dict(), tmp_path / "tied.safetensors")
    other = Tied(2)
    load_weights(other, tmp_path / "tied.safetensors")
    assert torch.equal(other.a.weight, Tied(1).a.weight)
    assert other.b.weight is other.a.weight
