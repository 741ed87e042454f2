"""What the runs of a study left behind: one result for each run, and results.csv of all."""

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.report.model import Report, read_metrics
from flatcal_dist.calibration.report.parts import FEW_FIGURES
from flatcal_dist.calibration.report.training_curves import training_curves
from flatcal_dist.calibration.shift.report import read_shift
from flatcal_dist.files import csv_text, read_json
from flatcal_dist.runs.directory import RunDirectory, RunError
from flatcal_dist.studies.elements import Element
from flatcal_dist.studies.file import SEED
from flatcal_dist.studies.published import AFTER, AFTER_TEMPERATURE
from flatcal_dist.tracking.tracker import read_metrics as read_records
from flatcal_dist.urls import hide

APART = "_of_images_apart"  # after the key of a metric: of images that data.holdout kept apart
SHIFTED = ("accuracy", "nll", "ece", "signed_gap", "aurc", "auroc")  # also under shift
WRITTEN_AGAIN = "Move it away: the run keeps its results, and the page leaves out what it held"
PACKAGES = ("torch", "timm", "flatcal_dist")


@dataclass(frozen=True)
class Result:
    """One run of a study.

    Attributes:
        element: The run.
        phase: The phase of state.json, or "new".
        report: The metrics of its report. None if it has none.
        shift: What shift.json of its report holds. None if there is none.
        records: The records of metrics.jsonl.
        environment: What environment.json holds.
        steps: The number of steps that were taken.
    """

    element: Element
    phase: str
    report: Report | None
    shift: dict[str, Any] | None
    records: list[dict[str, Any]]
    environment: dict[str, Any]
    steps: int

    @property
    def seed(self) -> int:
        """The training seed."""
        return self.element.config.run.seed

    @cached_property
    def step_seconds(self) -> float | None:
        """The median time of a step in seconds, over what was logged. None if nothing was."""
        times = [record["perf/step_seconds"] for record in self.records[1:]
                 if record.get("perf/step_seconds") is not None]  # fmt: skip
        return statistics.median(times) if times else None

    @cached_property
    def curves(self) -> dict[str, list[Any]] | None:
        """The figures of each validated epoch, by name."""
        return training_curves(self.records)

    @cached_property
    def figures(self) -> dict[str, float | None]:
        """Every metric by its key; after temperature, of images kept apart, and under shift."""
        if self.report is None:
            return {}
        found = {key: self.report.value(key) for key in METRICS}
        found["temperature"] = self.report.temperature
        after = self.report.side("after")
        found |= {key + AFTER: after.value(key) for key in AFTER_TEMPERATURE}
        apart = self.report.images_apart
        found |= {key + APART: apart.figures.get(key) for key in FEW_FIGURES} if apart else {}
        return found | {f"{key}_under_shift": self._under_shift(key) for key in SHIFTED}

    def _under_shift(self, key: str) -> float | None:
        """The mean over the corrupted and the other sets, as trained. None without any."""
        found = {"corruptions": [], "sets": []} if self.shift is None else self.shift
        sides = [group["before"]["all"] for group in found["corruptions"]]
        sides += [one["before"] for one in found["sets"] if not one["corruption"]]
        values = [side[key] for side in sides]
        return None if not values or None in values else statistics.mean(values)


def read_results(found: Sequence[Element]) -> list[Result]:
    """Read what every run has. Raises RunError if a file of a finished run is damaged."""
    return [_read(element) for element in found]


def _read(element: Element) -> Result:
    directory, report, shift = RunDirectory(element.run), None, None
    try:
        state = directory.state()
        phase, steps = ("new", 0) if state is None else (state.phase, state.step)
    except RunError:  # the run says so when it is started
        phase, steps = "damaged", 0
    try:
        if (directory.report / "metrics.json").is_file():
            report = read_metrics(directory.report / "metrics.json")
            shift = read_shift(directory.report)
    except (OSError, ValueError) as error:
        raise RunError(
            f"run {element.name} cannot be read: {error}. `flatcal evaluate {element.run}` writes "
            "its report again"
        ) from None
    records = read_records(directory.metrics_file)
    return Result(element, phase, report, shift, records, _environment(element.run), steps)


def _environment(run: Path) -> dict[str, Any]:
    """What environment.json holds; nothing before the first start."""
    file = run / "environment.json"
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}. {WRITTEN_AGAIN}") from None
    if not isinstance(found, dict):
        raise RunError(f"{file} holds no keys and values. {WRITTEN_AGAIN}")
    return found


def results_csv(results: Sequence[Result], study_file: str) -> str:
    """Return a row for each run: its place, its figures, and what it takes to make them again."""
    rows = [_row(result, study_file) for result in results]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text([columns, *([row.get(name) for name in columns] for row in rows)])


def _row(result: Result, study_file: str) -> dict[str, Any]:
    element = result.element
    point = {key: value for key, value in element.point.items() if key != SEED}
    return {
        "run": element.name,
        **{key: hide(str(value)) for key, value in point.items()},
        "seed": result.seed,
        "phase": result.phase,
        **result.figures,
        "step_seconds": result.step_seconds,
        "steps": result.steps,
        **provenance(result),
        "study": study_file,
        "overrides": hide(shlex.join(element.overrides)),
    }


def provenance(result: Result) -> dict[str, Any]:
    """Return commit, uncommitted changes, versions and machine of the last start of a run."""
    environment = result.environment
    code, packages = environment.get("code", {}), environment.get("packages", {})
    devices = environment.get("devices") or [f"{environment.get('cpu_count')} CPU cores"]
    known = bool(environment)
    return {
        "commit": code.get("commit"),
        "uncommitted_changes": code.get("diff_sha256") or ("none" if code.get("commit") else None),
        "engine": environment.get("engine"),
        "precision": environment.get("precision"),
        "world_size": environment.get("world_size"),
        "python": environment.get("python"),
        **{name: packages.get(name) for name in PACKAGES},
        "machine": ", ".join(dict.fromkeys(devices)) if known else None,
    }
