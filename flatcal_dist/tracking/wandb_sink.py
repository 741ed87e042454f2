"""The side of W&B in the training process: it starts the process that follows metrics.jsonl.

That process can neither slow down nor stop the run. It is told nothing but the end of the run, the
wait for it is bounded then, and whatever goes wrong is said once.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from flatcal_dist.files import open_to_append

Mode = Literal["offline", "online"]
ROOT = Path(__file__).resolve().parents[2]


class WandbSink:
    """The process that follows metrics.jsonl of a run directory.

    Args:
        directory: The run directory.
        mode: The mode of W&B.
        finish_seconds: How long the end of the run waits for W&B at most.

    Raises:
        OSError: No process can be started.
    """

    def __init__(self, directory: Path, mode: Mode, finish_seconds: float) -> None:
        self.directory, self.finish_seconds, self.ended = directory, finish_seconds, False
        (directory / "wandb").mkdir(exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("WANDB_SERVICE", None)  # a service that this process has is not shared
        with open_to_append(directory / "wandb/process.log") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flatcal_dist.tracking.wandb_process", str(directory), mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for training, which ends this in order
            )
        assert self.process.stdin is not None  # they are pipes
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)

    def messages(self) -> list[str]:
        """Return what the process has said since the last call, and that it ended if it did."""
        code = self.process.poll()
        self.ended = code is not None
        said = (self.stdout.read() or b"").decode(errors="replace").splitlines()
        if code:
            said.append(
                f"W&B is left out from here on (its process ended with {code}, see "
                f"{self.directory / 'wandb/process.log'}). metrics.jsonl has everything; "
                f"flatcal sync {self.directory} sends it"
            )
        return said

    def finish(self, exit_code: int) -> list[str]:
        """End the W&B run within `wandb.finish_seconds` and a little. Return what it said."""
        try:
            self.stdin.write(b"finish %d\n" % exit_code)
            self.stdin.close()
        except OSError:  # it has ended
            pass
        try:
            self.process.wait(timeout=self.finish_seconds + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        said = self.messages()
        self.stdout.close()
        return said
