"""Checkpoints: whole or absent, verified, and without a way for code to come in."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import CheckpointError, Progress
from flatcal_dist.checkpoints.resharding import export
from flatcal_dist.checkpoints.saving import Saver
from flatcal_dist.config import Config, to_yaml
from flatcal_dist.networks.weights import WeightsError, load_weights, save_weights
from flatcal_dist.runs.directory import RunError
from flatcal_dist.sharpness import LookSAM, ReplicatedEngine, SharpnessAwareStep


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


def make_progress(step: int, **validation: float) -> Progress:
    return Progress(
        step, None, "ddp", world_size=2, sharded=False, seconds=1.5, validation=validation
    )


def save(path, step: int, of: SharpnessAwareStep | None = None, keep: int = 2, **validation: float):
    saver = Saver(path, keep=keep, keep_best="accuracy", alone=True)
    saver.start(checkpoint.state_of(of or make()), make_progress(step, **validation))
    saver.finish()
    return path / f"step_{step:08d}"


def test_a_step_goes_on_bit_for_bit(tmp_path):
    """Weights, buffers, momentum, loss scale and what the rule remembers."""
    ours, theirs = make(1), make(2)
    path = save(tmp_path, 2, ours)
    assert checkpoint.load_progress(path) == make_progress(2)
    checkpoint.fill(theirs, checkpoint.load_part(path, 0))
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
        lambda path: (path / "manifest.json").write_text("{}"),
        lambda path: _unlist(path / "manifest.json", "state_00000.pt"),
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


def _unlist(manifest, name) -> None:
    listed = json.loads(manifest.read_text())
    del listed[name]
    manifest.write_text(json.dumps(listed))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.ENFILE, errno.EIO])
def test_one_that_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, number):
    """Else a run would go on from an older one, and call the newest damaged for good."""
    save(tmp_path, 3)
    save(tmp_path, 7)
    hash_of = checkpoint.sha256

    def refuse(file: Path) -> str:
        if file.parent.name == "step_00000007":
            raise OSError(number, os.strerror(number), str(file))
        return hash_of(file)

    monkeypatch.setattr(checkpoint, "sha256", refuse)
    if number == errno.EIO:  # the disk has lost it
        assert checkpoint.newest(tmp_path)[0] == tmp_path / "step_00000003"
    else:
        with pytest.raises(RunError, match=r"step_00000007 cannot be read .* Mend its permissions"):
            checkpoint.newest(tmp_path)


def test_a_copy_beside_the_checkpoints_is_left_alone(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / "step_00000001.bak")
    assert checkpoint.newest(tmp_path) == (tmp_path / "step_00000001", [])
    save(tmp_path, 2, keep=1)
    checkpoint.clean(tmp_path, tmp_path / "step_00000002")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001.bak", "step_00000002"]


def _flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damaged_ones_do_not_count_when_old_ones_go(tmp_path):
    """A run goes on from step 1 although 5 is there, damaged: what it saves then is kept."""
    save(tmp_path, 1)
    _flip_a_byte(save(tmp_path, 5) / "state_00000.pt")
    checkpoint.clean(tmp_path, checkpoint.newest(tmp_path)[0])
    save(tmp_path, 2, keep=1)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged_step_00000005", "step_00000002"]


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    (tmp_path / ".step_00000003.tmp").mkdir()
    (tmp_path / ".step_00000003.tmp/state_00000.pt").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == (None, [])
    assert checkpoint.newest(save(tmp_path, 3).parent)[0] == tmp_path / "step_00000003"


def test_the_best_is_kept_beside_the_newest(tmp_path):
    for step, accuracy in enumerate((0.5, 0.7, 0.6, 0.7, 0.6, 0.1), start=1):
        save(tmp_path, step, keep=1, accuracy=accuracy)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000002", "step_00000006"], "of equals the first"


CALLS = ("open", "write", "fsync", "mkdir", "rename", "unlink")  # of os, all that a save makes


def _count_and_fail(monkeypatch, fail_at: int | None, error: BaseException) -> list[str]:
    """Let the call of that number raise; the calls made, by name."""
    calls: list[str] = []

    def wrap(name):
        original = getattr(os, name)

        def call(*arguments, **keywords):
            calls.append(name)
            if len(calls) - 1 == fail_at:
                if name == "write":  # a part of it arrives
                    original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise error
            return original(*arguments, **keywords)

        monkeypatch.setattr(os, name, call)

    for name in CALLS:
        wrap(name)
    return calls


def test_whatever_call_of_a_save_fails_a_checkpoint_loads(tmp_path, monkeypatch):
    """Each open, write, sync and rename in turn; then the save is tried again, and succeeds."""
    step = make(1)
    with monkeypatch.context() as patch:
        calls = _count_and_fail(patch, None, OSError())
        save(tmp_path, 2, step)
    assert set(calls) == set(CALLS)
    assert calls.count("fsync") == 6, "state, its record, progress, manifest, two directories"
    rename = calls.index("rename")
    for number, name in enumerate(calls):
        directory = tmp_path / str(number)
        directory.mkdir()
        save(directory, 1, step)
        with monkeypatch.context() as patch:
            _count_and_fail(patch, number, OSError(28, "No space left on device"))
            with pytest.raises(CheckpointError, match=r"of step 2 could not .* No space left"):
                save(directory, 2, step)
        path, problems = checkpoint.newest(directory)
        expected = 1 if number <= rename else 2
        assert path == directory / f"step_{expected:08d}", name
        assert not problems, name
        checkpoint.fill(make(2), checkpoint.load_part(path, 0))
        save(directory, 3, step)
        checkpoint.clean(directory, directory / "step_00000003")
        assert checkpoint.newest(directory) == (directory / "step_00000003", [])
        assert not list(directory.glob(".*")), "nothing half written stays"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is saved is the state at the start, whatever later steps do to it."""
    step, gate = make(1), threading.Event()
    before = {name: w.clone() for name, w in step.engine.full_weights().items()}
    saver = Saver(tmp_path, alone=True)
    original = checkpoint.write_part
    monkeypatch.setattr(checkpoint, "write_part", lambda *a: (gate.wait(30), original(*a)))
    saver.start(checkpoint.state_of(step), make_progress(2))
    assert saver.votes == (0.0, 0.0)
    saver.agreed(saver.votes)
    for number in range(3):
        step([batch(number)])
    assert checkpoint.newest(tmp_path) == (None, [])
    gate.set()
    saver.finish()
    other = make(2)
    checkpoint.fill(other, checkpoint.load_part(checkpoint.newest(tmp_path)[0], 0))
    after = other.engine.full_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["0.weight"], step.engine.full_weights()["0.weight"])


