"""Printing that may fail: a reader that has gone, a full disk or a closed terminal ends no run.

And what Ctrl-C leaves on the terminal: a line.
"""

import contextlib
import errno
import io
import os
import select
import sys
from types import TracebackType
from typing import TextIO

PATIENCE = 5.0  # seconds that a terminal which takes nothing is waited for


class Forgiving(io.RawIOBase):
    """A file descriptor to write to. After the first error the rest is dropped, without a word.

    problem: that error, or None.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.problem: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        while self.problem is None:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError as error:
                if not select.select([], [self.descriptor], [], PATIENCE)[1]:
                    self.problem = error
            except OSError as error:
                self.problem = error
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        try:
            return os.isatty(self.descriptor)
        except OSError:
            return False


def never_fail() -> None:
    """From here on `print`, rich, warnings and tracebacks drop what cannot be written.

    For programs, at their start. Streams that somebody has put in place of Python's stay. A program
    that Ctrl-C ends says so in a line, without a traceback.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _uncaught
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = sys.__stdout__ = _forgiving(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _forgiving(sys.stderr, 2)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # Python then ends the process by SIGINT, as shells ask
        print("interrupted: the same command does what is missing", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is not None:
        if isinstance(getattr(stream.buffer, "raw", None), Forgiving):
            return stream
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        descriptor = stream.fileno()
    by_line = stream is not None and (stream.line_buffering or stream.write_through)  # python -u
    return io.TextIOWrapper(
        io.BufferedWriter(Forgiving(descriptor)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",  # a letter that the terminal does not know ends no run either
        line_buffering=by_line or descriptor == 2,
    )


def problem_of_output() -> OSError | None:
    """What kept standard output from being written; a reader that has gone is none."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    problem = raw.problem if isinstance(raw, Forgiving) else None
    return None if problem is None or problem.errno == errno.EPIPE else problem
