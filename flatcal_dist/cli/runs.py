"""Commands about runs: what they do, and what W&B gets from them."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 1000  # cells


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Add the parsers of this module's commands."""
    status_arguments(commands.add_parser("status", help="what runs do and how far they are"))
    sync_arguments(commands.add_parser("sync", help="send runs that were recorded offline to W&B"))


def status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.set_defaults(run=status)


def sync_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("directories", type=Path, nargs="+", metavar="RUN")
    add("--dry-run", action="store_true", help="say what would be sent")
    add("--minutes", type=_minutes, default=30.0, help="the time limit of each run (30)")
    parser.set_defaults(run=sync)


def status(arguments: argparse.Namespace) -> None:
    """Print the status of runs, and exit with 1 if one cannot be read."""
    from flatcal_dist.runs import status as states

    found = states.status(arguments.directories)
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
    else:
        states.print_status(found, _console())
    if any(one.phase == "unreadable" for one in found):
        sys.exit(1)


def sync(arguments: argparse.Namespace) -> None:
    """Send runs to W&B."""
    from flatcal_dist.tracking.wandb_sync import sync as send

    send(arguments.directories, arguments.dry_run, arguments.minutes)


def _console() -> "Console":
    """Return a console as wide as the terminal or COLUMNS. A file or a pipe takes any width."""
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else WIDE)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0, below 1e6")
    return minutes
