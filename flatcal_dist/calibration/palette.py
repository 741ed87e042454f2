"""The colours of figures and pages, in a light and a dark theme.

Figures are drawn in the light colours; a page replaces each by its CSS variable, so that inlined
figures follow the theme. The hues are those of Okabe and Ito, Color Universal Design (2008),
lightened for the dark theme. Every light colour must be unique: it stands for its name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    light: str
    dark: str


PALETTE = {
    "paper": Colour("#fffffe", "#15181d"),
    "ink": Colour("#1b2129", "#e8eaed"),
    "muted": Colour("#5a6472", "#a2acb9"),
    "rule": Colour("#d9dde3", "#343a44"),
    "band": Colour("#c3c9d2", "#4b535f"),
    "blue": Colour("#0072b2", "#56acdf"),
    "vermillion": Colour("#d55e00", "#f58a45"),
    "green": Colour("#008f69", "#3cc49b"),
    "purple": Colour("#b5548a", "#e090bd"),
    "amber": Colour("#b97d00", "#e6b450"),
    "sky": Colour("#3a9bd0", "#8accf2"),
}
SERIES = ("blue", "vermillion", "green", "purple", "amber", "sky")


def light(name: str) -> str:
    """The colour a figure is drawn in."""
    return PALETTE[name].light
