"""Published figures: a CSV file that a study names, read and matched with its runs.

    method,network,metric,value,sd,source,differs
    sam,resnet110,aurc,0.00621,0.00012,"Zhu et al. (ECCV 2022), table 2","batch norm after ..."

Each axis of the study can be a column. An empty cell, or a column that is left out, matches every
place on the axis. `metric` is a key of metrics.json, and `value` is in its unit: rates are
fractions, and AURC is not multiplied. `sd` and `differs`, the known differences of the setting from
this study, may be empty.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import read_bytes
from flatcal_dist.studies.elements import Element
from flatcal_dist.studies.file import SEED, Study

NEEDED = ("metric", "value", "source")
OPTIONAL = ("sd", "differs")
AFTER_TEMPERATURE = ("nll", "brier", "ece", "signed_gap", "aurc", "auroc")
AFTER = "_after_temperature"  # after the key of a metric: after temperature scaling


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        at: The place on each axis that the file names.
        metric: The key of the metric.
        value: The figure, in the unit of metrics.json.
        sd: Its standard deviation over trainings, as published. None if it was not.
        source: The paper and its table.
        differs: How the setting differs from this study, as far as it is known.
    """

    at: dict[str, str]
    metric: str
    value: float
    sd: float | None
    source: str
    differs: str

    def matches(self, point: dict[str, Any]) -> bool:
        """Return whether this figure is of the runs at `point`."""
        return all(str(point.get(axis)) == place for axis, place in self.at.items())


def read_published(path: str | Path, places: dict[str, Sequence[Any]]) -> list[Published]:
    """Read a file of published figures.

    Args:
        path: The CSV file.
        places: The places on each axis of the study.

    Raises:
        ConfigError: The file cannot be read, a column is missing or unknown, or a cell holds
            something else than expected. The message names the line.
    """
    try:
        text = read_bytes(Path(path)).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the published figures {path}: {error}") from None
    table = csv.DictReader(io.StringIO(text), strict=True)
    try:
        columns = list(table.fieldnames or [])
        lines = [(table.line_num, line) for line in table]
    except csv.Error as error:
        raise ConfigError(f"{path}, line {table.line_num}: {error}") from None
    _check_columns(path, columns, places)
    return [_row(f"{path}, line {n}", line, places) for n, line in lines]


def published_beside(study: Study, found: Sequence[Element]) -> list[Published]:
    """Return the published figures that a study names, each of which is of some run of it.

    Raises ConfigError for a file that cannot be used, and for a figure of no run.
    """
    if study.published is None:
        return []
    places = {axis: list(names) for axis, names in study.axes.items()} | study.grid
    places.pop(SEED, None)  # figures are of all seeds
    figures = read_published(study.published, places)
    for figure in figures:
        if not any(figure.matches(element.point) for element in found):
            at = ", ".join(f"{axis}={place}" for axis, place in figure.at.items())
            raise ConfigError(
                f"{study.published}: no run of the study is at {at}, of which there is a published "
                f"{figure.metric}; correct its row, or `exclude` in the study"
            )
    return figures


def _check_columns(
    path: str | Path, columns: Sequence[str], places: dict[str, Sequence[Any]]
) -> None:
    missing = [name for name in NEEDED if name not in columns]
    known = (*places, *NEEDED, *OPTIONAL)
    unknown = [name for name in columns if name not in known]
    if missing or unknown or len(set(columns)) < len(columns):
        what = f"lacks the column {missing[0]}" if missing else (
            f"has a column {unknown[0]!r}" if unknown else "has two columns of one name"
        )  # fmt: skip
        raise ConfigError(
            f"the file of published figures {path} {what}; expected {', '.join(NEEDED)}, and, as "
            f"wanted, {', '.join((*OPTIONAL, *places))}"
        )


def _row(where: str, line: dict[str, Any], places: dict[str, Sequence[Any]]) -> Published:
    if None in line or None in line.values():
        raise ConfigError(f"{where}: it has another number of cells than the first line")
    cells = {name: str(cell).strip() for name, cell in line.items()}
    at = {axis: cells[axis] for axis in places if cells.get(axis)}
    for axis, place in at.items():
        if place not in map(str, places[axis]):
            listed = ", ".join(map(str, places[axis]))
            raise ConfigError(f"{where}: {place!r} is not a place on {axis}, which has {listed}")
    if cells["metric"] not in (*METRICS, *(key + AFTER for key in AFTER_TEMPERATURE)):
        raise ConfigError(
            f"{where}: metric {cells['metric']!r} is no metric of a report, such as ece, nor one "
            f"of {', '.join(AFTER_TEMPERATURE)} followed by {AFTER}"
        )
    if not cells["source"]:
        raise ConfigError(f"{where}: source is empty; name the paper and its table")
    value, sd = (_number(where, name, cells.get(name, "")) for name in ("value", "sd"))
    if value is None:
        raise ConfigError(f"{where}: value is empty; expected a number")
    unit = METRICS[cells["metric"].removesuffix(AFTER)].unit
    if unit.factor == 100 and not -1 <= value <= 1:
        raise ConfigError(f"{where}: value={cells['value']} is no fraction; expected 0.05 for 5 %")
    if sd is not None and sd < 0:
        raise ConfigError(f"{where}: sd={cells['sd']} is negative")
    return Published(at, cells["metric"], value, sd, cells["source"], cells.get("differs", ""))


def _number(where: str, name: str, text: str) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"{where}: {name}={text} is not a finite number")
    return value
