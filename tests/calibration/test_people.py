"""A network against people's answers: by loops, and where people agree against a label."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from flatcal_dist.calibration.after_training.people import against_people
from flatcal_dist.calibration.metrics.calibration_errors import (
    expected_calibration_error,
    negative_log_likelihood,
    signed_gap,
)
from flatcal_dist.calibration.report.model import read_metrics
from flatcal_dist.calibration.report.writing import write_report
from tests.support.synthetic import make_logits, make_records


def test_by_loops() -> None:
    logits = np.log([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]])
    people = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    found = against_people(logits, people)
    cross = -(0.5 * math.log(0.7) + 0.5 * math.log(0.2) + math.log(0.3)) / 2
    expected = {
        "images": 2,
        "agreement": (0.5 + 0) / 2,
        "best_agreement": (0.5 + 1) / 2,
        "accuracy": 0.5,
        "cross_entropy": cross,
        "entropy": math.log(2) / 2,
        "divergence": cross - math.log(2) / 2,
        "distance": ((0.2 + 0.3 + 0.1) / 2 + (0.7 + 0.6 + 0.1) / 2) / 2,
        "ece": (abs(0.7 - 0.5) + abs(0.6 - 0)) / 2,
        "signed_gap": (0.7 - 0.5 + 0.6) / 2,
    }
    assert found.model_dump() == pytest.approx(expected, abs=1e-12)


def test_people_who_agree_are_a_label() -> None:
    _, labels, logits = make_logits(300, 5)
    found = against_people(logits, np.eye(5)[labels])
    confidence = softmax(logits.astype(float), axis=1).max(axis=1)
    correct = logits.argmax(axis=1) == labels
    assert found.accuracy == found.agreement == pytest.approx(correct.mean())
    assert (found.best_agreement, found.entropy) == (1, 0)
    assert found.cross_entropy == pytest.approx(negative_log_likelihood(logits, labels))
    assert found.ece == pytest.approx(expected_calibration_error(confidence, correct))
    assert found.signed_gap == pytest.approx(signed_gap(confidence, correct))


def test_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\], the answers of people \[2, 4\]"):
        against_people(np.zeros((2, 3)), np.full((2, 4), 0.25))


def test_the_page_says_it_and_metrics_hold_it(tmp_path) -> None:
    people = against_people(np.eye(3)[[0, 1]], np.array([[0.8, 0.2, 0], [0, 1, 0]]))
    write_report(replace(make_records(60, classes=3), people=people), tmp_path)
    assert read_metrics(tmp_path / "metrics.json").people == people
    page = (tmp_path / "index.html").read_text()
    assert "People were asked about the same 2 images" in page
    assert "90.00\u00a0% of them give the network's answer" in page
