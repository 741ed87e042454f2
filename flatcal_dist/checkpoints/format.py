"""Checkpoints: each is a directory that appears whole or not at all, and is verified before use.

    checkpoints/step_00001800/state_00000.pt ...  progress.json  manifest.json

Each rank that holds a part of the state writes this part into a directory of another name. When all
parts are durable, rank 0 adds manifest.json, with size and SHA-256 of every file, and renames the
directory. Only tensors and plain containers are unpickled. torch.distributed.checkpoint unpickles
its .metadata and DeepSpeed its states, so neither is used.
"""

import errno
import json
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, cast

import torch
from pydantic import ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from flatcal_dist.averaging.average import Average
from flatcal_dist.checkpoints.hashed_files import HashedFile, write_hashed, write_json_hashed
from flatcal_dist.files import read_bytes, read_json, sync_directory
from flatcal_dist.networks.weights import sha256
from flatcal_dist.runs.directory import RunError, in_words
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.sharpness.passes.learning import load_state

NAME = re.compile(r"step_([0-9]{8,18})")
# Errors that say nothing about what lies on the disk. They may be gone at the next try.
PASSING = (
    errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN,
)  # fmt: skip
BEST = {
    "accuracy": 1,
    "nll": -1,
    "refined_nll": -1,
}  # the sign that makes a larger value the better one


class CheckpointError(RuntimeError):
    """A checkpoint that is not whole, or that these ranks cannot use."""


