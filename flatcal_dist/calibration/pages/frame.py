"""The frame that all pages share: templates, theme colours, how values are printed."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from flatcal_dist.calibration.confidence.sources import SCORES
from flatcal_dist.calibration.metrics import entries
from flatcal_dist.calibration.pages import display, drawing
from flatcal_dist.calibration.pages.palette import PALETTE


def render(template: str, **values: Any) -> str:
    """Render templates/<template> into a page that needs no other file."""
    html = _environment().get_template(template).render(**values)
    return re.sub(r"(?<=\d) %", "\u00a0%", html)  # no line ends between a number and its unit


@cache
def _environment() -> Environment:
    """The templates, with what all of them use. It keeps them compiled."""
    environment = Environment(
        loader=PackageLoader("flatcal_dist.calibration", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": display.percent, "number": display.number}
    environment.globals |= {
        "palette": PALETTE,
        "show": display.show,
        "show_interval": display.show_interval,
        "show_difference": display.show_difference,
        "between": display.between,
        "duration": display.duration,
        "enumerate_names": display.enumerate_names,
        "groups": entries.GROUPS,
        "metric": entries.METRICS,
        "score_names": {score.key: score.name for score in SCORES},
        "PERCENT": display.PERCENT,
        "POINTS": display.POINTS,
        "GAP": display.GAP,
    }
    return environment


def figure(drawn: Figure, folder: Path, name: str, title: str, description: str) -> Markup:
    """Save a figure as folder/name.png, .svg and .pdf, and return it for the page.

    Texts in the SVG are escaped, so that it is safe as it is.

    Args:
        drawn: The figure.
        folder: The folder of the figures.
        name: The name of the files without a suffix.
        title: The title, for readers who do not see the figure.
        description: The description, for the same readers.
    """
    svg = drawing.save_figure(drawn, folder, name)
    return Markup(drawing.inline_svg(svg, f"figure-{name.replace('_', '-')}", title, description))
