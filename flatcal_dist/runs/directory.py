"""The run directory: which run it belongs to, and in which state this run is.

config.yaml  environment.json  state.json  metrics.jsonl  bad_samples.jsonl (if there are any)
checkpoints/  model.safetensors  report/
code/  slurm/ (of a submitted run; they are there before its first start)
"""

import fcntl
import os
import re
import shlex
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TextIO

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from flatcal_dist import config as configuration
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import open_to_append, read_bytes, read_json, write_json

if TYPE_CHECKING:  # `flatcal status` needs no configuration, whose import takes seconds
    from flatcal_dist.config import Config

# These may lie in a run directory before the first start: what launch/submit.py writes, a request
# to stop, and what a start left that was killed or had no room.
BEFORE = ("code", "slurm", "STOP", ".lock", "checkpoints", "config.private.yaml")
# A writer that was killed leaves such a file beside the one that it was about to replace.
LEFTOVER = re.compile(
    r"\.(config|config\.private|state|environment|wandb_id|bad_samples|model)\.[0-9a-f]{8}(\.\w+)?"
)
# A run writes these. Nothing else may have their names.
FILES = (
    "config.yaml", "environment.json", "state.json", "metrics.jsonl", "bad_samples.jsonl",
    "model.safetensors", "wandb_id", ".lock",
)  # fmt: skip
DIRECTORIES = ("checkpoints", "report", "wandb")
LOCK_PATIENCE = 5.0  # seconds; a job that was just killed may need them to end


Phase = Literal["running", "preempted", "finished", "failed"]


class RunError(RuntimeError):
    """A run directory cannot be used as asked. The message says how to go on."""


@dataclass
class State:
    """The state of a run.

    Attributes:
        phase: What became of the run.
        epoch: How many epochs are done.
        step: How many steps are done.
        restarts: How often the run was started again.
        seconds: The time of training, over all starts.
        cause: The first error of a failed run, or what asked a preempted run to stop.
        saved: The step of the newest checkpoint when this was written; 0 for none.
    """

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    phase: Phase = "running"
    epoch: NonNegativeInt = 0
    step: NonNegativeInt = 0
    restarts: NonNegativeInt = 0
    seconds: NonNegativeFloat = 0.0
    cause: str | None = None
    saved: NonNegativeInt = 0


STATE = TypeAdapter(State)
Text = Annotated[str, StringConstraints(strict=True, min_length=1)]


class Recorded(BaseModel):
    """The part of environment.json that a start compares."""

    model_config = ConfigDict(extra="allow")

    train_data: Text = "-"
    validation_data: Text = "-"
    decoder: Annotated[Text, StringConstraints(strip_whitespace=True)] = "-"


def in_words(error: Exception) -> str:
    """Say in one line what is wrong with a file."""
    if not isinstance(error, ValidationError):
        return str(error)
    each = [(".".join(map(str, one["loc"])), one["msg"].lower()) for one in error.errors()]
    return "; ".join(f"{where}: {what}" if where else what for where, what in each[:5])


