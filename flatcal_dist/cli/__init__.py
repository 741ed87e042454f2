"""The `flatcal` command: shards in, reports out.

Each module holds some of its commands, with their parsers beside them.
"""

from flatcal_dist.cli.main import main, run_command
from flatcal_dist.cli.reports import evaluate_arguments

__all__ = ["evaluate_arguments", "main", "run_command"]
