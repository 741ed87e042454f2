"""Reports without drawing and with few resamples, for tests that are about something else.

A report of 400 images takes six seconds: 1,000 resamples and six figures, each in three formats.
With ten classes, matrices take ten more. `tests/calibration/test_report.py`, test_report_figures.py
and the tests in a browser draw figures, and tests/calibration/test_post_hoc.py fits matrices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from flatcal_dist.calibration.after_training import post_hoc
from flatcal_dist.calibration.comparison.writing import write_comparison
from flatcal_dist.calibration.pages import drawing
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.report.writing import write_report
from flatcal_dist.calibration.shift import rows

RESAMPLES = 60
SVG = '<svg xmlns="http://www.w3.org/2000/svg" version="1.1" width="9" height="9"></svg>'
SAVE_FIGURE = drawing.save_figure
_KEPT: list[object] = []
QUICK = ("identity", "temperature", "vector")


@contextmanager
def quick_reports(draw: bool = False, calibrators: bool = True) -> Iterator[None]:
    """Inside, the default number of resamples is small.

    Args:
        draw: Whether figures are drawn.
        calibrators: Whether all calibrators are fitted, and not the quick ones alone.
    """
    with pytest.MonkeyPatch.context() as patched:
        for function in (write_report, summarize, write_comparison):
            defaults = function.__kwdefaults__ or {}
            assert "resamples" in defaults, function
            patched.setitem(defaults, "resamples", RESAMPLES)
        patched.setattr(rows, "RESAMPLES", RESAMPLES)
        patched.setattr(drawing, "save_figure", SAVE_FIGURE if draw else _not_drawn)
        if not calibrators:
            patched.setattr(post_hoc, "ROWS", QUICK)
        yield


def be_quick() -> None:
    """Write quick reports in this process to its end, as ranks do that a quick test starts."""
    kept = quick_reports(calibrators=False)
    kept.__enter__()
    _KEPT.append(kept)  # or it would end


def _not_drawn(figure: Figure, folder: Path, name: str) -> str:
    assert figure.axes, name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.svg").write_text(SVG)
    return SVG
