"""What a comparison says in words: a sentence per metric, and what the sentences rest on."""

from collections.abc import Sequence
from typing import Any

from flatcal_dist.calibration.comparison.groups import SIDES
from flatcal_dist.calibration.metrics.entries import COMPARED, METRICS
from flatcal_dist.calibration.metrics.entry import Metric
from flatcal_dist.calibration.pages.display import (
    counted,
    enumerate_names,
    percent,
    show_difference,
)


def verdict(comparison: dict[str, Any]) -> list[str]:
    """Return a sentence per metric, and a last text that says what the sentences rest on."""
    rows = comparison["differences"]
    if not rows:
        name = comparison["methods"][0]["name"]
        return [
            f"All runs are seeds of one method ({name}). There is no other method to compare it "
            "with. The table shows its spread from one training to the next."
        ]
    sentences = [_sentence(METRICS[key], rows, "before") for key in COMPARED]
    after = (_sentence(METRICS[key], rows, "after") for key in ("nll", "ece"))
    sentences += [f"After temperature scaling, {sentence}" for sentence in after]
    shown = any(row[side][key]["shown"] for row in rows for side in SIDES for key in COMPARED)
    same = [row for row in rows if row["same_predictions"]]
    rest = [_over_what(rows) if shown else "No difference is shown.", *map(_of_a_copy, same)]
    family = comparison["family"]
    rest.append(
        f"The {family['comparisons']} comparisons with the baseline are held to one level by "
        f"{family['procedure']}'s procedure: where methods do not differ at all, the chance that "
        f"any difference is called shown is {percent(family['level'], 0)} at most."
    )
    return [*sentences, " ".join(rest)]


def _over_what(rows: Sequence[dict[str, Any]]) -> str:
    tested = [row["before"]["accuracy"]["over_seeds"] for row in rows]
    if None not in tested:
        fewest = min(d["seeds"] for d in tested)
        return f"Differences hold over images and over {fewest} training seeds or more."
    if any(tested):
        return (
            "Some methods share fewer than three seeds with the baseline: their differences hold "
            "for these networks, and another seed may turn them."
        )
    return "Differences hold for these networks; another training seed may turn them."


def _of_a_copy(row: dict[str, Any]) -> str:
    seeds = counted(len(row["shared_seeds"]), "seed")
    return (
        f"{row['method']} and the baseline share {seeds}, with the same predictions for every "
        "image: nothing tells the two apart there."
    )


def _sentence(metric: Metric, rows: Sequence[dict[str, Any]], side: str) -> str:
    claims: dict[str, list[str]] = {}
    silent = []
    for row in rows:
        d = row[side][metric.key]
        if d["shown"]:
            direction = "higher" if d["value"] > 0 else "lower"
            judged = metric.judge(d["value"])
            word = direction if judged == direction else f"{direction} ({judged})"
            size, _ = show_difference(abs(d["value"]), None, None, metric.unit, sign=False)
            claims.setdefault(word, []).append(f"{row['method']} by {size}")
        else:
            silent.append(row["method"])
    parts = [f"{word} for {enumerate_names(names)}" for word, names in sorted(claims.items())]
    if silent:
        parts.append(f"no difference shown for {enumerate_names(silent)}")
    return f"{metric.name}: {'; '.join(parts)}."
