"""Checkpoints: a directory that appears whole or not at all, verified before it is trusted.

    checkpoints/step_00001800/model.safetensors  optimizer.pt  progress.json  manifest.json

It is written under another name, flushed, and renamed; manifest.json, written last, has size and
SHA-256 of every file. Nothing is unpickled but tensors and plain containers.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from flatcal_dist.files import sync_directory, write_json
from flatcal_dist.weights import load_weights, save_weights, sha256


class CheckpointError(RuntimeError):
    """A checkpoint that is not whole."""


@dataclass(frozen=True)
class Progress:
    """`step` optimizer steps are done. `samples_per_perturbation`: m, in scope rank."""

    step: int
    samples_per_perturbation: int | None
    world_size: int
    seconds: float


def save(
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
) -> Path:
    """Write the checkpoint of this step (one rank does), then drop all but the newest `keep`."""
    target = directory / f"step_{progress.step:08d}"
    if _is_whole(target):
        return target
    beside = directory / f".{target.name}.tmp"
    for leftover in (beside, target):  # of a run that was killed while it saved
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    save_weights(module, beside / "model.safetensors")
    torch.save(optimizer.state_dict(), beside / "optimizer.pt")
    write_json(beside / "progress.json", asdict(progress))
    manifest = {}
    for file in sorted(beside.iterdir()):
        _flush(file)
        manifest[file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    write_json(beside / "manifest.json", manifest)
    beside.rename(target)
    sync_directory(directory)
    for old in sorted(directory.glob("step_*"))[:-keep]:
        shutil.rmtree(old)
    return target


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None; and what is wrong with newer ones, passed over."""
    problems = []
    for path in sorted(directory.glob("step_*"), reverse=True):
        try:
            verify(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def verify(path: Path) -> None:
    """Compare every file with the manifest. Raises CheckpointError naming the first difference."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, recorded in manifest.items():
            file = path / name
            if file.stat().st_size != recorded["size"] or sha256(file) != recorded["sha256"]:
                raise CheckpointError(f"{file} is not what was saved (size or SHA-256 differ)")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not whole: {error}") from None


def load(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill network and optimizer from a verified checkpoint."""
    load_weights(module, path / "model.safetensors")
    state = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state)
    return Progress(**json.loads((path / "progress.json").read_text()))


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
