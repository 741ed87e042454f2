"""The colours of figures and pages, in a light and a dark theme.

Figures are drawn in the light colours. A page replaces each light colour by its CSS variable, so
that figures on the page follow the theme. The hues are those of Okabe and Ito, Color Universal
Design (2008), lightened for the dark theme. Every light colour must be unique, because it stands
for its name.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """A colour in both themes, as `#rrggbb`."""

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
STEPS = 6  # the steps of a heat scale, beside the paper, which stands for nothing


def _mix(share: float, low: str, high: str) -> str:
    ends = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (low, high)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def _heat(name: str) -> dict[str, Colour]:
    """Steps from the paper towards a colour. Text can be read on all of them."""
    paper, full = PALETTE["paper"], PALETTE[name]
    return {
        f"{name}-{step}": Colour(
            _mix(0.68 * step / STEPS, paper.light, full.light),
            _mix(0.55 * step / STEPS, paper.dark, full.dark),
        )
        for step in range(1, STEPS + 1)
    }


PALETTE |= _heat("vermillion") | _heat("blue")
SERIES = ("blue", "vermillion", "green", "purple", "amber", "sky")


def light(name: str) -> str:
    """Return the colour of this name in which figures are drawn."""
    return PALETTE[name].light


def heat(share: float, name: str) -> str:
    """Return the colour of a share of 0 to 1 on the heat scale `vermillion` or `blue`."""
    step = min(STEPS, max(0, round(STEPS * share)))
    return f"{name}-{step}" if step else "paper"


def text_on(name: str) -> str:
    """Return the colour, `ink` or `paper`, in which text on this colour can be read best.

    The two are compared by the contrast in the theme where it is lower.
    """
    ground = PALETTE[name]

    def least(text: str) -> float:
        colour = PALETTE[text]
        return min(contrast(colour.light, ground.light), contrast(colour.dark, ground.dark))

    return max(("ink", "paper"), key=least)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, 1 to 21. Source: WCAG 2.2, section 1.4.3."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
