"""Figures of a study: calibration against failure prediction, and figures over the epochs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.pages.drawing import DASHES, MARKERS, percent_axes, plain, style
from flatcal_dist.calibration.pages.palette import SERIES, light
from flatcal_dist.studies.panels import Arm, Panel
from flatcal_dist.studies.trade import Trade

OVER_EPOCHS = ("accuracy", "ece", "aurc")
FEWEST_EPOCHS = 3  # validated epochs that make a curve


def look(series: int) -> dict[str, Any]:
    """Return colour, marker and dashes of the arm of this number. No two of 24 look the same."""
    return {
        "color": light(SERIES[series % len(SERIES)]),
        "marker": MARKERS[(series + series // len(SERIES)) % len(MARKERS)],
        "linestyle": DASHES[series // len(SERIES) % len(DASHES)],
    }


def draw_trade(found: Sequence[Trade]) -> Figure:
    """Draw the change in AURC and AUROC against the change in ECE, from the baseline."""
    with style():
        figure = Figure(figsize=(9.6, 5.2), layout="constrained")
        names = list(dict.fromkeys(trade.arm.name for trade in found))
        for axes, key in zip(figure.subplots(1, 2), ("aurc", "auroc"), strict=True):
            axes.axhline(0, color=light("muted"), linewidth=0.9)
            axes.axvline(0, color=light("muted"), linewidth=0.9)
            for trade in found:
                drawn = look(names.index(trade.arm.name)) | {"linestyle": "none"}
                first = trade is next(t for t in found if t.arm.name == trade.arm.name)
                label = plain(trade.arm.name) if first and key == "aurc" else "_"
                x, y = (trade.differences[k]["value"] for k in ("ece", key))
                axes.plot([x], [y], markersize=7, label=label, **drawn)
            axes.set_title("Lower left is best" if key == "aurc" else "Upper left is best")
            axes.set(xlabel=_change(axes.xaxis, "ece"), ylabel=_change(axes.yaxis, key))
            axes.locator_params(axis="x", nbins=5)
        figure.legend(loc="outside lower center", ncols=4)
        return figure


def _change(axis: Axis, key: str) -> str:
    """Print the differences of a metric in its unit along an axis, and return its label."""
    metric = METRICS[key]
    factor = metric.unit.factor
    axis.set_major_formatter(
        lambda v, _: f"{factor * v:+.4g}".replace("-", "−") if abs(factor * v) > 1e-6 else "0"
    )
    return f"Change in {metric.name}" + (", points" if metric.unit.factor == 100 else "")


def draw_epochs(panel: Panel) -> Figure | None:
    """Draw accuracy, ECE and AURC of the validation images over the epochs, means over seeds.

    None if no arm was validated in `FEWEST_EPOCHS` epochs.
    """
    curves = {i: mean_curves(arm) for i, arm in enumerate(panel.arms)}
    curves = {i: c for i, c in curves.items() if len(c.get("epoch", ())) >= FEWEST_EPOCHS}
    if not curves:
        return None
    with style():
        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(OVER_EPOCHS)), OVER_EPOCHS, strict=True):
            for i, found in curves.items():
                if key in found:
                    label = plain(panel.arms[i].name) if key == "accuracy" else "_"
                    drawn = look(i) | {"markersize": 4, "linewidth": 1.4}
                    every = max(1, len(found["epoch"]) // 6)
                    axes.plot(found["epoch"], found[key], label=label, markevery=every, **drawn)
            _units(axes, key)
        figure.legend(loc="outside lower center", ncols=5)
        return figure


def _units(axes: Axes, key: str) -> None:
    metric = METRICS[key]
    axes.set(title=metric.name, xlabel="Epoch")
    percent_axes(axes, x=False, y=metric.unit.suffix == " %")
    if metric.unit.factor == 1000:
        axes.yaxis.set_major_formatter(lambda v, _: f"{1000 * v:g}")


def mean_curves(arm: Arm) -> dict[str, list[float]]:
    """Return the mean over seeds of each figure, for the epochs that all seeds validated."""
    each = [result.curves for result in arm.results if result.curves is not None]
    if not each:
        return {}
    epochs = sorted(set.intersection(*(set(curves["epoch"]) for curves in each)))
    found: dict[str, list[float]] = {"epoch": epochs}
    for key in OVER_EPOCHS:
        if all(key in curves for curves in each):
            columns = [dict(zip(c["epoch"], c[key], strict=True)) for c in each]
            values = [[np.nan if c[e] is None else c[e] for c in columns] for e in epochs]
            found[key] = [float(np.mean(row)) for row in values]
    return found
