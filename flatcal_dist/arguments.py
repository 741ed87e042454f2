"""Types of command-line options."""

import argparse
from collections.abc import Callable


def whole_number(least: int = 1) -> Callable[[str], int]:
    """For argparse: a decimal number of `least` or more, or an error that says so."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {least} or more")
        return int(text)

    return parse