def test_an_error_in_the_background_is_a_vote_and_raised_at_the_next_step(tmp_path):
    saver = Saver(tmp_path / "gone", alone=True)
    saver.start(checkpoint.state_of(make()), make_progress(2))
    saver.save.join()
    assert saver.votes == (0.0, 1.0)
    with pytest.raises(CheckpointError, match=r"step 2 could not be written .*gone"):
        saver.agreed(saver.votes)


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


def test_an_export_is_what_timm_loads(tmp_path):
    run = tmp_path / "run"
    config = Config(
        data={"image_size": 32},
        model={"name": "test_resnet", "num_classes": 5},
        run={"dir": str(run)},
    )
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    network = timm.create_model("test_resnet", num_classes=5)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    step = SharpnessAwareStep(ReplicatedEngine(network, optimizer), None)
    for number in (3, 4):
        save(run / "checkpoints", number, step)
        with torch.no_grad():
            next(network.parameters()).mul_(2)
    export(run, tmp_path / "newest.safetensors")
    export(run, tmp_path / "third.safetensors", step=3)
    for name, factor in (("newest", 2), ("third", 4)):
        file = tmp_path / f"{name}.safetensors"
        loaded = timm.create_model("test_resnet", num_classes=5, checkpoint_path=file)
        ours, theirs = dict(network.named_parameters()), dict(loaded.named_parameters())
        key = next(iter(ours))
        assert torch.equal(theirs.pop(key) * factor, ours.pop(key))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(CheckpointError, match=r"step_00000007 is not there; .* 3, 4"):
        export(run, tmp_path / "none.safetensors", step=7)
    with pytest.raises(ValueError, match=r"name it \.safetensors"):  # timm would unpickle it
        export(run, tmp_path / "weights.pth")


def test_a_checkpoint_of_another_version_is_refused_and_not_passed_over(tmp_path):
    path = save(tmp_path, 2)
    file, manifest = path / "progress.json", path / "manifest.json"
    file.write_text(file.read_text().replace('"step"', '"steps"'))
    with pytest.raises(CheckpointError, match=r"progress\.json is not what was saved"):
        checkpoint.verify(path)
    listed = json.loads(manifest.read_text())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    listed["progress.json"] = {"size": file.stat().st_size, "sha256": digest}
    manifest.write_text(json.dumps(listed))
    with pytest.raises(RunError, match=r"progress\.json is not as this version writes it"):
        checkpoint.newest(tmp_path)
