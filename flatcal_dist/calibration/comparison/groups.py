"""Methods and their training seeds: what several runs together allow to say.

The bootstrap over images tells whether networks differ. Only other seeds tell whether methods
differ. A difference between methods is claimed if images and seeds agree. If there are too few
seeds, the claim is about these networks alone. All claims of a page are held to one level together,
see `decisions`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flatcal_dist.calibration.calibrators.of_logits import is_fitted
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.metrics.entry import Metric
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.about import SYMBOLS, About
from flatcal_dist.calibration.report.model import Report, Side
from flatcal_dist.calibration.statistics import decisions
from flatcal_dist.calibration.statistics.bootstrap import Bootstrap, mcnemar
from flatcal_dist.calibration.statistics.intervals import beyond_zero
from flatcal_dist.calibration.statistics.seeds import over_seeds, seed_difference

SIDES = ("before", "after")
REPEATED = ("after", "accuracy")  # temperature scaling does not change accuracy
Place = tuple[int, int, str, str]  # the place of a difference: method, minus method, side, metric
FEWEST_SEEDS = 3  # shared seeds from which on a difference must hold over seeds as well


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        name: The name of the run.
        place: The place among all runs.
        metrics: The metrics of its report.
        records: The records of its report.
    """

    name: str
    place: int
    metrics: Report
    records: Records

    @property
    def about(self) -> About:
        """What was evaluated."""
        return self.metrics.about

    @property
    def seed(self) -> int | None:
        """The training seed. None if it is not known."""
        return self.about.seed

    def side(self, side: str) -> Side:
        """Return the figures `before` temperature scaling, or `after` it."""
        return self.metrics.side(side)


@dataclass(frozen=True)
class Method:
    """The runs that differ by their seed alone. Often it is one run."""

    name: str
    runs: tuple[Run, ...]


def gather(runs: Sequence[Run]) -> list[Method]:
    """Return the methods in the order of their first runs.

    Runs are pooled if method, settings and the rest of the configuration agree, except for the
    seed. Two runs of one configuration and one seed stay apart. A run whose method or seed is not
    known stays apart, too, because nothing tells what it shares with other runs.
    """
    gathered: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        setting, again = _setting(run), 0
        while any(not _other_seed(run, r) for r in gathered.get((setting, again), [])):
            again += 1
        gathered.setdefault((setting, again), []).append(run)
    groups = list(gathered.values())
    if all(len(members) == 1 for members in groups):
        return [Method(members[0].name, tuple(members)) for members in groups]
    with_model = len({run.about.model for run in runs}) > 1
    names = [_method_name(members[0], with_model) for members in groups]
    for i, members in enumerate(groups):  # methods of one name can differ in configuration
        if names.count(names[i]) > 1:
            names[i] = f"{names[i]} ({members[0].name})"
    return [Method(name, tuple(m)) for name, m in zip(names, groups, strict=True)]


