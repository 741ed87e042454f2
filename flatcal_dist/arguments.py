"""Types and defaults of command-line options."""

import argparse
import os
from collections.abc import Callable


def whole_number(least: int = 1) -> Callable[[str], int]:
    """Return a type for argparse: a decimal number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return parse


def usable_cores() -> int:
    """Return how many cores this process may use, as set by SLURM or taskset."""
    return len(os.sched_getaffinity(0))
