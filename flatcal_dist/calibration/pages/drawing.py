"""Drawing without pyplot and without a change of matplotlib's settings, and SVG for pages."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.pages.palette import PALETTE, SERIES, light
from flatcal_dist.calibration.report.model import Side
from flatcal_dist.files import write_atomically

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
    "pdf.fonttype": 3,  # searchable text; TrueType (42) would take half of a report's time
    "svg.hashsalt": "flatcal",
    "savefig.dpi": 200,
}
UNDATED = {"CreationDate": None, "Creator": None, "Producer": None}
PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g} %".replace("-", "−"))
FADES = 8  # steps of opacity
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plain(name: str) -> str:
    """Return a name for matplotlib, in which `$` and a leading underscore have no meaning."""
    return "\u200b" + name.replace("$", r"\$")


@dataclass(frozen=True)
class Curve:
    """One line of an overlay, with its name, colour, dashes and marker.

    Lines of one series, such as the seeds of a method, share all of these, and only the first line
    is named. Series never differ by colour alone: they differ in marker, and in dashes where
    colours repeat.

    Args:
        name: The name.
        side: The figures that are drawn.
        series: The number of the series.
        named: Whether the legend names the line.
    """

    name: str
    side: Side
    series: int = 0
    named: bool = True

    @property
    def label(self) -> str:
        """The name for matplotlib, so that `$` and a leading underscore have no meaning."""
        return plain(self.name) if self.named else "_"

    @property
    def colour(self) -> str:
        """The colour of the line."""
        return light(SERIES[self.series % len(SERIES)])

    @property
    def marker(self) -> str:
        """The marker of the line."""
        return MARKERS[self.series % len(MARKERS)]

    @property
    def dashes(self) -> Any:
        """The line style, in one of the forms that matplotlib takes."""
        return DASHES[self.series // len(SERIES) % len(DASHES)]


def save_figure(figure: Figure, folder: Path, name: str) -> str:
    """Write folder/name.png, .svg and .pdf, and return the text of the SVG.

    Each file appears whole or not at all.

    Args:
        figure: The figure.
        folder: The folder, which is made if it is missing.
        name: The name of the files without a suffix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The first drawing lays the figure out, and the others use this layout. `savefig` draws twice.
    formats = {
        ".png": lambda file: FigureCanvasAgg(figure).print_png(file, metadata={"Software": None}),
        ".svg": lambda file: FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None}),
        ".pdf": lambda file: FigureCanvasPdf(figure).print_pdf(file, metadata=UNDATED),
    }
    with style():
        figure.set_dpi(mpl.rcParams["savefig.dpi"])
        for suffix, save in formats.items():
            with write_atomically(folder / f"{name}{suffix}") as temporary:
                save(temporary)
            figure.set_layout_engine("none")
    return (folder / f"{name}.svg").read_text(encoding="utf-8")


def inline_svg(svg: str, name: str, title: str, description: str) -> str:
    """Return an SVG for a page: in theme colours, with unique ids and without outside references.

    Args:
        svg: The text that matplotlib wrote.
        name: What its ids begin with.
        title: The title, for readers who do not see the figure.
        description: The description, for the same readers.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for key, colour in PALETTE.items():
        svg = svg.replace(colour.light, f"var(--{key})")
    # Text has the typeface of the page. Sizes and anchors stay.
    svg = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    labelled = f'<svg role="img" aria-labelledby="{name}-title {name}-description"'
    text = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-description">'
    svg = svg.replace("<svg", labelled, 1)
    return svg.replace(">", f">{text}{escape(description)}</desc>", 1)


@contextmanager
def style() -> Iterator[None]:
    """Apply the style of this package to matplotlib's defaults, and not to the user's settings."""
    defaults = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")}
    settings: dict[Any, Any] = {**defaults, **STYLE}  # newer matplotlib lists all keys in its types
    with mpl.rc_context(settings):
        yield


def faded_line(
    axes: Axes,
    x: Sequence[float] | FloatArray,
    y: Sequence[float] | FloatArray,
    strength: Sequence[float],
    **style: Any,
) -> None:
    """Draw a line whose opacity varies, with each stretch of about equal strength as one path.

    Args:
        axes: Where the line is drawn.
        x: The x coordinates [P].
        y: The y coordinates [P].
        strength: The opacity at each point [P], 0 to 1.
        **style: What `Axes.plot` takes.
    """
    steps = [round(FADES * min(1.0, s)) for s in strength]
    start = 0
    for end in range(1, len(x)):
        last = end == len(x) - 1
        if last or steps[end] != steps[start]:
            alpha = max(steps[start], 0) / FADES
            axes.plot(x[start : end + 1], y[start : end + 1], alpha=alpha, **style)
            start = end


def percent_axes(axes: Axes, *, x: bool = True, y: bool = True) -> None:
    """Print the shares on the axes in per cent. An axis from 0 to 1 has a tick every 20 %.

    Args:
        axes: The axes.
        x: Whether the x axis shows shares.
        y: Whether the y axis shows shares.
    """
    if x:
        axes.xaxis.set_major_formatter(PERCENT)
        if tuple(axes.get_xlim()) == (0, 1):
            axes.xaxis.set_major_locator(MultipleLocator(0.2))
    if y:
        axes.yaxis.set_major_formatter(PERCENT)
