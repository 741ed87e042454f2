"""Commands about settings: the keys of a configuration, and the software that runs."""

import argparse
import json
from pathlib import Path


def add_commands(commands: "argparse._SubParsersAction") -> None:
    """Add the parsers of this module's commands."""
    config_arguments(
        commands.add_parser("config", help="every key of a configuration and its meaning")
    )
    commands.add_parser("environment", help="versions, code, devices").set_defaults(run=environment)


def config_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("key", nargs="?", metavar="KEY", help="a key or a section, such as sharpness.rho or train")
    add("--markdown", nargs="?", type=Path, const=Path("configs/README.md"), metavar="FILE",
        help="write the reference into FILE between its marker lines; by default "
        "configs/README.md")  # fmt: skip
    parser.set_defaults(run=config)


def config(arguments: argparse.Namespace) -> None:
    """Print keys of a configuration, or write all of them into a Markdown file."""
    from flatcal_dist.config import reference

    if arguments.markdown is None:
        print(reference.as_text(reference.entries(arguments.key)))
        return
    if arguments.key is not None:
        raise ValueError("--markdown writes all keys: leave KEY out")
    reference.write_markdown(arguments.markdown)
    print(arguments.markdown)


def environment(arguments: argparse.Namespace) -> None:
    """Print what runs here as JSON."""
    from flatcal_dist.runs.environment import describe_environment

    print(json.dumps(describe_environment(), indent=1))
