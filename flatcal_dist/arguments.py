"""Types and defaults of command-line options."""

import argparse
import math
import os
from collections.abc import Callable


def whole_number(least: int = 1) -> Callable[[str], int]:
    """Return a type for argparse: a decimal number of `least` or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return parse


def positive_number(text: str) -> float:
    """Return the number above 0 that an option holds. A type for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1_000_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1,000,000")
    return value


def usable_cores() -> int:
    """Return how many cores this process may use, as set by SLURM or taskset."""
    return len(os.sched_getaffinity(0))