class RunDirectory:
    """The directory of one run: its files, its lock and its recorded state."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.bad_samples_file = self.path / "bad_samples.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.weights_file = self.path / "model.safetensors"
        self.report = self.path / "report"
        self.wandb_id_file = self.path / "wandb_id"
        self.stop_file = self.path / "STOP"
        self.entered = False  # whether this start may record how it ends
        self.lock: TextIO | None = None

    def check(self, config: "Config") -> None:
        """Raise RunError if this configuration may not run here. Nothing is written."""
        try:
            self._check(config)
        except OSError as error:
            raise RunError(
                f"run.dir={self.path} cannot be read ({error.strerror or error}). Mend its "
                "permissions, or name another run.dir"
            ) from None

    def _check(self, config: "Config") -> None:
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RunError(f"run.dir={self.path} is a file; name a directory")
        self._refuse_in_the_way()
        if not self.config_file.exists():
            begun = any(self.checkpoints.glob("*"))
            if begun or any(not _before(entry.name) for entry in self.path.iterdir()):
                raise RunError(
                    f"run.dir={self.path} holds files but no config.yaml, so it is not a run "
                    "directory; name a new or an empty one"
                    + f". If it is a run's, {self._put_back()}"
                    * self._is_a_runs()
                )
            return
        if not read_bytes(self.config_file).strip():
            raise RunError(f"{self.config_file} is empty, which no run's is: {self._put_back()}")
        try:
            old = configuration.load(self.config_file, recorded=True)
        except ConfigError as error:
            raise RunError(
                f"{error}\nThat is the configuration with which the run began. If another "
                "version wrote it, go on with the version that environment.json names; if it was "
                f"damaged, {self._put_back()}"
            ) from None
        if different := configuration.differences(old, config):
            raise RunError(
                f"run.dir={self.path} belongs to a run of another configuration:\n  "
                + "\n  ".join(different)
                + "\nName another run.dir, or go on with the run's own configuration: "
                f"--config {self.config_file}"
            )

    def _is_a_runs(self) -> bool:
        return any(self.checkpoints.glob("step_*")) or (self.path / "state.json").exists()

    def _put_back(self) -> str:
        return (
            "put its config.yaml back, or write it again: the command that began the run, with "
            f"--print-config > {shlex.quote(str(self.config_file))}"
        )

    def _refuse_in_the_way(self) -> None:
        """Raise RunError if the run could not write one of its files or directories later."""
        for name in (*FILES, *DIRECTORIES):
            path, expected = self.path / name, "directory" if name in DIRECTORIES else "file"
            if path.is_symlink() and not path.exists():
                raise RunError(
                    f"{path} is a symbolic link to {path.readlink()}, which is not there: bring it "
                    f"back (is a file system not mounted?), or remove the link"
                )
            if path.exists() and not (path.is_dir() if expected == "directory" else path.is_file()):
                raise RunError(
                    f"{path} is no {expected}, and a run keeps a {expected} of that name: move "
                    "what lies there, and give the same command again"
                )

    def check_data(self, identities: dict[str, str], decoder: str) -> None:
        """Raise RunError if the run began with other data or another decoder.

        Another version of the decoder may go on. environment.json then names that version.
        """
        before = self.environment()
        for key, identity in identities.items():
            if before.get(key, identity) != identity:
                raise RunError(
                    f"{self.path} was begun with other data: {key} was {before[key][:16]}..., now "
                    f"{identity[:16]}... (a hash of shards, labels and keys). Put the data back, "
                    "or name another run.dir"
                )
        if (old := before.get("decoder", decoder)).split()[0] != decoder.split()[0]:
            raise RunError(
                f"{self.path} was begun with the decoder {old}, here it is {decoder}, which may "
                "give other pixels. Install the first here, or name another run.dir"
            )

    def environment(self) -> dict:
        """Return what the last start recorded, or nothing before the first."""
        file = self.path / "environment.json"
        try:
            found = read_json(file) if file.exists() else {}
            if not isinstance(found, dict):
                raise ValueError("it holds no keys and values")
            Recorded.model_validate(found)
            return found
        except ValueError as error:
            why = in_words(error)
            raise RunError(f"{file} cannot be read ({why}); delete it to go on") from None
        except OSError as error:
            raise RunError(_refused(file, error)) from None

    def claim(self) -> None:
        """Lock the directory for this process. Raises RunError while another job uses it.

        This comes before anything in it is read, because another job may be about to change it.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a letter that no name may have
            raise RunError(
                f"run.dir={self.path}: no directory can be made as {self.checkpoints} "
                f"({getattr(error, 'strerror', None) or error}). Name another run.dir, or mend the "
                "file system"
            ) from None
        if self.lock is None or self.lock.closed:
            self._lock()
        for left in self.path.glob(".*"):  # left by killed writers, for we have the lock
            if LEFTOVER.fullmatch(left.name) and not left.is_dir():
                left.unlink(missing_ok=True)

    def open(self, config: "Config", environment: dict) -> State:
        """Claim the directory, describe the run in it, and count the start. One rank calls it."""
        self.claim()
        state = self.state()
        state = State() if state is None else state
        if self.config_file.exists():
            state.restarts += 1
        configuration.write(config, self.config_file)
        write_json(self.path / "environment.json", environment)
        state.phase, state.cause = "running", None
        self.write(state)
        self.enter()
        return state

    def enter(self) -> None:
        """Let this process record how this start of the run ends. Every rank calls it.

        Before that `fail` and `interrupt` record nothing: the directory may belong to another job.
        """
        self.entered = True

    def _lock(self) -> None:
        """Lock the directory until this process ends, in whatever way."""
        self.lock = open_to_append(self.path / ".lock")
        until = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
                self.lock.close()
                holder = self.holder() or "it says not which"
                raise RunError(
                    f"run.dir={self.path} is in use by another job ({holder}); "
                    "wait for it or end it, or name another run.dir"
                ) from None
            except OSError as error:  # a file system without locks
                print(f"{self.path} cannot be locked ({error}): start one job in it only")
                return
        self.lock.truncate(0)
        self.lock.write(f"host {socket.gethostname()}, process {os.getpid()}")
        self.lock.flush()

    def in_use(self) -> str | None:
        """Return who uses the directory, or None if nobody does or it cannot be known."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # no lock
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.holder() or "a job that is starting"
        except OSError:  # a file system without locks
            pass
        finally:
            os.close(descriptor)
        return None

    def holder(self) -> str:
        """Return how the last job that locked the directory described itself, or ""."""
        return _words(self.path / ".lock")

    def state(self) -> State | None:
        """Return the recorded state, or None before the first start. Raises RunError if damaged."""
        file = self.path / "state.json"
        try:
            if not file.exists():
                return None
            return STATE.validate_json(read_bytes(file))
        except ValueError as error:
            raise RunError(
                f"{file} cannot be read ({in_words(error)}); delete it, and the run goes on from "
                "its newest checkpoint"
            ) from None
        except OSError as error:
            raise RunError(_refused(file, error)) from None

    def write(self, state: State) -> None:
        """Write the state. Raises RunError if the directory is gone; none is created."""
        try:
            self._refuse_vanished()
            write_json(self.path / "state.json", asdict(state))
        except FileNotFoundError:
            self._refuse_vanished()  # between the look and the writing
            raise

    def _refuse_vanished(self) -> None:
        if not self.checkpoints.is_dir():
            raise RunError(
                f"run.dir={self.path} has vanished (removed, renamed, or its file system is gone); "
                "with it back in its place the same command goes on from its newest checkpoint"
            )

    def wandb_id(self) -> str | None:
        """Return the id of the W&B run, or None without a valid one."""
        found = _words(self.wandb_id_file)
        return found if re.fullmatch(r"[\w-]{1,64}", found, re.ASCII) else None

    def job(self) -> str | None:
        """Return the number of the SLURM job of the run, such as 41 or 41_3, or None."""
        found = _words(self.path / "slurm/job")
        return found if re.fullmatch(r"[0-9]+(_[0-9]+)?", found) else None

    def has_ended(self) -> bool:
        """Whether a rank has recorded that this start of the run has ended."""
        state = self.state()
        return state is not None and state.phase != "running"

    def fail(self, cause: str, rank: int) -> str:
        """Record a failure unless another rank has already recorded one. Return the first cause."""
        return self._end("failed", cause, f"rank {rank}: {cause}")

    def interrupt(self, cause: str) -> str:
        """Record that the run was asked to stop, unless it has ended before. Return the cause."""
        return self._end("preempted", cause, cause)

    def _end(self, phase: Phase, cause: str, recorded: str) -> str:
        if not self.entered:
            return cause
        state = self.state()
        if state is None:
            return recorded
        if state.phase == "running":  # else this start of the run has ended for another cause
            state.phase, state.cause = phase, recorded
            self.write(state)
        return state.cause or cause


def _before(name: str) -> bool:
    return name in BEFORE or LEFTOVER.fullmatch(name) is not None


def _refused(file: Path, error: OSError) -> str:
    """Say that a file cannot be read. It may be whole, so the advice is not to delete it."""
    why = error.strerror or error
    return f"{file} cannot be read ({why}); mend its permissions or the file system"


def _words(file: Path) -> str:
    """Return what a job wrote about itself into a small file, or "" if that cannot be read."""
    try:
        return " ".join(read_bytes(file, 1000).decode(errors="replace").split())
    except (OSError, ValueError):
        return ""
