"""Warnings of this package are lines for people who run commands, not for programmers."""

import sys
import warnings
from pathlib import Path
from typing import TextIO

PACKAGE = Path(__file__).resolve().parent


def print_warnings_plainly() -> None:
    """Print warnings of this package as `warning: TEXT` on stderr from now on, each text once.

    Python's form names a file and quotes a source line, which tells a user nothing. Warnings of
    other packages keep that form, which is needed to report them.
    """
    usual = warnings.showwarning
    told: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not Path(filename).resolve().is_relative_to(PACKAGE):
            usual(message, category, filename, lineno, file, line)
        elif str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
