"""ECE over swept bins against the algorithm as the paper states it."""

from itertools import pairwise

import numpy as np
import pytest

from flatcal_dist.calibration.metrics.entries_calibration import (
    MOST_SWEPT,
    rising_bins,
    sweep_calibration_error,
)
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.summary import summarize
from flatcal_dist.calibration.statistics.bootstrap import bootstrap
from tests.support.synthetic import make_records


def by_hand(confidence: np.ndarray, correct: np.ndarray) -> tuple[int, float]:
    """Bins and error of confidences that all differ: plain lists, one more bin at a time."""
    pairs = sorted(zip(confidence.tolist(), correct.tolist(), strict=True))

    def binned(bins: int) -> list[list[tuple[float, float]]]:
        size, more = divmod(len(pairs), bins)
        ends = [k * size + min(k, more) for k in range(bins + 1)]
        return [pairs[low:high] for low, high in pairwise(ends)]

    def mean(part: list[tuple[float, float]], place: int) -> float:
        return sum(pair[place] for pair in part) / len(part)

    bins = 1
    while bins < len(pairs):
        accuracy = [mean(part, 1) for part in binned(bins + 1)]
        if accuracy != sorted(accuracy):
            break
        bins += 1
    gaps = (len(part) * abs(mean(part, 0) - mean(part, 1)) for part in binned(bins))
    return bins, sum(gaps) / len(pairs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("images", [1, 2, 7, 60, 400, 1111])
def test_is_the_papers_algorithm(images: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    confidence = random.random(images)
    correct = random.random(images) < confidence ** (1 + seed / 2)
    bins, error = by_hand(confidence, correct)
    assert rising_bins(confidence, correct) == bins
    assert sweep_calibration_error(confidence, correct) == pytest.approx(error, abs=1e-12)
    turned = random.permutation(images)
    assert sweep_calibration_error(confidence[turned], correct[turned]) == pytest.approx(error)


def test_equal_confidences_share_a_bin() -> None:
    correct = np.arange(12) % 3 == 0
    assert sweep_calibration_error(np.full(12, 0.5), correct) == pytest.approx(0.5 - 1 / 3)
    two = np.repeat([0.4, 0.8], 6)
    assert sweep_calibration_error(two, two > 0.5) == pytest.approx((0.4 + 0.2) / 2)


def test_accuracy_that_always_rises_ends_at_the_limit() -> None:
    confidence = np.linspace(0.01, 0.99, 5000)
    assert rising_bins(confidence, confidence > 0.3) == MOST_SWEPT
    assert rising_bins(confidence, np.ones(5000)) == MOST_SWEPT
    assert sweep_calibration_error(confidence, np.ones(5000)) == pytest.approx(0.5)


def test_resamples_keep_the_bins_of_the_images(records: Records) -> None:
    scores = records.before
    samples = bootstrap([scores], resamples=3, seed=5)
    m = samples.statistics.index("ece_sweep")
    bins, random = by_hand(scores.confidence, scores.correct)[0], np.random.default_rng(5)
    assert 1 < bins < 100
    parts = np.array_split(np.argsort(scores.confidence), bins)
    for replicate in samples.replicates[:, 0]:
        count = np.bincount(random.integers(400, size=400), minlength=400)
        gaps = [(count * (scores.confidence - scores.correct))[part].sum() for part in parts]
        assert replicate[m] == pytest.approx(np.abs(gaps).sum() / 400, abs=1e-12)


def test_report_holds_it_with_its_interval() -> None:
    records = make_records(600)
    m = summarize(records, resamples=50)
    pair = records.before.confidence, records.before.correct
    assert m.ece_sweep == sweep_calibration_error(*pair)
    interval = m.interval("ece_sweep")
    assert 0 <= interval.low < interval.value <= interval.high < 0.3
    moved = m.after_temperature.ece_sweep - m.ece_sweep
    assert m.difference("ece_sweep").value == pytest.approx(moved, abs=1e-12)
    with pytest.raises(ValueError, match="empty"):
        sweep_calibration_error([], [])
