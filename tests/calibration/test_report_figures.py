"""What the figures of a report draw."""

import numpy as np
import pytest

from flatcal_dist.calibration.comparison.figures import draw_reliability_overlay
from flatcal_dist.calibration.pages.drawing import Curve
from flatcal_dist.calibration.pages.palette import light
from flatcal_dist.calibration.report import curves
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.report_page import figures
from flatcal_dist.calibration.report_page.figures import density_strength
from tests.support.synthetic import make_records


def test_the_smooth_line_fades_with_the_images_it_rests_on() -> None:
    random = np.random.default_rng(0)
    c = np.concatenate([random.uniform(0.8, 1, 2000), [0.1, 0.12, 0.15]])
    found = curves.smooth_reliability(c, random.random(len(c)) < c, 0.05)
    images = dict(zip(np.round(found["confidence"], 2), found["images"], strict=True))
    assert images[0.1] < 4
    assert images[0.9] > 500
    # Equal weights: the number itself.
    one_place = curves.smooth_reliability(np.full(50, 0.5), np.ones(50, bool), 0.05)
    assert one_place["images"] == pytest.approx([50] * len(one_place["images"]), rel=1e-6)
    strength = density_strength([1, 15, 30, 1000])
    assert strength == pytest.approx([1 / 900, 0.25, 1, 1])


@pytest.mark.parametrize("place", ["report", "comparison"])
def test_the_figure_draws_the_smooth_line_faded(place: str) -> None:
    side = summarize(make_records(100), resamples=2)
    if place == "report":
        colour, width, drawn = light("ink"), 1.6, figures.draw_reliability(side, "x")
    else:
        curve = Curve("x", side)
        colour, width, drawn = curve.colour, 1.7, draw_reliability_overlay([curve], "x")
    lines = [
        line for line in drawn.axes[0].lines
        if (line.get_color(), line.get_linewidth()) == (colour, width) and len(line.get_xdata())
    ]  # fmt: skip
    images = dict(zip(side.smooth_curve.confidence, side.smooth_curve.images, strict=True))
    alpha = {x: line.get_alpha() for line in lines for x in line.get_xdata()[:-1]}
    assert len(alpha) == len(images) - 1
    assert min(alpha.values()) < 0.1
    assert max(alpha.values()) == 1
    for x, opacity in alpha.items():
        assert opacity == pytest.approx(min(1, (images[x] / 30) ** 2), abs=0.07)
