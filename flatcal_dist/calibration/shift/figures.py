"""Figures of a network under corruption, from shift.json."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flatcal_dist.calibration.pages.display import MINUS
from flatcal_dist.calibration.pages.drawing import percent_axes, style
from flatcal_dist.calibration.pages.palette import heat, light, text_on

CURVES = (
    ("accuracy", "Accuracy"), ("ece", "ECE"), ("signed_gap", "Signed gap"), ("auroc", "AUROC"),
)  # fmt: skip


def draw_severity(
    group: dict[str, Any], rows: list[dict[str, Any]], clean: dict[str, Any]
) -> Figure:
    """Draw means over the corruptions against severity, where 0 means clean images.

    Bars are 95 % intervals over images. The band spans the middle half of the corruptions, as
    trained.

    Args:
        group: A GROUP of shift.json.
        rows: The ROWs of its subsets.
        clean: The ROW of the clean images.
    """
    with style():
        figure = Figure(figsize=(9.6, 5.6), layout="constrained")
        severities = [0, *group["severities"]]
        for axes, (key, name) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
            for side, label, colour, dashes, marker in (
                ("before", "as trained", "blue", "-", "o"),
                ("after", "clean temperature", "vermillion", (0, (5, 2)), "s"),
            ):
                means = group[side]["by_severity"]
                y = [clean[side][key], *(means[str(s)][key] for s in group["severities"])]
                axes.plot(
                    severities, [np.nan if v is None else v for v in y], color=light(colour),
                    linestyle=dashes, marker=marker, markersize=5,
                    label=label if key == "accuracy" else "_",
                )  # fmt: skip
                sides = [clean[side], *(means[str(s)] for s in group["severities"])]
                _intervals(axes, severities, sides, key, light(colour))
            _middle_half(axes, group, rows, clean, key)
            axes.set(title=name, xticks=severities)
            percent_axes(axes, x=False)
            if key == "signed_gap":
                axes.axhline(0, color=light("muted"), linewidth=0.9)
        for axes in figure.axes[2:]:
            axes.set_xlabel("Severity (0: clean)")
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _intervals(
    axes: Axes, severities: list[int], sides: list[dict[str, Any]], key: str, colour: str
) -> None:
    """Draw a bar for each 95 % interval over images."""
    for x, side in zip(severities, sides, strict=True):
        ends = side["intervals"][key]
        if ends["low"] is not None:
            axes.plot([x, x], [ends["low"], ends["high"]], color=colour, linewidth=1.1)


def _middle_half(
    axes: Axes, group: dict[str, Any], rows: list[dict[str, Any]], clean: dict[str, Any], key: str
) -> None:
    """Draw a band over the middle half of the corruptions."""
    low, high = [clean["before"][key]], [clean["before"][key]]
    for severity in group["severities"]:
        values = [r["before"][key] for r in rows if r["severity"] == severity]
        if None in values or low[0] is None:
            return
        quartiles = np.quantile(values, (0.25, 0.75))
        low.append(quartiles[0])
        high.append(quartiles[1])
    axes.fill_between(
        [0, *group["severities"]], low, high, color=light("blue"), alpha=0.18, linewidth=0
    )


def draw_heat_map(
    group: dict[str, Any], rows: list[dict[str, Any]], key: str, side: str, title: str
) -> Figure:
    """Draw a metric for every corruption and severity, in per cent or points. Large values are
    dark.

    A signed metric is orange if positive and blue if negative, on one scale for both sides.

    Args:
        group: A GROUP of shift.json.
        rows: The ROWs of its subsets.
        key: The metric.
        side: `before` temperature scaling, or `after` it.
        title: The title.
    """
    corruptions, severities = group["corruptions"], group["severities"]
    values = {(r["corruption"], r["severity"]): r[side][key] for r in rows}
    signed = key == "signed_gap"
    sides = ("before", "after") if signed else (side,)
    known = [v for r in rows for s in sides if (v := r[s][key]) is not None]
    most = max((abs(v) for v in known), default=1.0) or 1.0
    least = 0.0 if signed else min(known, default=0.0)
    with style():
        figure = Figure(figsize=(4.5, 1.2 + 0.3 * len(corruptions)), layout="constrained")
        axes = figure.subplots()
        for y, corruption in enumerate(corruptions):
            for x, severity in enumerate(severities):
                value = values.get((corruption, severity))
                if value is None:
                    continue
                share = (abs(value) - least) / max(most - least, 1e-12)
                colour = heat(share, "vermillion" if signed and value > 0 else "blue")
                axes.add_patch(Rectangle((x, y), 0.96, 0.94, facecolor=light(colour)))
                text = f"{abs(100 * value):.0f}"
                sign = "" if not signed or text == "0" else "+" if value > 0 else MINUS
                axes.text(
                    x + 0.48, y + 0.49, sign + text, ha="center", va="center", fontsize=10.5,
                    color=light(text_on(colour)),
                )  # fmt: skip
        axes.set(xlim=(0, len(severities)), ylim=(len(corruptions), 0), title=title)
        axes.set_xlabel("Severity")
        axes.set_xticks(np.arange(len(severities)) + 0.48, [str(s) for s in severities])
        names = [c.replace("_", " ") for c in corruptions]
        axes.set_yticks(np.arange(len(corruptions)) + 0.48, names)
        axes.tick_params(length=0, labelsize=10.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        return figure
