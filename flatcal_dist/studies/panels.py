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
from flatcal_dist.studies.results import APART, SHIFTED, Result


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
    """The arms that are compared with each other.

    Attributes:
        name: The name of the panel.
        point: What its runs share: places by axis, and values by key.
        arms: The arms, the baseline first.
        chosen: For arms of chosen runs, the name of the arm that each seed chose.
        comparison: What comparison.json holds, once it is written.
        folder: Where that lies, in the study's directory.
        measured: The arms that have a report.
    """

    name: str
    point: dict[str, Any]
    arms: list[Arm]
    chosen: dict[str, dict[int, str]] = field(default_factory=dict)
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


def chosen_panels(study: Study, panels: Sequence[Panel]) -> list[Panel]:
    """Return a panel for each choice of the study and each panel that has its constant setting."""
    found = []
    for name, choice in study.choose.items():
        for panel in panels:
            among = [arm for arm in panel.arms if choice.matches(arm.point)]
            constant = [arm for arm in among if choice.matches(arm.point, constant=True)]
            if len(constant) != 1 or not constant[0].measured:
                continue
            picked = {f"chosen by {METRICS[key].name}": _chosen(among, key) for key in choice.by}
            arms = [
                Arm(title, {}, tuple(result for _, result in by_seed.values()))
                for title, by_seed in picked.items()
            ]
            found.append(
                Panel(
                    name if len(panels) == 1 else f"{panel.name}, {name}",
                    panel.point,
                    [*constant, *arms],
                    {
                        title: {seed: arm.name for seed, (arm, _) in by_seed.items()}
                        for title, by_seed in picked.items()
                    },
                )
            )
    return found


def _chosen(among: Sequence[Arm], key: str) -> dict[int, tuple[Arm, Result]]:
    """Return the best run by a figure of images kept apart, for each seed that all arms have."""
    runs: dict[int, list[tuple[float, int, Arm, Result]]] = {}
    for place, arm in enumerate(among):
        for result in arm.measured:
            value = result.figures.get(key + APART)
            if value is not None:
                runs.setdefault(result.seed, []).append((_badness(key, value), place, arm, result))
    whole = {seed: each for seed, each in sorted(runs.items()) if len(each) == len(among)}
    return {seed: min(each, key=lambda one: one[:2])[2:] for seed, each in whole.items()}


def _name(point: dict[str, Any]) -> str:
    """Places by their names, values by the last part of their keys."""
    return ", ".join(part_of_name(key, value) for key, value in point.items())


def compare(panels: Sequence[Panel], folder: Path, under: str = "comparison") -> None:
    """Write a comparison of each panel that has two runs with a report or more.

    Args:
        panels: The panels.
        folder: The study's directory.
        under: The folder of the comparisons in it.
    """
    for number, panel in enumerate(panels):
        runs = [(arm.name, result) for arm in panel.measured for result in arm.measured]
        if len(runs) < 2:
            continue
        panel.folder = under if len(panels) == 1 else f"{under}/{number}"
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
        "chosen": panel.chosen,
    }
