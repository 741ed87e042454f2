"""Methods and their training seeds: what several runs together allow to say.

The bootstrap over images tells whether these networks differ; whether the methods do, only other
seeds tell. A difference between methods is claimed where both agree, and in the words of the
weaker one where there are too few seeds.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .display import enumerate_names, show
from .naming import METRICS, Metric
from .records import Records
from .seeds import over_seeds, seed_difference
from .statistics import Bootstrap

COMPARED = ("accuracy", "nll", "brier", "ece", "signed_gap", "aurc", "auroc")
SIDES = ("before", "after")


@dataclass(frozen=True)
class Run:
    """One run: its name, its place among the runs, and what its report holds."""

    name: str
    place: int
    metrics: dict[str, Any]
    records: Records

    @property
    def about(self) -> dict[str, Any]:
        return self.metrics["about"]

    @property
    def seed(self) -> int | None:
        return self.about["seed"]

    def side(self, side: str) -> dict[str, Any]:
        return self.metrics if side == "before" else self.metrics["after_temperature"]


@dataclass(frozen=True)
class Method:
    """Runs that differ by their seed alone; often a single one."""

    name: str
    runs: tuple[Run, ...]


def gather(runs: Sequence[Run]) -> list[Method]:
    """The methods, in the order of their first runs.

    Two runs of one configuration and one seed are no two seeds: they stay apart.
    """
    gathered: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        setting, again = _setting(run), 0
        while any(r.seed == run.seed for r in gathered.get((setting, again), [])):
            again += 1
        gathered.setdefault((setting, again), []).append(run)
    groups = list(gathered.values())
    if all(len(members) == 1 for members in groups):
        return [Method(members[0].name, tuple(members)) for members in groups]
    with_model = len({run.about["model"] for run in runs}) > 1
    names = [_method_name(members[0].about, with_model) for members in groups]
    for i, members in enumerate(groups):  # alike in name but not in configuration
        if names.count(names[i]) > 1:
            names[i] = f"{names[i]} ({members[0].name})"
    return [Method(name, tuple(m)) for name, m in zip(names, groups, strict=True)]


def _setting(run: Run) -> str:
    """What tells runs apart beyond their seed, as text."""
    about = run.about
    keys = ("model", "method", "rho", "gamma", "data", "image_size")
    rest = {k: v for k, v in about["configuration"].items() if k not in ("run", "wandb")}
    return json.dumps([[about[k] for k in keys], rest], sort_keys=True, default=str)


def _method_name(about: dict[str, Any], with_model: bool) -> str:
    parts = [about["model"] if with_model else None, about["method"]]
    parts += [
        f"{s} = {about[k]}" for k, s in (("rho", "ρ"), ("gamma", "γ")) if about[k] is not None
    ]
    return ", ".join(p for p in parts if p) or "runs"


def summary(method: Method) -> dict[str, Any]:
    """Name, runs, seeds, and mean and spread over seeds of every metric, on both sides."""
    return {
        "name": method.name,
        "runs": [run.name for run in method.runs],
        "seeds": [run.seed for run in method.runs],
        "temperature": asdict(over_seeds([run.metrics["temperature"] for run in method.runs])),
        **{
            side: {
                key: asdict(over_seeds([run.side(side)[key] for run in method.runs]))
                for key in COMPARED
            }
            for side in SIDES
        },
    }


def differences(methods: Sequence[Method], samples: dict[str, Bootstrap]) -> dict[str, Any]:
    """`differences`: of every method but the first from the first, and `best`: per side and metric
    the method that is shown to be better than every other, or None.
    """
    means = {side: _over_methods(samples[side], methods) for side in SIDES}

    def difference(i: int, j: int, side: str, key: str) -> dict[str, Any]:
        found = means[side].difference(i, j, key)
        seeds = _by_seed(methods[i], methods[j], side, key)
        shown = found.excludes_zero and (
            seeds is None or (seeds["shown"] and seeds["mean"] * found.value > 0)
        )
        return vars(found) | {"shown": shown, "over_seeds": seeds}

    return {
        "differences": [
            {"method": method.name}
            | {side: {key: difference(i, 0, side, key) for key in COMPARED} for side in SIDES}
            for i, method in enumerate(methods)
            if i
        ],
        "best": {
            side: {key: _best(METRICS[key], methods, side, difference) for key in COMPARED}
            for side in SIDES
        },
    }


def _over_methods(samples: Bootstrap, methods: Sequence[Method]) -> Bootstrap:
    """The bootstrap of the methods' means over their runs, on the same resamples."""
    places = [[run.place for run in method.runs] for method in methods]
    return Bootstrap(
        np.stack([samples.point[p].mean(axis=0) for p in places]),
        np.stack([samples.replicates[:, p].mean(axis=1) for p in places], axis=1),
    )


