"""The command line that every recipe has."""

import argparse
from pathlib import Path
from typing import NoReturn

from flatcal_dist.errors import ConfigError


class CommandLine(argparse.ArgumentParser):
    """Leaves what to say, and on which rank, to the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def command_line(description: str, default_config: Path | None = None) -> argparse.ArgumentParser:
    """The options that every recipe has; `overrides` takes the dotted ones."""
    parser = CommandLine(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=default_config, metavar="FILE")
    parser.add_argument("--print-config", action="store_true", help="print it resolved, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, two steps on made-up images, stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser
