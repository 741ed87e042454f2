from collections.abc import Iterator

import pytest

from flatcal_dist.calibration.pages import drawing
from flatcal_dist.calibration.records.records import Records
from tests.support.quick_reports import SAVE_FIGURE, quick_reports
from tests.support.synthetic import make_records

DRAWN = ("test_report", "test_report_figures", "test_browser")  # modules about what is drawn
FITTED = ("test_post_hoc",)  # and about what is fitted after training


@pytest.fixture(scope="module", autouse=True)
def reports_of_this_module(request: pytest.FixtureRequest) -> Iterator[None]:
    """Most modules write reports in passing: few resamples, nothing drawn, quick calibrators."""
    module = request.module.__name__.rpartition(".")[2]
    with quick_reports(draw=module in DRAWN, calibrators=module in FITTED):
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn in this test."""
    monkeypatch.setattr(drawing, "save_figure", SAVE_FIGURE)


@pytest.fixture(scope="session")
def records() -> Records:
    return make_records(400)
