"""Warnings of this package as lines for people who run commands, not for programmers."""

import sys
import warnings
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def print_warnings_plainly() -> None:
    """From now on print this package's warnings as `warning: TEXT` on stderr, each text once.

    Python's own form names a file and quotes a source line, which tells a user nothing. Warnings of
    other packages keep that form: there it is what one needs in order to report them.
    """
    usual, told = warnings.showwarning, set()

    def show(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if not Path(filename).resolve().is_relative_to(PACKAGE):
            usual(message, category, filename, lineno, *rest)
        elif str(message) not in told:
            told.add(str(message))
            print(f"warning: {message}", file=sys.stderr)

    warnings.showwarning = show
