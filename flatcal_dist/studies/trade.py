"""Does a method that calibrates better also tell its errors apart better, or worse?

Calibration (ECE) and failure prediction (AURC, AUROC) are different aims. Zhu et al. (ECCV 2022)
found that methods which lower ECE can harm failure prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import spearmanr

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.pages.display import enumerate_names, number
from flatcal_dist.studies.panels import Arm, Panel

FEWEST = 5  # comparisons from which on a correlation is computed
FAILURE = ("aurc", "auroc")


@dataclass(frozen=True)
class Trade:
    """How an arm differs from the baseline of its panel in ECE, AURC and AUROC."""

    panel: Panel
    arm: Arm
    differences: dict[str, dict[str, Any]]

    def shown(self, key: str, judged: str) -> bool:
        """Return whether the difference is shown, and is `better` or `worse`."""
        d = self.differences[key]
        return bool(d["shown"]) and METRICS[key].judge(d["value"]) == judged


def trades(panels: Sequence[Panel]) -> list[Trade]:
    """Return every arm whose three differences are defined."""
    found = []
    for panel in panels:
        for arm in panel.measured[1:]:
            each = {key: panel.difference(arm, key) for key in ("ece", *FAILURE)}
            known = {k: d for k, d in each.items() if d is not None and d["value"] is not None}
            if len(known) == len(each):
                found.append(Trade(panel, arm, known))
    return found


def correlations(found: Sequence[Trade]) -> dict[str, float | None]:
    """Return Spearman's correlation of the differences in ECE with those in AURC and AUROC.

    It is None for fewer than `FEWEST` comparisons, or where one column is constant.
    """
    if len(found) < FEWEST:
        return dict.fromkeys(FAILURE)
    ece = [trade.differences["ece"]["value"] for trade in found]
    columns = {k: [trade.differences[k]["value"] for trade in found] for k in FAILURE}
    return {
        key: float(spearmanr(ece, column).statistic)
        if len(set(ece)) > 1 and len(set(column)) > 1
        else None
        for key, column in columns.items()
    }


def in_words(found: Sequence[Trade]) -> list[str]:
    """Return what the differences show, a sentence each. It claims only what is shown."""
    if not found:
        return []
    several = len({trade.panel.name for trade in found}) > 1

    def names(chosen: Sequence[Trade]) -> str:
        return enumerate_names(
            [f"{t.arm.name} ({t.panel.name})" if several else t.arm.name for t in chosen]
        )

    sentences, better = [], [trade for trade in found if trade.shown("ece", "better")]
    for key in FAILURE:
        name = METRICS[key].name.removesuffix(" × 1000")
        for judged, word in (("worse", "worse"), ("better", "better as well")):
            both = [trade for trade in better if trade.shown(key, judged)]
            if both:
                sentences.append(f"ECE is lower and {name} is {word}: {names(both)}.")
    if not better:
        sentences.append("No method is shown to lower ECE.")
    elif not sentences:
        sentences.append(
            f"ECE is lower for {names(better)}, and no difference in AURC or AUROC is shown."
        )
    correlation = correlations(found)
    parts = [
        f"{number(value, 2)} with {METRICS[key].name.removesuffix(' × 1000')}"
        for key, value in correlation.items()
        if value is not None
    ]
    if parts:
        sentences.append(
            f"Over {len(found)} comparisons, the rank correlation of the change in ECE is "
            f"{enumerate_names(parts)}. Comparisons are few, and they share images and seeds: this "
            "describes them and tests nothing."
        )
    return sentences
