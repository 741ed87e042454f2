"""The results of a study in panels: what is compared stands in one panel, method beside method.

A panel is one network on one data set, or whatever the study's `panels` say. Within it, an arm is
what differs but for the seed: a method, or a value of rho. Paired comparisons with the first arm
are those of `calibration.comparison`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.stats import rankdata

from flatcal_dist.calibration.comparison.writing import write_comparison
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.statistics.seeds import OverSeeds, over_seeds
from flatcal_dist.studies.elements import part_of_name
from flatcal_dist.studies.file import SEED, Study
from flatcal_dist.studies.published import AFTER, AFTER_TEMPERATURE
from flatcal_dist.studies.results import SHIFTED, Result


@dataclass(frozen=True)
class Arm:
    """The runs of a panel that differ by their seed alone."""

    name: str
    point: dict[str, Any]
    results: tuple[Result, ...]

    @property
    def measured(self) -> list[Result]:
        """The results that have a report."""
        return [result for result in self.results if result.report is not None]

    def over_seeds(self, key: str) -> OverSeeds | None:
        """Return mean and spread of a figure of `Result.figures`. None without a report."""
        values = [result.figures.get(key) for result in self.measured]
        return over_seeds(values) if values else None

    def mean(self, key: str) -> float | None:
        """Return the mean of a figure over the seeds."""
        found = self.over_seeds(key)
        return found.mean if found else None


@dataclass
class Panel:
    """The arms that are compared with each other. `comparison` is what comparison.json holds."""

    name: str
    point: dict[str, Any]
    arms: list[Arm]
    comparison: dict[str, Any] | None = None
    folder: str = ""
    measured: list[Arm] = field(init=False)

    def __post_init__(self) -> None:
        self.measured = [arm for arm in self.arms if arm.measured]

    @property
    def baseline(self) -> Arm | None:
        """The first arm that has a report."""
        return self.measured[0] if self.measured else None

    def difference(self, arm: Arm, key: str) -> dict[str, Any] | None:
        """Return the paired difference from the baseline, as comparison.json holds it."""
        rows = self.comparison["differences"] if self.comparison else []
        found = [row["before"][key] for row in rows if row["method"] == arm.name]
        return found[0] if found else None

    def cost(self, arm: Arm) -> OverSeeds | None:
        """Return the time of a step over the baseline's, of the seeds that both have."""
        if self.baseline is None:
            return None
        theirs = {result.seed: result.step_seconds for result in self.baseline.results}
        ratios = [
            result.step_seconds / base
            for result in arm.results
            if result.step_seconds and (base := theirs.get(result.seed))
        ]
        return over_seeds(ratios) if ratios else None


def panels_of(study: Study, results: Sequence[Result]) -> list[Panel]:
    """Return the panels in the order of the study."""
    apart = study.apart()
    found: dict[str, dict[str, list[Result]]] = {}
    points: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for result in results:
        point = {key: value for key, value in result.element.point.items() if key != SEED}
        where = {key: value for key, value in point.items() if key in apart}
        arm = {key: value for key, value in point.items() if key not in where}
        place, name = _name(where) or study.name, _name(arm) or study.name
        found.setdefault(place, {}).setdefault(name, []).append(result)
        points.setdefault(place, (where, {}))[1][name] = point
    return [
        Panel(
            place,
            points[place][0],
            [Arm(name, points[place][1][name], tuple(runs)) for name, runs in arms.items()],
        )
        for place, arms in found.items()
    ]


def _name(point: dict[str, Any]) -> str:
    """Places by their names, values by the last part of their keys."""
    return ", ".join(part_of_name(key, value) for key, value in point.items())


def compare(panels: Sequence[Panel], folder: Path) -> None:
    """Write a comparison of each panel that has two runs with a report or more."""
    for number, panel in enumerate(panels):
        runs = [(arm.name, result) for arm in panel.measured for result in arm.measured]
        if len(runs) < 2:
            continue
        panel.folder = "comparison" if len(panels) == 1 else f"comparison/{number}"
        panel.comparison = write_comparison(
            [result.element.run for _, result in runs],
            folder / panel.folder,
            methods_of=[name for name, _ in runs],
        )


def ranks(panels: Sequence[Panel]) -> dict[str, dict[str, float]]:
    """Return the mean rank of each arm by metric, 1 for the best, over the panels that have it.

    A signed gap is ranked by its distance from zero. Panels that lack a figure are left out.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for panel in panels:
        for key in COMPARED:
            values = {arm.name: arm.mean(key) for arm in panel.measured}
            known = {name: _badness(key, v) for name, v in values.items() if v is not None}
            for name, rank in zip(known, rankdata(list(known.values())), strict=True):
                found.setdefault(name, {}).setdefault(key, []).append(float(rank))
    return {
        name: {key: sum(each) / len(each) for key, each in of.items()} for name, of in found.items()
    }


def _badness(key: str, value: float) -> float:
    better = METRICS[key].better
    return abs(value) if better == "zero" else -value if better == "higher" else value


def as_json(panel: Panel) -> dict[str, Any]:
    """Return what study.json holds of a panel."""
    keys = (*COMPARED, "temperature", *(key + AFTER for key in AFTER_TEMPERATURE),
            *(f"{key}_under_shift" for key in SHIFTED))  # fmt: skip
    arms = []
    for arm in panel.arms:
        found = {key: arm.over_seeds(key) for key in keys}
        cost = panel.cost(arm)
        arms.append({
            "name": arm.name,
            "point": arm.point,
            "runs": [str(result.element.run) for result in arm.results],
            "seeds": [result.seed for result in arm.measured],
            "figures": {key: asdict(value) for key, value in found.items() if value is not None},
            "step_seconds_over_baseline": asdict(cost) if cost else None,
        })  # fmt: skip
    differences = panel.comparison["differences"] if panel.comparison else []
    verdict = panel.comparison["verdict"] if panel.comparison else []
    return {
        "name": panel.name,
        "point": panel.point,
        "baseline": panel.baseline.name if panel.baseline else None,
        "arms": arms,
        "differences": differences,
        "verdict": verdict,
        "comparison": panel.folder or None,
    }
