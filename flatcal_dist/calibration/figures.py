"""The figures of the report, drawn without pyplot and without touching matplotlib's settings."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator

from flatcal_dist.files import write_atomically

from .checks import FloatArray
from .palette import PALETTE, SERIES, light
from .records import Scores

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": light("band"),
    "axes.labelcolor": light("muted"),
    "axes.titlecolor": light("ink"),
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": light("rule"),
    "grid.linewidth": 0.6,
    "text.color": light("ink"),
    "xtick.color": light("band"),
    "ytick.color": light("band"),
    "xtick.labelcolor": light("muted"),
    "ytick.labelcolor": light("muted"),
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "figure.facecolor": light("paper"),
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "flatcal",
    "savefig.dpi": 200,
}
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %")
HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class Curve:
    """One line of an overlay: its side of `metrics.json`, its name and colour.

    Lines of one series (the seeds of a method) share colour and name; only the first is named.
    """

    name: str
    side: dict[str, Any]
    series: int = 0
    named: bool = True

    @property
    def label(self) -> str:
        """The name as matplotlib prints it: no mathematics, no hiding of a leading underscore."""
        return "\u200b" + self.name.replace("$", r"\$") if self.named else "_"

    @property
    def colour(self) -> str:
        return light(SERIES[self.series % len(SERIES)])


def save_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write folder/name.png and .svg, each whole or not at all; return the SVG text."""
    folder.mkdir(parents=True, exist_ok=True)
    with _style():
        FigureCanvasAgg(figure)
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            with write_atomically(folder / f"{name}{suffix}") as temporary:
                figure.savefig(temporary, metadata=metadata)
            figure.set_layout_engine("none")  # laid out once; the second format takes the same
    return (folder / f"{name}.svg").read_text(encoding="utf-8")


