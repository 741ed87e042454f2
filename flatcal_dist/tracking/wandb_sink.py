"""Training's side of W&B: starts the process that follows metrics.jsonl, and waits for none of it.

It can neither slow nor stop nor fail the run: nothing is handed over but the end of the run, there
the wait is bounded, and whatever goes wrong is said once.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from flatcal_dist.files import open_to_append

ROOT = Path(__file__).resolve().parents[2]


class WandbSink:
    """`mode`: offline or online. Raises OSError where no process can be started."""

    def __init__(self, directory: Path, mode: str, finish_seconds: float) -> None:
        self.directory, self.finish_seconds, self.ended = directory, finish_seconds, False
        (directory / "wandb").mkdir(exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("WANDB_SERVICE", None)  # a service of its own, not one we live in
        with open_to_append(directory / "wandb/process.log") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flatcal_dist.tracking.wandb_process", str(directory), mode],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for training, which ends this in order
            )
        os.set_blocking(self.process.stdout.fileno(), False)

    def messages(self) -> list[str]:
        """What the process has said since the last call; and that it ended, if it did."""
        code = self.process.poll()
        self.ended = code is not None
        said = (self.process.stdout.read() or b"").decode(errors="replace").splitlines()
        if code:
            said.append(
                f"W&B is left out from here on (its process ended with {code}, see "
                f"{self.directory / 'wandb/process.log'}). metrics.jsonl has everything; "
                f"flatcal sync {self.directory} sends it"
            )
        return said

    def finish(self, exit_code: int) -> list[str]:
        """End the W&B run, within `wandb.finish_seconds` and a little; what there is to say."""
        try:
            self.process.stdin.write(b"finish %d\n" % exit_code)
            self.process.stdin.close()
        except OSError:  # it has ended
            pass
        try:
            self.process.wait(timeout=self.finish_seconds + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        said = self.messages()
        self.process.stdout.close()
        return said
