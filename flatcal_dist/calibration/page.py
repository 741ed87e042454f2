"""The frame that all pages share: templates, theme colours, how values are printed."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from . import display
from .palette import PALETTE


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
        "arrows": display.ARROWS,
        "groups": display.GROUPS,
        "duration": display.duration,
    }
    return environment.get_template(template).render(**values)


def figure(svg: str) -> Markup:
    """Mark an inlined SVG, whose texts were escaped when it was made, as safe."""
    return Markup(svg)
