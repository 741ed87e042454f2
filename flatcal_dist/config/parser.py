"""The command line of every recipe."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from flatcal_dist.errors import ConfigError


class CommandLine(argparse.ArgumentParser):
    """A parser that raises ConfigError, so that the program decides which rank speaks."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


class _Files(argparse.Action):
    """Collects the files. A default is there only as long as none is named."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option: object = None
    ) -> None:
        before = getattr(namespace, self.dest)
        namespace.config = [*(before if isinstance(before, list) else []), values]


def command_line(
    description: str | None, default_config: Path | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options of every recipe. `overrides` takes the dotted ones."""
    parser = CommandLine(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        action=_Files,
        default=default_config,
        metavar="FILE",
        help="a configuration; of several, each after its own --config, later ones win",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the whole configuration, and stop",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser
