"""The entry of the `flatcal` command.

flatcal shard SOURCE DESTINATION --split train|validation
flatcal index SHARDS
flatcal validate SHARDS [--split NAME] [--decode N|all] [--classes K] [--json FILE]
flatcal evaluate RUN [RUN ...] [--data [NAME=]DATA ...] [--output DIR]
flatcal evaluate RUN RUN [RUN ...] --ensemble --output DIR
flatcal evaluate --model NAME [--weights FILE] --data DATA --output DIR [--set key.sub=value ...]
flatcal report RUN
flatcal report SCORES.npz|.parquet|.csv|... [--labels FILE] [--classes FILE] [--output DIR]
flatcal compare RUN RUN ... --output DIR
flatcal status RUN [RUN ...] [--json]
flatcal export RUN [--checkpoint STEP] FILE
flatcal sync RUN [RUN ...] [--dry-run]
flatcal config [KEY] [--markdown [FILE]]
flatcal environment
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from flatcal_dist.cli import data, reports, runs, settings
from flatcal_dist.printing import never_fail, problem_of_output
from flatcal_dist.ranks.launcher import give_up
from flatcal_dist.warning_lines import print_warnings_plainly

# Commands import what they need: torch alone takes seconds, and `flatcal report` needs none of it.


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. `argv` defaults to the words of the command line."""
    never_fail()
    given = sys.argv[1:] if argv is None else argv
    if "" in given:  # an empty path would be the working directory
        give_up("an argument is empty; is a variable of the shell unset?")
    run_command(_parser().parse_args(given))


def run_command(arguments: argparse.Namespace) -> None:
    """Call `arguments.run`. An error, or output that cannot be written, becomes a message."""
    print_warnings_plainly()
    try:
        arguments.run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        give_up(str(error))
    if problem := problem_of_output():
        give_up(f"standard output cannot be written: {problem}")


class _Whole(argparse.ArgumentParser):
    """Takes options in full: one that is cut short may be meant for another."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **{"allow_abbrev": False, **options})


def _parser() -> argparse.ArgumentParser:
    parser = _Whole(
        "flatcal", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (data, reports, runs, settings):
        module.add_commands(commands)
    return parser
