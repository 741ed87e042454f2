"""Training waits only until its state is copied; a thread writes the copy.

No thread talks to other ranks. The reduction that ends each step tells all ranks whether every part
is durable, or that one could not be written. They agree at the latest before the next save.
"""

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import CheckpointError, Progress
from flatcal_dist.ranks.distributed import on_all_ranks, said_by_rank_0


@dataclass
class Save:
    """A save in flight.

    Attributes:
        progress: What is saved; the same on all ranks.
        beside: The directory that becomes the checkpoint.
        written: Whether the last work of this rank is done.
        publishing: Whether all parts are known to be durable.
        error: What kept this rank from writing.
        thread: The thread that writes, on ranks that have something to write.
    """

    progress: Progress
    beside: Path
    written: bool = False
    publishing: bool = False
    error: BaseException | None = None
    thread: threading.Thread | None = None

    def in_background(self, work: Callable[[], Any]) -> None:
        """Do some work in a thread, and record how it ends."""

        def run() -> None:
            try:
                work()
                self.written = True
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self.thread.start()

    def join(self) -> None:
        """Wait for the thread."""
        if self.thread is not None:
            self.thread.join()

    def raise_error(self) -> None:
        """Raise CheckpointError if the work failed."""
        if self.error is not None:
            raise CheckpointError(
                f"the checkpoint of step {self.progress.step} could not be written "
                f"({type(self.error).__name__}: {self.error}); the one before it stays. Make room "
                "or mend the file system; the same command goes on from there"
            ) from self.error


class Saver:
    """Writes one checkpoint at a time. Every rank has a saver.

    Args:
        directory: An existing directory that all ranks share.
        rank: The rank of this process.
        ranks: The number of ranks.
        keep: How many of the newest checkpoints are kept.
        keep_best: The key of `Progress.validation` by which the best checkpoint is kept, too.
        alone: Whether no other rank runs, so that no process group is needed.
    """

    def __init__(
        self,
        directory: Path,
        rank: int = 0,
        ranks: int = 1,
        keep: int = 2,
        keep_best: str | None = None,
        alone: bool = False,
    ) -> None:
        self.directory, self.rank, self.ranks = directory, rank, ranks
        self.keep, self.keep_best = keep, keep_best
        self.together: Callable = (lambda work: work()) if alone else on_all_ranks
        # It names this start of the run: what an earlier one left half written is never used.
        token = secrets.token_hex(4)
        self.token = token if alone else said_by_rank_0(token)
        self.staging = Staging()
        self.save: Save | None = None

    def start(self, state: dict[str, Any], progress: Progress) -> None:
        """Copy `state`, and write it in the background. The save before this one ends first.

        A rank that has no part of the checkpoint ignores its state. Called by all ranks. Raises
        what `finish` raises.
        """
        self.finish()
        beside = self.directory / f".step_{progress.step:08d}.{self.token}"
        save = self.save = Save(progress, beside)
        if self.rank < progress.parts:
            copy = self.staging.copy(state)
            save.in_background(lambda: checkpoint.write_part(beside, self.rank, copy))
        else:
            save.written = True

    @property
    def votes(self) -> tuple[float, float]:
        """Whether the part of this rank is durable, and whether it failed. A step sums them."""
        if self.save is None:
            return 0.0, 0.0
        return float(self.save.written), float(self.save.error is not None)

    def agreed(self, votes: tuple[float, float]) -> None:
        """Publish the checkpoint if all parts are durable. Raises on all ranks if one failed.

        `votes` holds the sums over all ranks.
        """
        written, failed = votes
        if failed:
            self.finish()
        elif self.save is not None and written == self.ranks:
            self._publish(self.save)

    def finish(self) -> None:
        """Wait until the save in flight, if any, is a checkpoint. Called by all ranks.

        Raises on all ranks, with the cause, if it could not be written. The one before it stays.
        """
        if self.save is None:
            return
        save = self.save
        try:
            save.join()
            self.together(save.raise_error)
            self._publish(save)
            save.join()
            self.together(save.raise_error)
        finally:
            self.save = None

    def _publish(self, save: Save) -> None:
        if save.publishing:
            return
        save.publishing = True
        if self.rank == 0:
            save.join()
            save.in_background(
                lambda: checkpoint.publish(save.beside, save.progress, self.keep, self.keep_best)
            )


class Staging:
    """Host memory that state is copied to. It is kept, because fresh memory is slow."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}
        self.pinned = False  # whether `copy_` returns before its copy is done

    def copy(self, state: Any) -> Any:
        """Return the same nest of dicts and lists, with copies of its tensors on the CPU."""
        with torch.no_grad():
            copied = self._copy(state, ())
        if self.pinned:
            torch.accelerator.synchronize()
        return copied

    def _copy(self, value: Any, path: tuple) -> Any:
        if isinstance(value, dict):
            return {key: self._copy(inner, (*path, key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._copy(inner, (*path, i)) for i, inner in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        buffer = self.buffers.get(path)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            pinned = value.device.type == "cuda"
            self.pinned |= pinned
            buffer = torch.empty_like(value, device="cpu", pin_memory=pinned, requires_grad=False)
            self.buffers[path] = buffer
        return buffer.copy_(value, non_blocking=True)
