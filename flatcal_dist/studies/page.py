"""The page of a study, and what else it ends in: results.csv, study.json and figures."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.metrics.entry import Metric
from flatcal_dist.calibration.pages import frame
from flatcal_dist.calibration.pages.display import counted
from flatcal_dist.files import write_json, write_text
from flatcal_dist.studies import figures
from flatcal_dist.studies.elements import Element
from flatcal_dist.studies.file import Study
from flatcal_dist.studies.jobs import How, command
from flatcal_dist.studies.panels import Panel, as_json, chosen_panels, compare, panels_of, ranks
from flatcal_dist.studies.published import AFTER, Published, published_beside
from flatcal_dist.studies.results import SHIFTED, Result, provenance, results_csv
from flatcal_dist.studies.trade import Trade, in_words, trades
from flatcal_dist.urls import hide

SCHEMA_VERSION = 1
FEWEST_RANKED = 3  # arms of a panel from which on ranks say more than its table
FEWEST_DRAWN = 2  # comparisons from which on a figure says more than a sentence


def write_study(study: Study, file: Path, results: Sequence[Result], how: How) -> list[Panel]:
    """Write index.html, results.csv, study.json and the comparisons into the study's directory.

    Args:
        study: The study.
        file: Its file, as the user named it.
        results: What each run has. At least one has a report.
        how: How the runs were started, for the commands that the page shows.

    Returns:
        The panels of the page, then those of chosen settings.

    Raises:
        ConfigError: The file of published figures cannot be used.
        ValueError: Runs of one panel were evaluated on different images.
        OSError: A file cannot be written.
    """
    folder = Path(study.directory)
    published = published_beside(study, [result.element for result in results])
    panels = panels_of(study, results)
    compare(panels, folder)
    chosen = chosen_panels(study, panels)
    compare(chosen, folder, "chosen")
    found, placed = trades(panels), ranks(panels)
    said = in_words(found)
    write_text(folder / "results.csv", results_csv(results, file.as_posix()))
    rows = [row for panel in panels for row in beside(panel, published)]
    runs = [_run(study, result, how, folder) for result in results]
    written = {
        "schema_version": SCHEMA_VERSION,
        "study": study.model_dump(exclude={"directory"}),
        "panels": [as_json(panel) for panel in panels],
        "chosen": [as_json(panel) for panel in chosen],
        "ranks": placed,
        "calibration_and_failure_prediction": said,
        "published": [_published_json(row) for row in rows],
        "runs": runs,
    }
    write_json(folder / "study.json", written)
    html = frame.render(
        "study.html.j2",
        title=study.question or f"Study {study.name}",
        study=study,
        panels=panels,
        chosen=chosen,
        finished=sum(result.report is not None for result in results),
        results=results,
        metrics=[METRICS[key] for key in COMPARED],
        shifted=[METRICS[key] for key in SHIFTED] if _has_shift(results) else [],
        ranks=placed if any(len(panel.measured) >= FEWEST_RANKED for panel in panels) else {},
        trade=said,
        published=rows,
        runs=runs,
        figures=_figures(panels, found, folder),
        counted=counted,
    )
    write_text(folder / "index.html", html)
    return [*panels, *chosen]


def beside(panel: Panel, published: Sequence[Published]) -> list[dict[str, Any]]:
    """Return the published figures of a panel, each with what was measured, or None."""
    rows = []
    for arm in panel.arms:
        for figure in published:
            if figure.matches(arm.point):
                over = arm.over_seeds(figure.metric)
                rows.append({
                    "panel": panel.name, "arm": arm.name, "figure": figure,
                    "name": metric_name(figure.metric), "unit": _metric(figure.metric).unit,
                    "measured": over.mean if over else None,
                    "measured_sd": over.sd if over else None,
                    "seeds": over.seeds if over else 0,
                })  # fmt: skip
    return rows


def _published_json(row: dict[str, Any]) -> dict[str, Any]:
    keys = ("panel", "arm", "measured", "measured_sd", "seeds")
    return asdict(row["figure"]) | {key: row[key] for key in keys}


def _metric(key: str) -> Metric:
    return METRICS[key.removesuffix(AFTER)]


def metric_name(key: str) -> str:
    """Return how a page names a metric, also one after temperature scaling."""
    return _metric(key).name + (" after temperature" if key.endswith(AFTER) else "")


def _has_shift(results: Sequence[Result]) -> bool:
    return any(result.shift is not None for result in results)


def _run(study: Study, result: Result, how: How, folder: Path) -> dict[str, Any]:
    element, ranks_then = result.element, result.environment.get("world_size")
    how = replace(how, processes=ranks_then or how.processes)
    return {
        "name": element.name,
        "point": element.point,
        "seed": result.seed,
        "phase": result.phase,
        "directory": hide(str(element.run)),
        "report": _link(element, folder) if result.report is not None else None,
        "command": hide(shlex.join(command_of(study, element, how))),
        **provenance(result),
    }


def command_of(study: Study, element: Element, how: How) -> list[str]:
    """Return the command of a run as a user types it in the repository, without machine paths."""
    words = ["python", *command(study, element, how)[1:]]
    root = f"{Path(__file__).resolve().parents[2]}{os.sep}"
    return [word.removeprefix(root) for word in words]


def _link(element: Element, folder: Path) -> str:
    return Path(os.path.relpath(element.run / "report/index.html", folder)).as_posix()


def _figures(panels: Sequence[Panel], found: Sequence[Trade], folder: Path) -> dict[str, Any]:
    drawn: dict[str, Any] = {"trade": None, "epochs": {}}
    target = folder / "figures"
    if len(found) >= FEWEST_DRAWN:
        title = "Calibration against failure prediction"
        words = "Changes from the baseline; the comparison holds the numbers."
        drawn["trade"] = frame.figure(figures.draw_trade(found), target, "trade", title, words)
    for number, panel in enumerate(panels):
        figure = figures.draw_epochs(panel)
        if figure is not None:
            title = f"Over the epochs: {panel.name}"
            words = "Means over seeds; metrics.jsonl of each run holds the numbers."
            name = f"epochs-{number}"
            drawn["epochs"][panel.name] = frame.figure(figure, target, name, title, words)
    return drawn