def inline_svg(svg: str, name: str, title: str, description: str) -> str:
    """The SVG for a page: theme colours, ids of its own, a title, no outside references."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for key, colour in PALETTE.items():
        svg = svg.replace(colour.light, f"var(--{key})")
    # Text takes the page's typeface; sizes and anchors stay.
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    labelled = f'<svg role="img" aria-labelledby="{name}-title {name}-description"'
    text = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">'
    svg = svg.replace("<svg", labelled, 1)
    return svg.replace(">", f">{text}{escape(description)}</desc>", 1)


def _style() -> Any:
    """Settings of our own, from matplotlib's defaults and not from the user's file."""
    defaults = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")}
    return mpl.rc_context({**defaults, **STYLE})


def draw_reliability(side: dict[str, Any], scores: Scores, title: str) -> Figure:
    """Reliability diagram: accuracy per bin, its gap to confidence, and what chance would allow.

    Bars are fainter the fewer images they hold; the outlined boxes hold 95 % of the accuracies
    that a perfectly calibrated network would show. Beneath: the images by confidence.
    """
    with _style():
        figure = Figure(figsize=(5.2, 6.3), layout="constrained")
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        filled = [b for b in side["bins"] if b["count"]]
        most = max(b["count"] for b in filled)
        for b in filled:
            _bar(top, b, strength=0.4 + 0.6 * np.sqrt(b["count"] / most))
        top.plot([0, 1], [0, 1], color=light("muted"), linewidth=1, linestyle=(0, (4, 3)))
        top.set(ylim=(0, 1), ylabel="Accuracy", title=title)
        top.yaxis.set_major_formatter(PERCENT)
        _counts(below, scores)
        below.set(xlim=(0, 1), xlabel="Confidence")
        below.xaxis.set_major_formatter(PERCENT)
        below.xaxis.set_major_locator(MultipleLocator(0.2))
        handles = [
            Patch(facecolor=light("blue"), alpha=0.8, label="accuracy"),
            Patch(facecolor=light("vermillion"), alpha=0.6, label="over-confident by"),
            Patch(facecolor="none", edgecolor=light("ink"), label="95 % if calibrated"),
            Patch(facecolor=light("green"), alpha=0.6, label="under-confident by"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return figure


def _bar(axes: Axes, b: dict[str, Any], strength: float) -> None:
    left, width = b["low"] + 0.004, b["high"] - b["low"] - 0.008
    gap = b["mean_confidence"] - b["accuracy"]
    colour = light("vermillion" if gap > 0 else "green")
    span = {"width": width, "align": "edge"}
    # A gap below the accuracy is cut out of the bar, so that colours never mix.
    low, high = sorted((b["accuracy"], b["mean_confidence"]))
    axes.bar(left, low, color=light("blue"), alpha=0.85 * strength, **span)
    axes.bar(left, high - low, bottom=low, color=colour, alpha=0.7 * strength, **span)
    ends = [left, left + width]
    axes.plot(ends, [b["accuracy"]] * 2, color=light("blue"), linewidth=2.4, solid_capstyle="butt")
    expected = b["calibrated_high"] - b["calibrated_low"]
    outline = {"facecolor": "none", "edgecolor": light("ink"), "linewidth": 0.9}
    axes.bar(left, expected, bottom=b["calibrated_low"], alpha=strength, **outline, **span)


def _square_root_axis(axes: Axes, most: float, least: float) -> None:
    """Ticks for heights drawn as square roots of shares, which keep small groups visible.

    least: the smallest tick, as a share of the largest height `most`.
    """
    steps = [s for s in (0.001, 0.01, 0.05, 0.2, 0.5) if least * most < s <= 1.1 * most]
    ticks = np.sqrt([0.0, *steps])
    axes.yaxis.set_major_locator(FixedLocator([*-ticks[:0:-1], *ticks]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v * v:.3g} %"))


def _counts(axes: Axes, scores: Scores) -> None:
    """Share of the images by confidence: correct ones upwards, wrong ones downwards."""
    confidence, correct = scores.confidence, scores.correct
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    right, wrong = (
        np.sqrt(np.histogram(confidence[chosen], edges)[0] / len(correct))
        for chosen in (correct, ~correct)
    )
    width, most = edges[1] - edges[0], max(right.max(), wrong.max())
    axes.bar(edges[:-1], right, width, align="edge", color=light("blue"), alpha=0.85)
    axes.bar(edges[:-1], -wrong, width, align="edge", color=light("vermillion"), alpha=0.85)
    axes.axhline(0, color=light("muted"), linewidth=0.8)
    axes.set_ylim(-1.1 * max(wrong.max(), 0.35 * most), 1.1 * max(right.max(), 0.35 * most))
    axes.set_ylabel("Images (√ scale)")
    _square_root_axis(axes, most**2, least=0.12)
    place = {"transform": axes.transAxes, "fontsize": 9.5}
    axes.text(0.015, 0.95, "correct", color=light("blue"), va="top", **place)
    axes.text(0.015, 0.03, "wrong", color=light("vermillion"), va="bottom", **place)


def draw_confidence(scores: Scores, title: str) -> Figure:
    """Distribution of confidence among correct and among wrong predictions, each summing to 1."""
    with _style():
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.subplots()
        confidence, correct = scores.confidence, scores.correct
        groups = ((correct, "correct", "blue"), (~correct, "wrong", "vermillion"))
        most = max(
            _histogram(axes, confidence[chosen], name, light(colour))
            for chosen, name, colour in groups
            if chosen.any()
        )
        axes.set(xlim=(0, 1), ylim=(0, 1.08 * np.sqrt(most)), xlabel="Confidence", title=title)
        axes.set_ylabel("Share of the group (√ scale)")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.xaxis.set_major_locator(MultipleLocator(0.2))
        _square_root_axis(axes, most, least=0.02)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _histogram(axes: Axes, values: FloatArray, name: str, colour: str) -> float:
    """Draw one group; return the largest share of a bin."""
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    share = np.histogram(values, edges)[0] / len(values)
    label = f"{name}: {len(values):,}, mean {100 * values.mean():.1f} %"
    axes.stairs(np.sqrt(share), edges, fill=True, color=colour, alpha=0.28)
    axes.stairs(np.sqrt(share), edges, color=colour, linewidth=1.4, label=label)
    axes.axvline(values.mean(), color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
    return share.max()


def draw_risk_coverage(curves: Sequence[Curve], title: str, *, reference: bool) -> Figure:
    """Risk among the most confident images against their share, one line per curve.

    reference: the curves belong to one run, before and after calibration; add the oracle (every
    wrong image last) and random order.
    """
    with _style():
        figure = Figure(figsize=(6.4, 4.5), layout="constrained")
        axes = figure.subplots()
        error = max(1 - c.side["accuracy"] for c in curves)
        for i, c in enumerate(curves):
            line = c.side["risk_coverage"]
            axes.plot(
                line["coverage"],
                line["risk"],
                color=c.colour,
                linestyle=(0, (5, 2)) if reference and i else "-",
                label=c.label,
            )
        if reference:
            coverage = np.linspace(0, 1, 401)[1:]
            oracle = np.maximum(0, coverage - (1 - error)) / coverage
            grey = {"color": light("muted"), "linewidth": 1.3}
            axes.plot(coverage, oracle, label="oracle", zorder=1, **grey)
            axes.plot([0, 1], [error, error], ls=(0, (1, 2)), label="random", zorder=1, **grey)
        # The first few images make any curve jump; the scale follows the rest.
        axes.set(xlim=(0, 1), ylim=(0, min(1.02, max(1.25 * error, 0.01))), title=title)
        axes.set(xlabel="Coverage: share of the images answered", ylabel="Risk: share wrong")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        figure.legend(loc="outside lower center", ncols=2 if reference else 3)
        return figure


def draw_reliability_overlay(curves: Sequence[Curve], title: str) -> Figure:
    """Accuracy against mean confidence per bin, one line per run; larger dots hold more images."""
    with _style():
        figure = Figure(figsize=(5.6, 5.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=light("muted"), linewidth=1, linestyle=(0, (4, 3)))
        for c in curves:
            filled = [b for b in c.side["bins"] if b["count"]]
            x, y = ([b[key] for b in filled] for key in ("mean_confidence", "accuracy"))
            share = np.array([b["count"] for b in filled]) / sum(b["count"] for b in filled)
            axes.plot(x, y, color=c.colour, linewidth=1.2, alpha=0.6)
            axes.scatter(x, y, s=6 + 160 * share, color=c.colour, alpha=0.85, label=c.label)
        axes.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="Confidence", ylabel="Accuracy")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        legend = figure.legend(loc="outside lower center", ncols=3)
        for handle in legend.legend_handles:
            handle.set_sizes([36])
        return figure


def draw_accuracy_ece(curves: Sequence[Curve], title: str) -> Figure:
    """ECE against accuracy, one dot per run, with the accuracy's interval and the null of ECE."""
    with _style():
        figure = Figure(figsize=(5.6, 5.2), layout="constrained")
        axes = figure.subplots()
        for c in curves:
            x, y, limits = c.side["accuracy"], c.side["ece"], c.side["intervals"]["accuracy"]
            if limits["low"] is not None:
                ends = [limits["low"], limits["high"]]
                axes.plot(ends, [y, y], color=c.colour, linewidth=1, alpha=0.6)
            axes.scatter([x], [y], s=54, color=c.colour, zorder=3, label=c.label)
            chance = c.side["ece_null"]["quantile_95"]
            axes.plot([x, x], [0, chance], color=light("band"), linewidth=3, zorder=1)
        axes.set(title=title, xlabel="Accuracy (95 % interval)", ylabel="ECE")
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.locator_params(axis="x", nbins=5)
        figure.legend(loc="outside lower center", ncols=3)
        return figure