@dataclass(frozen=True)
class Progress:
    """What a checkpoint is of.

    Attributes:
        step: How many optimizer steps are done.
        samples_per_perturbation: The m of m-sharpness; None without a perturbation.
        engine: The engine that wrote it.
        world_size: The number of ranks that wrote it.
        sharded: Whether each rank wrote a part; else rank 0 wrote all.
        seconds: The time of training, over all starts.
        skipped: How many of the steps changed nothing.
        validation: Figures of the weights at this step, if they were validated, such as
            {"accuracy": 0.76, "nll": 0.98}.
        wandb_id: The id of the W&B run.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step: NonNegativeInt
    samples_per_perturbation: int | None
    engine: str
    world_size: PositiveInt
    sharded: bool
    seconds: float
    skipped: NonNegativeInt = 0
    validation: dict[str, float] = field(default_factory=dict)
    wandb_id: str | None = None

    @property
    def parts(self) -> int:
        return self.world_size if self.sharded else 1


PROGRESS = TypeAdapter(Progress)


def state_of(step: SharpnessAwareStep, average: Average | None = None) -> dict[str, Any]:
    """Return all that this rank needs to continue. It has to be copied before the next step.

    An average has to be settled before. Called by all ranks, which sum up what an objective keeps.
    """
    objective = step.objective_state()  # whole, and the same on every rank
    return {
        "engine": step.engine.local_state(),
        "arrangement": step.engine.arrangement(),
        "memory": step.memory,
        "average": average.weights if average else None,
        "average_statistics": average.statistics if average else None,  # the same on every rank
        "average_count": average.count if average else 0,
    } | ({} if objective is None else {"objective": objective})


def write_part(beside: Path, rank: int, state: dict[str, Any]) -> None:
    """Write the part of a rank durably into an unfinished checkpoint.

    Args:
        beside: The directory of the unfinished checkpoint.
        rank: The rank.
        state: What `state_of` returned on this rank.
    """
    beside.mkdir(exist_ok=True)

    def save(file: HashedFile) -> None:
        torch.save(state, cast(IO[bytes], file))  # which calls only `write` and `flush`

    written = write_hashed(beside / f"state_{rank:05d}.pt", save)
    write_json_hashed(beside / f"state_{rank:05d}.json", written)


def publish(beside: Path, progress: Progress, keep: int, keep_best: str | None = None) -> Path:
    """Let a checkpoint appear whose parts are all written, and delete old ones. One rank does so.

    Args:
        beside: The unfinished checkpoint.
        progress: What it is of.
        keep: How many of the newest checkpoints are kept.
        keep_best: The key of `Progress.validation` by which the best checkpoint is kept, too.

    Raises:
        CheckpointError: A part is not there.
    """
    directory = beside.parent
    target = directory / f"step_{progress.step:08d}"
    manifest: dict[str, dict[str, Any]] = {}
    for rank in range(progress.parts):
        record = beside / f"state_{rank:05d}.json"
        if not record.exists():
            raise CheckpointError(
                f"{beside / f'state_{rank:05d}.pt'}, of rank {rank}, is not there: run.dir must be "
                "on a file system that all ranks share"
            )
        manifest[f"state_{rank:05d}.pt"] = json.loads(record.read_text())
        record.unlink()
    manifest["progress.json"] = write_json_hashed(beside / "progress.json", asdict(progress))
    write_json_hashed(beside / "manifest.json", manifest)
    sync_directory(beside)
    beside.rename(target)
    sync_directory(directory)
    _drop_old(directory, progress.step, keep, keep_best)
    return target


def _drop_old(directory: Path, step: int, keep: int, keep_best: str | None) -> None:
    paths = [path for number, path in found(directory).items() if number <= step]
    scores = {p: score for p in paths if (score := _score(p, keep_best)) is not None}
    best = max(scores, key=lambda path: scores[path], default=None)
    for path in paths[:-keep]:
        if path != best:
            # If it cannot be removed now, the next save tries again.
            shutil.rmtree(path, ignore_errors=True)


def _score(path: Path, keep_best: str | None) -> float | None:
    """Return a figure (a larger one is better), or None for a checkpoint without it."""
    if keep_best is None:
        return None
    try:
        value = load_progress(path).validation.get(keep_best)
    except (OSError, RunError, CheckpointError):
        return None
    return None if value is None else BEST[keep_best] * value


def found(directory: Path) -> dict[int, Path]:
    """Return the checkpoints in `directory` by step, oldest first.

    Directories with other names, such as copies made by a user, are ignored.
    """
    numbers = {path: NAME.fullmatch(path.name) for path in directory.glob("step_*")}
    return dict(sorted((int(number[1]), path) for path, number in numbers.items() if number))


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, or None, and what is wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(found(directory).values()):
        try:
            verify(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def clean(directory: Path, newest_whole: Path | None) -> None:
    """Remove what killed saves left, and rename damaged checkpoints after `newest_whole`."""
    for leftover in directory.glob(".step_*"):
        _remove(leftover)
    there = found(directory)
    whole = next((number for number, path in there.items() if path == newest_whole), -1)
    for number, path in there.items():
        if number > whole:
            aside = directory / f"damaged_{path.name}"
            _remove(aside)
            path.rename(aside)


def _remove(path: Path) -> None:
    """Remove a directory with its contents, or a file or link, but not what a link points to.

    What cannot be removed stays.
    """
    if path.is_symlink() or not path.is_dir():
        with suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> None:
    """Check that a checkpoint is what was saved, and can be loaded.

    Every file is compared with the manifest. Then it must load, hold no weight that is NaN, and
    hold nothing but what a save writes, which SHA-256 cannot tell.

    Raises:
        CheckpointError: It is damaged; the message names the first difference.
        RunError: It is whole but of another version, or cannot be read now. Then it must not be
            passed over as damaged.
    """
    try:
        manifest = read_json(path / "manifest.json")
        if "progress.json" not in manifest:
            raise CheckpointError(f"{path / 'manifest.json'} lists no progress.json")
        for name, recorded in manifest.items():
            file = path / name
            if not re.fullmatch(r"progress\.json|state_[0-9]{5}\.pt", name):
                raise CheckpointError(
                    f"{path / 'manifest.json'} lists {name!r}, which no save writes"
                )
            if not file.is_file():  # a pipe or device could be read for ever
                raise CheckpointError(f"{file} is no file")
            if file.stat().st_size != recorded["size"] or sha256(file) != recorded["sha256"]:
                raise CheckpointError(f"{file} is not what was saved (size or SHA-256 differ)")
        progress = load_progress(path)
        if NAME.fullmatch(path.name) and path.name != f"step_{progress.step:08d}":
            raise CheckpointError(f"{path} holds the state of step {progress.step}")
        for rank in range(progress.parts):
            if (name := f"state_{rank:05d}.pt") not in manifest:
                raise CheckpointError(f"{path / 'manifest.json'} lists no {name}")
            _refuse_nan(load_part(path, rank, mmap=True), path / name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise RunError(
                f"{path} cannot be read ({error}): it may be whole, so no older one is used. Mend "
                "its permissions or the file system, and give the same command again; or move it "
                "away, to go on from the one before"
            ) from None
        raise CheckpointError(f"{path} is not whole: {error}") from None


def _refuse_nan(state: dict[str, Any], file: Path) -> None:
    """Raise CheckpointError for trained weights that are NaN, which no step makes."""
    engine, pieces = state["engine"], state["arrangement"]["pieces"]
    flat = engine.get("masters")  # ZeRO has these; a rank may hold none of them
    for weight in [engine["weights"][name] for name in pieces] if flat is None else flat:
        if torch.isnan(weight).any():
            raise CheckpointError(f"{file} holds weights that are NaN")


def load_progress(path: Path) -> Progress:
    """Return the progress of a verified checkpoint.

    Raises:
        RunError: Another version wrote it.
        CheckpointError: No version writes such a file.
    """
    file = path / "progress.json"
    try:
        return PROGRESS.validate_json(read_bytes(file))
    except ValidationError as error:
        kinds = {one["type"] for one in error.errors()}
        if not kinds <= {"missing", "unexpected_keyword_argument", "extra_forbidden"}:
            raise CheckpointError(f"{file} is damaged: {in_words(error)}") from None
        raise RunError(
            f"{file} is not as this version writes it ({in_words(error)}): go on with the "
            "version that environment.json names, or begin another run"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None


def load_part(path: Path, rank: int, mmap: bool = False) -> dict[str, Any]:
    """Return what `state_of` gave on a rank, with tensors on the CPU.

    Args:
        path: The checkpoint.
        rank: The rank.
        mmap: Whether tensors are read only when they are used.

    Raises:
        CheckpointError: The file holds something else.
    """
    file = path / f"state_{rank:05d}.pt"
    try:
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
    except OSError:
        raise
    except Exception:  # torch's message would advise to run what the file holds
        raise CheckpointError(
            f"{file} cannot be loaded: it holds more than tensors and plain containers, or is "
            "damaged"
        ) from None
    if not isinstance(state, dict) or not {"engine", "arrangement"} <= state.keys():
        raise CheckpointError(f"{file} is not the state of a rank")
    return state


def fill(step: SharpnessAwareStep, state: dict[str, Any], average: Average | None = None) -> None:
    """Fill the engine, the memory of the step and the average with what `load_part` returned.

    `fill_objective` does so for the objective. The engine and the number of ranks must be those
    that wrote the checkpoint; `resharding.load` is for others.

    Args:
        step: The step to fill.
        state: What `load_part` returned.
        average: The average to fill, if there is one.
    """
    step.engine.load_local_state(state["engine"])
    memory = state["memory"]
    device = step.engine.device
    step.memory = memory and {name: tensor.to(device) for name, tensor in memory.items()}
    if average:
        average.load(
            state["average"], state.get("average_statistics"), state.get("average_count", 1)
        )


def fill_objective(
    step: SharpnessAwareStep, state: dict[str, torch.Tensor] | None, path: Path
) -> None:
    """Let the objective of the step continue from what a checkpoint holds for it.

    Args:
        step: The step, with its objective.
        state: What the checkpoint holds for the objective, or None.
        path: The checkpoint, for the message.

    Raises:
        CheckpointError: The objective keeps a history, and `state` is of another objective.
    """
    try:
        load_state(step.loss, state)
    except ValueError as error:
        raise CheckpointError(
            f"training cannot go on from {path}: {error}. Go on with the objective and the data "
            "that it was trained with, or begin another run"
        ) from None
