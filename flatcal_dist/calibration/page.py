"""The frame that all pages share: templates, theme colours, how values are printed."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from . import display
from .palette import PALETTE
from .statistics import Interval


def render(template: str, **values: Any) -> str:
    """Render templates/<template> into one self-contained page."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
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
        "between": _between,
        "arrows": display.ARROWS,
        "groups": display.GROUPS,
        "duration": display.duration,
    }
    html = environment.get_template(template).render(**values)
    return re.sub(r"(?<=\d) %", "\u00a0%", html)  # no line ends between a number and its unit


def _between(limits: dict[str, Any], unit: display.Unit, sign: bool = False) -> str | None:
    """The interval of a JSON object with `low` and `high`."""
    interval = Interval(None, limits["low"], limits["high"])
    return display.show_interval(interval, unit, sign=sign)


def figure(svg: str) -> Markup:
    """Mark an inlined SVG, whose texts were escaped when it was made, as safe."""
    return Markup(svg)
