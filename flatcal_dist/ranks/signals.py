"""The signals that ask a process to end.

SIGINT, SIGTERM, SIGUSR1, SIGUSR2, and SIGHUP (a terminal that was closed; not under nohup).
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
    SIGNALS += (signal.SIGHUP,)


def interrupt_on_signals() -> None:
    """Outside the steps each of the signals ends the process as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, interrupt)


def ignore_signals() -> None:
    """For a process that is ending because of one: others mean the same."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
