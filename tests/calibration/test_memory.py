"""Nothing besides the logits, and a copy of those fitted on, grows with images x classes."""

import tracemalloc

import numpy as np
import pytest

from flatcal_dist.calibration.calibrators.crossfit import compare_calibrators
from flatcal_dist.calibration.confidence.of_logits import compare_scores
from flatcal_dist.calibration.records.records import Records

IMAGES, CLASSES = 10_000, 1000
CHUNKS = 32  # MB: a dozen temporaries of 2 MB, and what is kept per image


@pytest.fixture(scope="module")
def made():
    random = np.random.default_rng(0)
    labels = random.integers(0, CLASSES, IMAGES)
    logits = random.normal(size=(IMAGES, CLASSES)).astype(np.float32)
    logits[np.arange(IMAGES), labels] += 5
    return [f"{i:05d}" for i in range(IMAGES)], labels, logits


@pytest.mark.parametrize(
    ("work", "copied"),
    [
        (lambda i, y, z: Records.from_logits(i, y, z), 0.85),
        (lambda i, y, z: compare_scores(i, z, y, resamples=2), 0.25),
        (lambda i, y, z: compare_calibrators(i, z, y, ["identity", "temperature"]), 0.85),
    ],
    ids=["records", "scores", "calibrators"],
)
def test_memory_above_the_logits(made, work, copied: float, monkeypatch) -> None:
    """40 MB of logits here: one copy of all in float64 would be 80, and is not made."""
    # It asks for 31 MB that it never touches.
    monkeypatch.setattr("flatcal_dist.calibration.softmax.keep_memory", lambda: None)
    monkeypatch.setattr("flatcal_dist.calibration.statistics.bootstrap.keep_memory", lambda: None)
    tracemalloc.start()
    work(*made)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < copied * made[2].nbytes / 2**20 + CHUNKS