def gather_by(runs: Sequence[Run], names: Sequence[str]) -> list[Method]:
    """Return the methods of runs whose method is told by name, in the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run, name in zip(runs, names, strict=True):
        members.setdefault(name, []).append(run)
    return [Method(name, tuple(found)) for name, found in members.items()]


def _other_seed(run: Run, other: Run) -> bool:
    known = run.about.method is not None and None not in (run.seed, other.seed)
    return known and run.seed != other.seed


def _setting(run: Run) -> str:
    """All that runs of one method share, as text.

    The name of the data is left out, because all runs of a comparison have the same data.
    """
    about = run.about
    # 1 and 1.0 are one setting: older files hold the one, newer ones the other.
    settings = {k: v if isinstance(v, str) else float(v) for k, v in about.settings.items()}
    known = [about.model, about.method, settings, about.image_size]
    rest = {k: v for k, v in about.configuration.items() if k not in ("run", "wandb")}
    return json.dumps([known, rest], sort_keys=True, default=str)


def _method_name(run: Run, with_model: bool) -> str:
    about = run.about
    if about.method is None:
        return run.name
    parts = [about.model if with_model else None, about.method]
    parts += [f"{SYMBOLS.get(key, key)} = {value}" for key, value in about.settings.items()]
    return ", ".join(p for p in parts if p)


def summary(method: Method) -> dict[str, Any]:
    """Return name, runs and seeds of a method, and mean and spread of every metric over seeds."""
    return {
        "name": method.name,
        "runs": [run.name for run in method.runs],
        "seeds": [run.seed for run in method.runs],
        "temperature": asdict(over_seeds([_temperature(run) for run in method.runs])),
        **{
            side: {
                key: asdict(over_seeds([run.side(side).value(key) for run in method.runs]))
                for key in COMPARED
            }
            for side in SIDES
        },
    }


def _temperature(run: Run) -> float | None:
    temperature = run.metrics.temperature
    return temperature if is_fitted(temperature) else None


def differences(methods: Sequence[Method], samples: dict[str, Bootstrap]) -> dict[str, Any]:
    """Return how the methods differ.

    Returns:
        differences: The differences of every method from the first one.
        best: For each side and metric, the method that is shown to be better than every other, or
            None. The pairs of all methods form another family of claims.
        family: How many comparisons `differences` holds, and how they are held to one level.
    """
    against_first = [(i, 0) for i in range(1, len(methods))]
    all_pairs = [(i, j) for i in range(len(methods)) for j in range(i)]
    found = _all_differences(methods, samples, all_pairs)
    first = _decided({place: d for place, d in found.items() if place[:2] in against_first})
    every = _decided(found)
    return {
        "differences": [
            {
                "method": methods[i].name,
                "shared_seeds": _shared_seeds(methods[i], methods[0]),
                "same_predictions": _same_predictions(methods[i], methods[0]),
            }
            | {side: {key: first[i, 0, side, key] for key in COMPARED} for side in SIDES}
            for i, _ in against_first
        ],
        "best": {
            side: {key: _best(METRICS[key], methods, side, every) for key in COMPARED}
            for side in SIDES
        },
        "family": {
            "procedure": "Holm",
            "level": decisions.LEVEL,
            "comparisons": sum(
                d["p_value"] is not None for place, d in first.items() if place[2:] != REPEATED
            ),
        },
    }


def _all_differences(
    methods: Sequence[Method], samples: dict[str, Bootstrap], pairs: Sequence[tuple[int, int]]
) -> dict[Place, dict[str, Any]]:
    found = {}
    for i, j in pairs:
        for side in SIDES:
            both = _means(samples[side], *_compared_runs(methods[i], methods[j]))
            for key in COMPARED:
                found[i, j, side, key] = _difference(both, methods[i], methods[j], side, key)
    return found


def _decided(found: dict[Place, dict[str, Any]]) -> dict[Place, dict[str, Any]]:
    """The differences with what they show, decided as one family."""
    # Temperature scaling changes no prediction. The accuracies after it are the same comparison.
    family = [place for place in found if place[2:] != REPEATED]
    decided = {}
    adjusted = decisions.holm([found[place]["p_value"] for place in family])
    for place, p in zip(family, adjusted, strict=True):
        d = found[place]
        shown = beyond_zero(d["low"], d["high"]) and p is not None and p <= decisions.LEVEL
        decided[place] = d | {"adjusted_p_value": p, "shown": shown}
    for i, j, side, key in found:
        if (side, key) == REPEATED:
            decided[i, j, side, key] = decided[i, j, "before", "accuracy"]
    return decided


def _difference(
    both: Bootstrap, first: Method, second: Method, side: str, key: str
) -> dict[str, Any]:
    """One difference, with the larger p-value of images and, if there are enough, of seeds."""
    seeds = _by_seed(first, second, side, key)
    p = decisions.difference_p_value(both, 0, 1, key)
    difference = both.difference(0, 1, key)
    mine, theirs = _compared_runs(first, second)
    if key == "accuracy" and p is not None and len(mine) == len(theirs) == 1:
        # Two networks differ on few images. Resamples of these give too small a p-value.
        p = max(p, mcnemar(mine[0].records.correct, theirs[0].records.correct).mid_p)
    if p is not None and seeds is not None:
        agree = difference.value is not None and seeds["mean"] * difference.value > 0
        p = max(p, seeds["student_p_value"]) if agree else 1.0
    return vars(difference) | {"p_value": p, "over_seeds": seeds}


def _shared_seeds(first: Method, second: Method) -> list[int]:
    mine, theirs = (
        {run.seed for run in method.runs if run.seed is not None} for method in (first, second)
    )
    return sorted(mine & theirs)


def _compared_runs(first: Method, second: Method) -> tuple[list[Run], list[Run]]:
    """The runs of the seeds that both methods have, or all runs if they share no seed."""
    shared = _shared_seeds(first, second)
    if not shared:
        return list(first.runs), list(second.runs)
    mine, theirs = ({run.seed: run for run in method.runs} for method in (first, second))
    return [mine[seed] for seed in shared], [theirs[seed] for seed in shared]


def _same_predictions(first: Method, second: Method) -> bool:
    """Whether the compared runs predict the same, to the last digit."""
    pairs = zip(*_compared_runs(first, second), strict=False)
    return bool(_shared_seeds(first, second)) and all(
        np.array_equal(a.records.prediction, b.records.prediction)
        and np.array_equal(a.records.before.log_confidence, b.records.before.log_confidence)
        and np.array_equal(a.records.before.column("nll"), b.records.before.column("nll"))
        for a, b in pairs
    )


def _means(samples: Bootstrap, *groups: Sequence[Run]) -> Bootstrap:
    """The bootstrap of the means over each group of runs, on the same resamples."""
    places = [[run.place for run in runs] for runs in groups]
    return Bootstrap(
        np.stack([samples.point[p].mean(axis=0) for p in places]),
        np.stack([samples.replicates[:, p].mean(axis=1) for p in places], axis=1),
        samples.statistics,
        images=samples.images,
        rarer=[min(samples.rarer[place] for place in p) for p in places],
    )


def _by_seed(first: Method, second: Method, side: str, key: str) -> dict[str, Any] | None:
    """The difference over shared seeds. None for fewer than `FEWEST_SEEDS`."""
    values = [
        {run.seed: run.side(side).value(key) for run in m.runs if run.seed is not None}
        for m in (first, second)
    ]
    found = seed_difference(*values)
    if found is None or found.seeds < FEWEST_SEEDS:
        return None
    return asdict(found) | {"shown": found.shown}


def _best(
    metric: Metric, methods: Sequence[Method], side: str, decided: dict[Place, dict[str, Any]]
) -> str | None:
    if metric.better not in ("higher", "lower"):
        return None
    sign = 1 if metric.better == "higher" else -1

    def better(i: int, j: int) -> bool:
        d = decided[max(i, j), min(i, j), side, metric.key]
        return d["shown"] and sign * d["value"] * (1 if i > j else -1) > 0

    for i, method in enumerate(methods):
        others = [j for j in range(len(methods)) if j != i]
        if others and all(better(i, j) for j in others):
            return method.name
    return None
