"""Reports on networks and classes at the end of what can be told: perfect ones, and few images."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from flatcal_dist.calibration.calibrators.of_logits import BOUNDS
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.report.writing import write_report
from flatcal_dist.calibration.report_page.verdict import verdict
from flatcal_dist.calibration.statistics.intervals import proportion_interval
from tests.calibration.test_report import Page
from tests.support.synthetic import make_logits


def test_a_perfect_network_is_over_confident_in_no_class() -> None:
    """Wilson's upper end of n of n is 1, and not 1 less a rounding error, for every n."""
    images = np.arange(1, 3000)
    low, high = proportion_interval(images, images)
    assert (high == 1).all()
    low, high = proportion_interval(0 * images, images)
    assert (low == 0).all()
    labels = np.repeat(np.arange(40), np.arange(21, 61))
    logits = 60.0 * np.eye(40)[labels]  # confidence 1 to the last digit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = Records.from_logits([f"{i:05d}" for i in range(len(labels))], labels, logits)
    m = summarize(records, resamples=5)
    assert all(v <= 0 for v in m.per_class.gap_low)
    said = " ".join(f.text for f in verdict(m))
    assert "0 of 40 classes are over-confident and 0 under-confident" in said
    assert "0.00" not in said


def test_a_temperature_at_its_bound_is_no_temperature(tmp_path: Path) -> None:
    ids, _, logits = make_logits(80, classes=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = Records.from_logits(ids, logits.argmax(1), logits)
    m = write_report(records, tmp_path, resamples=5)
    assert m.temperature == BOUNDS[0]
    text = " ".join(Page((tmp_path / "index.html").read_text()).text.split())
    assert "Temperature none no temperature can be fitted" in text
    assert "0.001" not in text[: text.index("Numbers")]


@pytest.mark.parametrize("images", [1, 3])
def test_classes_of_few_images_are_grey_and_last(tmp_path: Path, images: int) -> None:
    ids, labels, logits = make_logits(400, classes=6)
    few = np.flatnonzero(labels == 5)[images:]  # so many stay
    keep = np.setdiff1d(np.arange(400), few)
    logits[labels == 5] += 30 * np.eye(6)[0]  # and are answered wrongly, with full confidence
    records = Records.from_logits([ids[i] for i in keep], labels[keep], logits[keep])
    m = write_report(records, tmp_path, resamples=5)
    html = (tmp_path / "index.html").read_text()
    rows = re.findall(r'<tr( class="few" data-last)?><th scope="row" data-value="(\d)">', html)
    assert [bool(few) for few, _ in rows] == [False] * 5 + [True]
    small = re.search(r'<tr class="few".*?</tr>', html, re.DOTALL)[0]
    assert f'<td data-value="0.0">0 of {images}</td>' in small  # and no 0.0 %, of so few images
    assert f"{images} of {images}</td>" in small  # taken for class 0
    assert rows[-1][1] == "5"
    gaps = dict(zip(m.per_class.number, m.per_class.signed_gap, strict=True))
    assert max(gaps, key=gaps.get) == 5, "by its gap it would be the first"
    said = next(f.text for f in verdict(m) if f.topic == "Classes")
    assert "of 5 classes" in said
    assert "class 5" not in said


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        (99, 300, "Only 99 images are wrong"),
        (100, 300, None),
        (300, 1, "Only 1 image is right"),
        (300, 100, None),
    ],
)
def test_intervals_that_rest_on_few_outcomes_are_said_to(
    tmp_path: Path, wrong: int, right: int, said: str | None
) -> None:
    ids, _, logits = make_logits(wrong + right, classes=4)
    labels = (logits.argmax(1) + (np.arange(len(ids)) < wrong)) % 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of temperatures at their bounds
        m = write_report(Records.from_logits(ids, labels, logits), tmp_path, resamples=5)
    assert m.accuracy == pytest.approx(right / (wrong + right))
    text = " ".join(Page((tmp_path / "index.html").read_text()).text.split())
    tail = "intervals of failure prediction then hold the truth in 90 to 95 % of cases."
    assert (tail in text) == (said is not None)
    if said:
        assert f"{said}: {tail}" in text
