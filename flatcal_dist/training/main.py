"""What a recipe calls: command line -> ranks -> run; and how all of it ends."""

import os
import signal
import sys
from pathlib import Path

from flatcal_dist import config as configuration
from flatcal_dist import distributed
from flatcal_dist.config import ConfigError
from flatcal_dist.distributed import ending_together
from flatcal_dist.run_directory import RunDirectory
from flatcal_dist.training.dry_run import dry_run
from flatcal_dist.training.loop import run

PREEMPTED = 75  # sysexits.h: a temporary failure, the same command goes on


def main(default_config: Path, description: str | None = None) -> None:
    """Train as a configuration says, evaluate, report. Exits with 0, 1 (error), 75 (preempted).

    Launchers turn both of the latter into 1: state.json in the run directory tells them apart.
    FLATCAL_EXIT_PREEMPTED=0 makes 0 of the 75, for launchers that end the other ranks otherwise.
    """
    arguments = configuration.command_line(description, default_config).parse_intermixed_args()
    try:
        config = configuration.load(arguments.config, arguments.overrides)
        if arguments.print_config:
            if os.environ.get("RANK", "0") == "0":
                print(configuration.to_yaml(config), end="")
            return
        accelerator = distributed.start(
            config.train.engine, config.train.precision, config.run.world_size
        )
    except (ConfigError, distributed.LaunchError) as error:
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    directory = RunDirectory(config.run.dir)
    phase = "finished"
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C, outside the steps too
    with ending_together(accelerator, directory):
        if arguments.dry_run:
            dry_run(config, accelerator)
        else:
            phase = run(config, directory, accelerator)
    if phase == "preempted":
        sys.exit(int(os.environ.get("FLATCAL_EXIT_PREEMPTED", PREEMPTED)))
