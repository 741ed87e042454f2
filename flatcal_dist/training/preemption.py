"""Ctrl-C, SIGTERM and SIGUSR1, 2 ask a run to end: noted as they come, acted on between steps."""

import os
import signal
from types import FrameType, TracebackType


class StopRequest:
    """While entered, the signals only set `asked`; the training loop ends at a whole step.

    Signals reach the loader's worker processes too; only the process that entered listens.
    """

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __enter__(self) -> "StopRequest":
        self.asked = False
        self.process = os.getpid()
        self.previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self.process:
            self.asked = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
