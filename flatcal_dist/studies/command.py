"""The command around a study: which runs are missing, run them, and write what they show."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatcal_dist.arguments import positive_number, whole_number
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.pages.display import show
from flatcal_dist.calibration.statistics.seeds import OverSeeds
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import refuse_no_directory
from flatcal_dist.printing import never_fail
from flatcal_dist.ranks.launcher import preempted_code
from flatcal_dist.runs.directory import RunError
from flatcal_dist.studies.choice import check_settings
from flatcal_dist.studies.elements import Element, elements
from flatcal_dist.studies.estimate import estimate
from flatcal_dist.studies.file import SEED, Study, check_study, load_study
from flatcal_dist.studies.jobs import How, Jobs, phase_of, refuse_other_runs, to_do
from flatcal_dist.studies.published import published_beside
from flatcal_dist.urls import hide

DONE = "done"


def main(description: str | None = None) -> None:
    """Run what is missing of a study, and write its page.

    The exit code is 0, 1 after an error or if a run failed, and 130 after Ctrl-C. It is 75, or
    FLATCAL_EXIT_PREEMPTED, if the time was over.
    """
    never_fail()
    arguments = _parser(description).parse_intermixed_args()
    try:
        study = _as_told(load_study(arguments.file), arguments)
        check_study(study, arguments.file)
        how = _how(arguments)
        if not (arguments.list or arguments.dry_run):
            refuse_no_directory(Path(study.directory))
        found = elements(study, arguments.overrides)
        check_settings(study.choose, found, study.apart())
        refuse_other_runs(found)
        published_beside(study, found)
        missing = [element for element in found if _state(study, element) != DONE]
        if arguments.list:
            _list(found)
        elif arguments.dry_run:
            estimate(study, found, how)
        elif arguments.report:
            _report(study, arguments.file, found, how)
        else:
            print(
                f"study {study.name}: {len(found)} runs, {len(found) - len(missing)} finished "
                "already"
            )
            jobs = Jobs(study, how)
            jobs.run(missing)
            _end(study, arguments.file, found, jobs)
    except (ConfigError, RunError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _end(study: Study, file: Path, found: Sequence[Element], jobs: Jobs) -> None:
    """Report what there is, and end with the exit code that tells why the runs ended."""
    if jobs.stopping and not jobs.out_of_time:
        sys.exit(130)
    finished = [element for element in found if _state(study, element) == DONE]
    if any(_state(study, element) in (DONE, "evaluate") for element in found):
        _report(study, file, found, jobs.how)
    if jobs.failed:
        sys.exit(f"error: {len(jobs.failed)} of {len(found)} runs did not finish")
    if len(finished) < len(found):
        print(f"{len(finished)} of {len(found)} runs are finished; the same command goes on")
        sys.exit(preempted_code())


def _state(study: Study, element: Element) -> str:
    """Return what is missing of a run, `DONE`, or "damaged" if its state.json is."""
    try:
        return to_do(study, element) or DONE
    except RunError:  # it says so when it is started, and stops no other run
        return "damaged"


def _report(study: Study, file: Path, found: Sequence[Element], how: How) -> None:
    """Write the page of the runs that have a report, and print their figures."""
    from flatcal_dist.studies.page import write_study  # its imports take seconds
    from flatcal_dist.studies.results import read_results

    results = read_results(found)
    if not any(result.report is not None for result in results):
        finished = any(result.phase == "finished" for result in results)
        print(
            "no run has a report: the runs were made with evaluate.at_end=false"
            if finished
            else "no run is finished yet, so there is nothing to report"
        )
        return
    panels = write_study(study, file, results, how)
    for panel in (panel for panel in panels if panel.measured):
        table = Table("arm", "seeds", *(METRICS[key].name for key in COMPARED), title=panel.name)
        for arm in panel.measured:
            cells = [_cell(arm.over_seeds(key), key) for key in COMPARED]
            table.add_row(Text(arm.name), str(len(arm.measured)), *cells)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    folder = Path(study.directory)
    print(f"results: {folder / 'results.csv'}\npage: {folder / 'index.html'}")


def _cell(over: OverSeeds | None, key: str) -> str:
    """Return mean and standard deviation in the unit of the metric."""
    unit = METRICS[key].unit
    if over is None or over.mean is None:
        return ""
    text = show(over.mean, unit, suffix=False)
    return text if over.sd is None else f"{text} ± {unit.factor * over.sd:.{unit.decimals}f}"


def _list(found: Sequence[Element]) -> None:
    for element in found:
        try:
            phase = phase_of(element)
        except RunError:
            phase = "damaged"
        print(element.index, phase, hide(shlex.join(element.arguments)))


def _how(arguments: argparse.Namespace) -> How:
    if arguments.launcher is not None and not arguments.launcher.is_file():
        raise ConfigError(f"--launcher {arguments.launcher}: there is no such file")
    seconds = None if arguments.budget is None else 60 * arguments.budget
    return How(arguments.processes, arguments.parallel, arguments.launcher, arguments.show, seconds)


def _as_told(study: Study, arguments: argparse.Namespace) -> Study:
    """Return the study with the directory and the seeds of the command line."""
    changes: dict = {}
    if arguments.directory is not None:
        changes["directory"] = str(arguments.directory)
    if arguments.seeds is not None:
        changes["grid"] = {**study.grid, SEED: list(range(arguments.seeds))}
    return study.model_copy(update=changes)


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path, metavar="STUDY.yaml")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the runs and start none")
    what.add_argument(
        "--dry-run",
        action="store_true",
        help="build each missing run, and print how long it will take; write nothing",
    )
    what.add_argument(
        "--report", action="store_true", help="write the page of what there is, and start no run"
    )
    add("--processes", type=whole_number(), default=1, metavar="N", help="ranks of each run")
    add("--parallel", type=whole_number(), default=1, metavar="N", help="runs at a time")
    add(
        "--budget",
        type=positive_number,
        metavar="MINUTES",
        help="stop after this time, with checkpoints; the same command goes on",
    )
    add("--seeds", type=whole_number(), metavar="N", help="seeds 0 to N-1, instead of the file's")
    add("--directory", type=Path, metavar="DIR", help="instead of the file's directory")
    add("--launcher", type=Path, metavar="FILE",
        help="a file for accelerate, such as configs/accelerate/node_ddp.yaml; by default CPU "
        "processes, or plain Python for one rank")  # fmt: skip
    add("--show", action="store_true", help="print the output of the runs on the terminal")
    add("overrides", nargs="*", metavar="key.sub=value")
    return parser
