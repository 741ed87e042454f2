"""Printing may fail: a reader that has gone, a full disk or a closed terminal ends no run.

Ctrl-C leaves one line on the terminal.
"""

import contextlib
import errno
import io
import os
import select
import sys
from types import TracebackType
from typing import TextIO

from typing_extensions import Buffer

PATIENCE = 5.0  # seconds to wait for a terminal that takes nothing


class Forgiving(io.RawIOBase):
    """A file descriptor to write to. After the first error the rest is dropped without a message.

    `problem` is that error, or None.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.problem: OSError | None = None

    def write(self, data: Buffer) -> int:
        while self.problem is None:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError as error:
                if not select.select([], [self.descriptor], [], PATIENCE)[1]:
                    self.problem = error
            except OSError as error:
                self.problem = error
        return memoryview(data).nbytes

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
    """Let `print`, rich, warnings and tracebacks drop what cannot be written, from now on.

    Programs call this at their start. A stream that somebody has put in place of Python's stays. A
    program that Ctrl-C ends says so in one line, without a traceback.
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
        sys.stdout = out = _forgiving(sys.stdout, 1)
        sys.__stdout__ = out  # type: ignore[misc]  # typeshed calls it final, Python does not
    if sys.stderr is sys.__stderr__:
        sys.stderr = errors = _forgiving(sys.stderr, 2)
        sys.__stderr__ = errors  # type: ignore[misc]  # as above


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # Python then ends the process by SIGINT, as shells ask
        print("interrupted: the same command does what is missing", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _forgiving(stream: TextIO | None, descriptor: int) -> io.TextIOWrapper:
    by_line = descriptor == 2
    if stream is not None:
        if isinstance(stream, io.TextIOWrapper):
            if isinstance(getattr(stream.buffer, "raw", None), Forgiving):
                return stream
            by_line |= stream.line_buffering or stream.write_through  # python -u
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        descriptor = stream.fileno()
    return io.TextIOWrapper(
        io.BufferedWriter(Forgiving(descriptor)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",  # a letter that the terminal does not know ends no run either
        line_buffering=by_line,
    )


def problem_of_output() -> OSError | None:
    """Return the error that kept standard output from being written, unless its reader has gone."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    problem = raw.problem if isinstance(raw, Forgiving) else None
    return None if problem is None or problem.errno == errno.EPIPE else problem
