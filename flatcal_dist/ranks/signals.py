"""The signals that ask a process to end.

SIGINT, SIGTERM, SIGUSR1, SIGUSR2, and SIGHUP (a terminal that was closed; not under nohup).
"""

import signal
from types import FrameType

SIGNALS: tuple[signal.Signals, ...] = (
    signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    SIGNALS += (signal.SIGHUP,)


def interrupt_on_signals() -> None:
    """Let each of the signals end the process as Ctrl-C does. For the time outside of steps."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    """Ignore all of the signals. For a process that already ends because of one."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
