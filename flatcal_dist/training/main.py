"""The function that a recipe calls: command line, ranks, run, and how all of it ends."""

from flatcal_dist.ranks.launcher import end_with_the_launcher

end_with_the_launcher()  # before imports: a rank must also end if its launcher dies meanwhile

# ruff: noqa: E402
import argparse
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flatcal_dist import config as configuration
from flatcal_dist.config import ConfigError
from flatcal_dist.printing import never_fail
from flatcal_dist.ranks.launcher import (
    LaunchError,
    give_up,
    preempted_code,
    rank_to_speak,
    tell_launcher,
)
from flatcal_dist.ranks.signals import interrupt_on_signals
from flatcal_dist.runs.directory import RunDirectory

if TYPE_CHECKING:
    from flatcal_dist.config import Config


def main(default_config: Path, description: str | None = None) -> None:
    """Train as a configuration says, evaluate and report.

    The exit code is 0, 1 after an error, or 75 if the run was preempted. Launchers turn 75 into 1;
    state.json in the run directory tells the two apart. FLATCAL_EXIT_PREEMPTED=0 replaces 75 by 0,
    for launchers that would end the other ranks.
    """
    started = time.time()
    end_with_the_launcher()  # again: this module may be imported before the rank is forked
    never_fail()
    try:
        parser = configuration.command_line(description, default_config)
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="build everything, take two steps on made-up images, and stop",
        )
        parser.add_argument(
            "--timing",
            type=Path,
            metavar="FILE",
            help="with --dry-run: write a JSON file that says how long the run would take",
        )
        arguments = parser.parse_intermixed_args()
        if arguments.timing and not arguments.dry_run:
            raise ConfigError("--timing FILE belongs to --dry-run")
        config = configuration.load(arguments.config, arguments.overrides)
        if arguments.print_config:
            if rank_to_speak() == 0:
                print(configuration.to_yaml(config), end="")
            return
        _run(config, arguments, started)
    except (ConfigError, LaunchError) as error:
        give_up(str(error))


def _run(config: "Config", arguments: argparse.Namespace, started: float) -> None:
    """Start the ranks and train. ConfigError or LaunchError if they cannot begin."""
    # These imports take seconds. A wrong word on the command line does not wait for them.
    from flatcal_dist.ranks import distributed
    from flatcal_dist.training.dry_run import dry_run
    from flatcal_dist.training.loop import run
    from flatcal_dist.training.watchdog import Watchdog

    accelerator = distributed.start(
        config.train.engine,
        config.train.precision,
        config.run.world_size,
        timedelta(minutes=config.train.collective_timeout_minutes),
    )
    assert config.run.dir is not None  # `load` derives one from the configuration's file
    directory = RunDirectory(config.run.dir)
    phase = "finished"
    interrupt_on_signals()
    rank = accelerator.process_index
    end = partial(distributed.end, rank=rank, directory=directory)
    watchdog = Watchdog(end, config.train.hang_minutes)
    with distributed.ending_together(accelerator, directory):
        if arguments.dry_run:
            dry_run(config, accelerator, arguments.timing)
        else:
            phase = run(config, directory, accelerator, watchdog, started)
    watchdog.rest()
    if phase == "preempted":
        tell_launcher("stopped as asked, with a checkpoint: the same command goes on from there")
        sys.exit(preempted_code())
