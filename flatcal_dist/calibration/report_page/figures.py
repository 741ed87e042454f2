"""The figures of one report, drawn from what metrics.json holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from flatcal_dist.calibration.pages.drawing import PERCENT, Curve, faded_line, percent_axes, style
from flatcal_dist.calibration.pages.palette import heat, light, text_on
from flatcal_dist.calibration.report.model import Side
from flatcal_dist.calibration.report.parts import FilledBin, Histogram, SmoothCurve

HEAT = ("blue", "vermillion")  # the heat scales of right and of wrong answers
FEW_NEAR = 30  # images, below which the smooth line fades: its interval is then wider than 0.2
DIAGONAL: dict[str, Any] = {"color": light("muted"), "linewidth": 1, "linestyle": (0, (4, 3))}


def draw_reliability(side: Side, title: str) -> Figure:
    """Draw a reliability diagram, with the images by confidence below it.

    Bars show the accuracy of each bin and its gap to confidence. Bars of few images are fainter.
    Outlined boxes hold 95 % of the accuracies that a perfectly calibrated network would show. The
    line is the accuracy by a kernel instead of bins, and fades where few images lie. The band
    around the diagonal is what chance would allow this line.
    """
    with style():
        figure = Figure(figsize=(5.2, 6.5), layout="constrained")
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        filled = side.filled_bins()
        most = max(b.count for b in filled)
        for b in filled:
            _bar(top, b, strength=0.35 + 0.65 * np.sqrt(b.count / most))
        _smooth(top, side.smooth_curve)
        top.plot([0, 1], [0, 1], **DIAGONAL)
        top.set(ylim=(0, 1), ylabel="Accuracy", title=title)
        _counts(below, side.histogram)
        below.set(xlim=(0, 1), xlabel="Confidence")
        percent_axes(top, x=False)
        percent_axes(below, y=False)
        handles = [
            Patch(facecolor=light("blue"), alpha=0.8, label="accuracy"),
            Patch(facecolor=light("vermillion"), alpha=0.6, label="over-confident by"),
            Line2D([], [], color=light("ink"), linewidth=1.6, label="accuracy, smooth"),
            Patch(facecolor=light("green"), alpha=0.6, label="under-confident by"),
            Patch(facecolor="none", edgecolor=light("ink"), label="95 % if calibrated"),
            Patch(facecolor=light("band"), alpha=0.8, label="the same, smooth"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, columnspacing=1.2)
        return figure


def _bar(axes: Axes, b: FilledBin, strength: float) -> None:
    left, width = b.low + 0.004, b.high - b.low - 0.008
    colour = light("vermillion" if b.gap > 0 else "green")
    span: dict[str, Any] = {"width": width, "align": "edge"}
    # A gap below the accuracy is cut out of the bar, so that colours never mix.
    low, high = sorted((b.accuracy, b.mean_confidence))
    axes.bar(left, low, color=light("blue"), alpha=0.75 * strength, **span)
    axes.bar(left, high - low, bottom=low, color=colour, alpha=0.7 * strength, **span)
    ends = [left, left + width]
    axes.plot(ends, [b.accuracy] * 2, color=light("blue"), linewidth=2.4, solid_capstyle="butt")
    expected = b.calibrated_high - b.calibrated_low
    outline: dict[str, Any] = {"facecolor": "none", "edgecolor": light("ink"), "linewidth": 0.7}
    axes.bar(left, expected, bottom=b.calibrated_low, alpha=0.8 * strength, **outline, **span)


def _smooth(axes: Axes, curve: SmoothCurve) -> None:
    known = [i for i, v in enumerate(curve.accuracy) if v is not None]
    x, y, low, high = (
        np.array([getattr(curve, key)[i] for i in known])
        for key in ("confidence", "accuracy", "calibrated_low", "calibrated_high")
    )
    axes.fill_between(x, low, high, color=light("band"), alpha=0.55, linewidth=0)
    strength = density_strength([curve.images[i] for i in known])
    faded_line(axes, x, y, strength, color=light("paper"), linewidth=3.4)
    faded_line(axes, x, y, strength, color=light("ink"), linewidth=1.6)


def density_strength(images: Sequence[float]) -> list[float]:
    """Return the opacity of a smooth line where it rests on so many images.

    It is 1 from `FEW_NEAR` images on.
    """
    return [min(1.0, (n / FEW_NEAR) ** 2) for n in images]


def _square_root_axis(axes: Axes, most: float, least: float) -> None:
    """Set ticks for heights that are square roots of shares, which keep small groups visible.

    `least` is the smallest tick, as a share of the largest height `most`.
    """
    steps = [s for s in (0.001, 0.01, 0.05, 0.2, 0.5) if least * most < s <= 1.1 * most]
    ticks = np.sqrt([0.0, *steps])
    axes.yaxis.set_major_locator(FixedLocator([*-ticks[:0:-1], *ticks]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v * v:.3g} %"))


def _counts(axes: Axes, histogram: Histogram) -> None:
    """Draw the share of the images by confidence: correct images upwards, wrong ones downwards."""
    edges = np.array(histogram.edges)
    images = sum(histogram.correct) + sum(histogram.wrong)
    right, wrong = (np.sqrt(np.array(getattr(histogram, k)) / images) for k in ("correct", "wrong"))
    width, most = edges[1] - edges[0], max(right.max(), wrong.max())
    axes.bar(edges[:-1], right, width, align="edge", color=light("blue"), alpha=0.85)
    axes.bar(edges[:-1], -wrong, width, align="edge", color=light("vermillion"), alpha=0.85)
    axes.axhline(0, color=light("muted"), linewidth=0.8)
    axes.set_ylim(-1.1 * max(wrong.max(), 0.35 * most), 1.1 * max(right.max(), 0.35 * most))
    axes.set_ylabel("wrong │ correct (√)")
    _square_root_axis(axes, most**2, least=0.12)


def draw_confidence(side: Side, title: str) -> Figure:
    """Draw the distribution of confidence among correct and among wrong predictions.

    Each distribution sums to 1.
    """
    with style():
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.subplots()
        histogram = side.histogram
        groups = (("correct", "blue", "-"), ("wrong", "vermillion", (0, (4, 2))))
        most = max(
            _histogram(axes, histogram, name, light(colour), line)
            for name, colour, line in groups
            if sum(getattr(histogram, name))
        )
        axes.set(xlim=(0, 1), ylim=(0, 1.08 * np.sqrt(most)), xlabel="Confidence", title=title)
        axes.set_ylabel("Share of the group (√ scale)")
        percent_axes(axes, y=False)
        _square_root_axis(axes, most, least=0.02)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _histogram(axes: Axes, histogram: Histogram, name: str, colour: str, line: Any) -> float:
    """Draw one group and return the largest share of a bin."""
    count, mean = np.array(getattr(histogram, name)), getattr(histogram, f"mean_{name}")
    share = count / count.sum()
    label = f"{name}: {count.sum():,}, mean {100 * mean:.1f} %"
    axes.stairs(np.sqrt(share), histogram.edges, fill=True, color=colour, alpha=0.25)
    axes.stairs(
        np.sqrt(share), histogram.edges, color=colour, linewidth=1.4, linestyle=line, label=label
    )
    axes.axvline(mean, color=colour, linewidth=1.1, linestyle=(0, (1, 1.5)))
    return share.max()


def draw_risk_coverage(curves: Sequence[Curve], title: str, *, reference: bool) -> Figure:
    """Draw the risk among the most confident images against their share, one line per curve.

    The left panel shows all coverages. The right panel shows the most confident images on
    logarithmic scales.

    Args:
        curves: The curves.
        title: The title of the left panel.
        reference: Whether the curves belong to one run, before and after calibration. The oracle
            (every wrong image last) and a random order are then added.
    """
    with style():
        figure = Figure(figsize=(9.6, 4.4), layout="constrained")
        wide, near = figure.subplots(1, 2, width_ratios=(1.35, 1))
        error = max(1 - c.side.accuracy for c in curves)
        for axes in (wide, near):
            for i, c in enumerate(curves):
                line = c.side.risk_coverage
                dashes = (0, (5, 2)) if reference and i else c.dashes
                width = 1.9 if c.named else 1.0
                axes.plot(
                    line.coverage, line.risk, color=c.colour, linestyle=dashes,
                    linewidth=width, label=c.label if axes is wide else "_",
                )  # fmt: skip
            if reference:
                _risk_references(axes, error, named=axes is wide)
        # The first few images make any curve jump; the scale follows the rest.
        top = min(1.02, max(1.25 * error, 0.01))
        wide.set(xlim=(0, 1), ylim=(0, top), title=title)
        wide.set(xlabel="Coverage: share of the images answered", ylabel="Risk: share wrong")
        least = max(1e-4, min(_least_risk(c.side) for c in curves))
        near.set(xscale="log", title="The most confident images, logarithmic")
        if least < 1:  # a logarithm needs a risk
            near.set(yscale="log")
        near.set(xlim=(0.01, 1), ylim=(min(least, top / 2) / 1.5, top))
        near.set(xlabel="Coverage", ylabel="Risk")
        for axis in (near.xaxis, near.yaxis):
            axis.set_major_formatter(PERCENT)
            axis.set_minor_formatter(NullFormatter())
        percent_axes(wide)
        figure.legend(loc="outside lower center", ncols=4)
        return figure


def _least_risk(side: Side) -> float:
    """The least risk above 0 of the curve, from 1 % coverage on."""
    curve = side.risk_coverage
    points = zip(curve.coverage, curve.risk, strict=True)
    return min((r for c, r in points if r > 0 and c >= 0.01), default=1.0)


def _risk_references(axes: Axes, error: float, named: bool) -> None:
    coverage = np.geomspace(0.002, 1, 401)
    oracle = np.maximum(0, coverage - (1 - error)) / coverage
    grey: dict[str, Any] = {"color": light("muted"), "linewidth": 1.3, "zorder": 1}
    axes.plot(coverage, oracle, label="oracle" if named else "_", **grey)
    ends, label = ([0.002, 1], [error] * 2), "random" if named else "_"
    axes.plot(*ends, linestyle=(0, (1, 2)), label=label, **grey)


ENTROPIES = (
    ("mean_entropy", "all", "ink", "o"),
    ("mean_entropy_correct", "correct", "blue", "s"),
    ("mean_entropy_wrong", "wrong", "vermillion", "^"),
)
RATES = (
    ("accuracy", "accuracy", "ink", "o"),
    ("auroc", "AUROC", "green", "D"),
    ("ece", "ECE", "purple", "v"),
)


def draw_confusions(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Draw the share of each class's images by answer, in per cent."""
    counts = np.array(matrix)
    k, total = len(counts), np.maximum(counts.sum(axis=1, keepdims=True), 1)
    share = counts / total
    wrong = share * (1 - np.eye(k))
    most = max(wrong.max(), 1e-12)
    with style():
        side = 1.6 + 0.34 * k
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        for y in range(k):
            for x in range(k):
                right = x == y
                name = heat(share[y, x] if right else wrong[y, x] / most, HEAT[not right])
                axes.add_patch(Rectangle((x, y), 0.96, 0.94, facecolor=light(name)))
                if counts[y, x]:
                    axes.text(
                        x + 0.48, y + 0.49, f"{100 * share[y, x]:.0f}", ha="center", va="center",
                        fontsize=9, color=light(text_on(name)),
                    )  # fmt: skip
        axes.set(xlim=(0, k), ylim=(k, 0), xlabel="Answer", ylabel="Class")
        at, labels = np.arange(k) + 0.48, ["\u200b" + n.replace("$", r"\$") for n in names]
        axes.set_xticks(at, labels, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(at, labels)
        axes.set_title("Answers by class, per cent of the class")
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        return figure


def draw_training(curves: dict[str, list[Any]]) -> Figure:
    """Draw figures by epoch: the entropy of predictions, if it was logged, and rates."""
    panels = [
        (lines, title)
        for lines, title in ((ENTROPIES, "Entropy of predictions, nats"), (RATES, "Rates"))
        if any(key in curves for key, *_ in lines)
    ]
    with style():
        figure = Figure(figsize=(4.8 * max(1, len(panels)), 3.8), layout="constrained")
        for axes, (lines, title) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for key, label, colour, marker in lines:
                if key in curves:
                    y = [np.nan if v is None else v for v in curves[key]]
                    axes.plot(
                        curves["epoch"], y, color=light(colour), marker=marker, markersize=4.5,
                        linewidth=1.5, label=label,
                    )  # fmt: skip
            axes.set(title=title, xlabel="Epoch")
            axes.set_ylim(bottom=0)
            if lines is RATES:
                axes.set_ylim(0, 1)
                percent_axes(axes, x=False)
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.36), ncols=3)
        return figure
