"""Checkpoints: a directory that appears whole or not at all, verified before it is trusted.

    checkpoints/step_00001800/state_00000.pt ...  progress.json  manifest.json

Each rank that holds a part of the state writes its own; together they are written under another
name, flushed, and renamed. manifest.json, written last, has size and SHA-256 of every file.
Nothing is unpickled but tensors and plain containers.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flatcal_dist.files import sync_directory, write_json
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.weights import sha256


class CheckpointError(RuntimeError):
    """A checkpoint that is not whole, or that these ranks cannot use."""


@dataclass(frozen=True)
class Progress:
    """`step` optimizer steps are done. `samples_per_perturbation`: m of m-sharpness, or None.

    `engine` and `world_size` wrote it; `sharded`: each rank its own part.
    """

    step: int
    samples_per_perturbation: int | None
    engine: str
    world_size: int
    sharded: bool
    seconds: float


def save(
    directory: Path,
    step: SharpnessAwareStep,
    progress: Progress,
    keep: int,
    rank: int = 0,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> Path:
    """Write the checkpoint of this step, then drop all but the newest `keep`.

    Called by all ranks of a sharded engine; of a replicated one by rank 0, the others only wait.
    """
    target = directory / f"step_{progress.step:08d}"
    beside = directory / f".{target.name}.tmp"
    if rank == 0:
        for leftover in (beside, target):  # of a run that was killed while it saved
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
    wait_for_everyone()
    if rank == 0 or progress.sharded:
        state = {"engine": step.engine.local_state(), "memory": step.memory}
        torch.save(state, beside / f"state_{rank:05d}.pt")
        _flush(beside / f"state_{rank:05d}.pt")
    wait_for_everyone()
    if rank == 0:
        write_json(beside / "progress.json", asdict(progress))
        files = sorted(beside.iterdir())
        manifest = {f.name: {"size": f.stat().st_size, "sha256": sha256(f)} for f in files}
        write_json(beside / "manifest.json", manifest)
        beside.rename(target)
        sync_directory(directory)
        older = [p for p in sorted(directory.glob("step_*")) if p.name <= target.name]
        for old in older[:-keep]:
            shutil.rmtree(old)
    # A rank that left while rank 0 still writes would make the launcher end rank 0 as well.
    wait_for_everyone()
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


def set_aside(directory: Path, newest_whole: Path | None) -> None:
    """Rename the damaged ones after `newest_whole`, so that they never count again."""
    for path in directory.glob("step_*"):
        if newest_whole is None or path.name > newest_whole.name:
            aside = directory / f"damaged_{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


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


def load_progress(path: Path) -> Progress:
    return Progress(**json.loads((path / "progress.json").read_text()))


def load(path: Path, step: SharpnessAwareStep, rank: int = 0) -> None:
    """Fill the engine and the step's memory from a verified checkpoint."""
    number = rank if load_progress(path).sharded else 0
    file = path / f"state_{number:05d}.pt"
    state = torch.load(file, weights_only=True, map_location="cpu")
    step.engine.load_local_state(state["engine"])
    memory = state["memory"]
    device = step.engine.device
    step.memory = memory and {name: tensor.to(device) for name, tensor in memory.items()}


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
