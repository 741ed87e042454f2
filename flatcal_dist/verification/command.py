"""The command around the verification, from arguments to a table and an exit code."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flatcal_dist import config as configuration
from flatcal_dist.config import Config, ConfigError
from flatcal_dist.files import write_json
from flatcal_dist.printing import never_fail
from flatcal_dist.ranks import distributed
from flatcal_dist.ranks.launcher import LaunchError, give_up, rank_to_speak, tell_launcher
from flatcal_dist.runs.environment import describe_environment
from flatcal_dist.sharpness.engines.registry import ENGINES
from flatcal_dist.urls import public
from flatcal_dist.verification.faults import FAULTS, refuse_fault
from flatcal_dist.verification.invariants import Row, verify

DEFAULT = Path(__file__).parents[2] / "configs/digits/csam.yaml"


def main(description: str | None = None) -> None:
    """Measure the invariants, print and save the table, and exit with 1 if one does not hold."""
    parser = configuration.command_line(description or "", DEFAULT)
    parser.add_argument("--fault", choices=FAULTS, help="Break one thing on purpose.")
    parser.add_argument("--output", type=Path, default=Path("verification.json"), metavar="FILE")
    never_fail()
    try:
        arguments = parser.parse_intermixed_args()
        config = configuration.load(arguments.config, arguments.overrides)
        if arguments.print_config:
            if rank_to_speak() == 0:
                print(configuration.to_yaml(config), end="")
            return
        refuse_fault(arguments.fault, config)
        train = config.train
        accelerator = distributed.start(train.engine, train.precision, config.run.world_size)
    except (ConfigError, LaunchError) as error:
        give_up(str(error))
    started = time.monotonic()
    holds = False
    with distributed.ending_together(accelerator):
        engine = ENGINES[train.engine].engine_class()
        with FAULTS[arguments.fault](engine) if arguments.fault else nullcontext():
            rows = verify(config, accelerator)
        holds = all(row.holds for row in rows)
        if accelerator.is_main_process:
            _show(rows, config, accelerator.num_processes, time.monotonic() - started)
            _save(rows, config, accelerator.num_processes, arguments.output, arguments.fault)
        accelerator.wait_for_everyone()  # a rank that exits with 1 has the launcher end all others
    if not holds:
        tell_launcher("an invariant of the step does not hold: see the table above")
        sys.exit(1)


def _show(rows: list[Row], config: Config, ranks: int, seconds: float) -> None:
    sharpness, train = config.sharpness, config.train
    title = (
        f"{config.model.name}, {sharpness.rule}, scope {sharpness.scope}, {train.engine}, "
        f"{train.precision}, {ranks} ranks, {seconds:.0f} s"
    )
    table = Table("invariant", "measured", "bound", "verdict", title=title)
    for row in rows:
        sign = ">=" if row.above else "<="
        verdict = "holds" if row.holds else "FAILS"
        table.add_row(row.invariant, f"{row.measured:.2e}", f"{sign} {row.bound:.2e}", verdict)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _save(rows: list[Row], config: Config, ranks: int, output: Path, fault: str | None) -> None:
    table = [
        {
            "invariant": row.invariant,
            "measured": row.measured if abs(row.measured) < float("inf") else None,
            "bound": row.bound,
            "above": row.above,
            "holds": row.holds,
        }
        for row in rows
    ]
    write_json(
        output,
        {
            "holds": all(row.holds for row in rows),
            "fault": fault,
            "world_size": ranks,
            "invariants": table,
            "configuration": public(config.model_dump()),
            "environment": describe_environment(),
        },
    )
    print(f"saved as {output}")
