"""Figures of several runs together. Runs of one method share colour, marker and name."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.calibration.pages.drawing import Curve, faded_line, percent_axes, style
from flatcal_dist.calibration.pages.palette import light
from flatcal_dist.calibration.report_page.figures import DIAGONAL, density_strength


def draw_reliability_overlay(curves: Sequence[Curve], title: str) -> Figure:
    """Draw accuracy against confidence by a kernel, one line per run.

    A line fades where images are few.
    """
    with style():
        figure = Figure(figsize=(4.6, 4.7), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], **DIAGONAL)
        for c in curves:
            curve = c.side.smooth_curve
            known = [i for i, v in enumerate(curve.accuracy) if v is not None]
            x, y = ([getattr(curve, key)[i] for i in known] for key in ("confidence", "accuracy"))
            strength = density_strength([curve.images[i] for i in known])
            width = 1.7 if c.named else 1.0
            faded_line(axes, x, y, strength, color=c.colour, linestyle=c.dashes, linewidth=width)
            strong = [i for i in range(0, len(x), 12) if strength[i] == 1]
            marks = ([x[i] for i in strong], [y[i] for i in strong])
            axes.plot(*marks, color=c.colour, marker=c.marker, markersize=5, linestyle="none")
            axes.plot(
                [], [], color=c.colour, label=c.label, linestyle=c.dashes, linewidth=width,
                marker=c.marker, markersize=5,
            )  # fmt: skip
        axes.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="Confidence", ylabel="Accuracy")
        percent_axes(axes)
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def draw_scatter(curves: Sequence[Curve], key: str, title: str) -> Figure:
    """Draw a metric against accuracy, with a mark per run and a cross at the mean of a method.

    Bars are 95 % intervals over images. For ECE, a grey bar ends where a perfectly calibrated
    network would stay below in 95 % of draws.

    Args:
        curves: The runs.
        key: The metric.
        title: The title.
    """
    metric = METRICS[key]
    with style():
        figure = Figure(figsize=(4.6, 4.7), layout="constrained")
        axes = figure.subplots()
        for c in curves:
            x, y = c.side.accuracy, _value(c, key)
            for name, along in (("accuracy", "x"), (key, "y")):
                ends = c.side.interval(name)
                if ends.ends is not None:
                    span = list(ends.ends)
                    place = (span, [y, y]) if along == "x" else ([x, x], span)
                    axes.plot(*place, color=c.colour, linewidth=0.9, alpha=0.5)
            axes.scatter([x], [y], s=46, color=c.colour, marker=c.marker, zorder=3, label=c.label)
            if key == "ece":
                chance = c.side.ece_null.quantile_95
                axes.plot([x, x], [0, chance], color=light("band"), linewidth=3, zorder=1)
        for series in {c.series for c in curves}:
            members = [c for c in curves if c.series == series]
            if len(members) > 1:
                x, y = (
                    float(np.mean([_value(m, name) for m in members])) for name in ("accuracy", key)
                )
                axes.scatter(
                    [x], [y], s=190, color=members[0].colour, marker="+", linewidth=2.2, zorder=4
                )
        axes.set(title=title, xlabel="Accuracy", ylabel=metric.name)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        percent_axes(axes, y=metric.unit.suffix == " %")
        if metric.unit.factor == 1000:
            axes.yaxis.set_major_formatter(lambda v, _: f"{1000 * v:g}")
        axes.locator_params(axis="x", nbins=5)
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def _value(curve: Curve, key: str) -> float:
    """A metric, as NaN where it is undefined, which is not drawn."""
    value = curve.side.value(key)
    return np.nan if value is None else value