def _by_seed(first: Method, second: Method, side: str, key: str) -> dict[str, Any] | None:
    """The difference over shared seeds, None for fewer than three."""
    values = [{run.seed: run.side(side)[key] for run in m.runs} for m in (first, second)]
    found = seed_difference(*values)
    if found is None or found.seeds < 3:
        return None
    return asdict(found) | {"shown": found.shown}


def _best(metric: Metric, methods: Sequence[Method], side: str, difference: Any) -> str | None:
    if metric.better not in ("higher", "lower"):
        return None
    sign = 1 if metric.better == "higher" else -1
    for i, method in enumerate(methods):
        others = (difference(i, j, side, metric.key) for j in range(len(methods)) if j != i)
        if all(d["shown"] and sign * d["value"] > 0 for d in others):
            return method.name
    return None


def verdict(comparison: dict[str, Any]) -> list[str]:
    """One sentence per metric, as trained, then what the sentences rest on."""
    if not comparison["differences"]:
        name = comparison["methods"][0]["name"]
        return [
            f"All runs are seeds of one method ({name}): there is nothing to hold it against, but "
            "its spread from one training to the next."
        ]
    rows = comparison["differences"]
    sentences = [_sentence(METRICS[key], rows, "before") for key in COMPARED]
    after = (_sentence(METRICS[key], rows, "after") for key in ("nll", "ece"))
    sentences += [f"After temperature scaling, {sentence}" for sentence in after]
    tested = [d["before"]["accuracy"]["over_seeds"] for d in comparison["differences"]]
    if None not in tested:
        fewest = min(d["seeds"] for d in tested)
        rest = f"Differences hold over images and over {fewest} training seeds or more."
    elif any(tested):
        rest = (
            "Some methods share fewer than three seeds with the baseline: their differences hold "
            "for these networks, and another seed may turn them."
        )
    else:
        rest = "Differences hold for these networks; another training seed may turn them."
    count = len(sentences) * len(tested)
    if count >= 20:
        rest += (
            f" These are {count} comparisons at 95 %: expect some {count / 20:.0f} to be found by "
            "chance where there is no difference."
        )
    return [*sentences, rest]


def _sentence(metric: Metric, rows: Sequence[dict[str, Any]], side: str) -> str:
    claims: dict[str, list[str]] = {}
    silent = []
    for row in rows:
        d = row[side][metric.key]
        if d["shown"]:
            direction = "higher" if d["value"] > 0 else "lower"
            judged = metric.judge(d["value"])
            word = direction if judged == direction else f"{direction} ({judged})"
            size = show(abs(d["value"]), metric.unit, difference=True).removeprefix("+")
            claims.setdefault(word, []).append(f"{row['method']} by {size}")
        else:
            silent.append(row["method"])
    parts = [f"{word} for {enumerate_names(names)}" for word, names in sorted(claims.items())]
    if silent:
        parts.append(f"no difference shown for {enumerate_names(silent)}")
    return f"{metric.name}: {'; '.join(parts)}."
