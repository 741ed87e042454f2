"""Saving without standing still: training waits for a copy, and a thread writes it.

No thread talks to other ranks. That all parts are durable, or that one could not be written, is
agreed in the reduction that ends each step, and at the latest before the next save.
"""

import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints.format import CheckpointError, Progress
from flatcal_dist.ranks.distributed import on_all_ranks, said_by_rank_0


class Saver:
    """Writes one checkpoint at a time into `directory`, which exists. Every rank has one.

    alone: that no other rank runs, for users without a process group.
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
        # Of this start of the run: what an earlier one left half written is never taken for ours.
        token = secrets.token_hex(4)
        self.token = token if alone else said_by_rank_0(token)
        self.staging = Staging()
        self.progress: Progress | None = None  # of the save in flight, the same on all ranks
        self.thread: threading.Thread | None = None

    def start(self, state: dict[str, Any], progress: Progress) -> None:
        """Copy `state` (of a rank without a part of its own: ignored); the rest goes on behind.

        Called by all ranks. Ends the save before this one first. Raises as `finish`.
        """
        self.finish()
        self.progress, self.publishing = progress, False
        self.written, self.error = False, None
        if self.rank < progress.parts:
            copy = self.staging.copy(state)
            self._in_background(lambda: checkpoint.write_part(self._beside(), self.rank, copy))
        else:
            self.written = True

    @property
    def votes(self) -> tuple[float, float]:
        """This rank's: its part is durable, its part failed. For the step to sum over ranks."""
        if self.progress is None:
            return 0.0, 0.0
        return float(self.written), float(self.error is not None)

    def agreed(self, votes: tuple[float, float]) -> None:
        """Go on after a step, with the sums of `votes`. Raises on all ranks if one failed."""
        written, failed = votes
        if failed:
            self.finish()
        elif self.progress is not None and written == self.ranks:
            self._publish()

    def finish(self) -> None:
        """Wait until the save in flight, if any, is a checkpoint. Called by all ranks.

        Raises on all ranks, with the cause, if it could not be written: then the one before stays.
        """
        if self.progress is None:
            return
        try:
            self._join()
            self.together(self._raise)
            self._publish()
            self._join()
            self.together(self._raise)
        finally:
            self.progress = None

    def _publish(self) -> None:
        if self.publishing:
            return
        self.publishing = True
        if self.rank == 0:
            self._join()
            self._in_background(
                lambda: checkpoint.publish(self._beside(), self.progress, self.keep, self.keep_best)
            )

    def _beside(self) -> Path:
        return self.directory / f".step_{self.progress.step:08d}.{self.token}"

    def _in_background(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                work()
                self.written = True
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self.thread.start()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def _raise(self) -> None:
        if self.error is not None:
            raise CheckpointError(
                f"the checkpoint of step {self.progress.step} could not be written "
                f"({type(self.error).__name__}: {self.error}); the one before it stays. Make room "
                "or mend the file system; the same command goes on from there"
            ) from self.error


class Staging:
    """Host memory that state is copied to; kept from save to save, since fresh memory is slow."""

    def __init__(self) -> None:
        self.buffers: dict[tuple, Tensor] = {}
        self.pinned = False  # whether copies are still under way when `copy_` returns

    def copy(self, state: Any) -> Any:
        """The same nest of dicts and lists, with copies on the CPU of all tensors in it."""
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
