"""Golden vectors and synthetic logits for the tests of calibration."""

import json
from pathlib import Path

import numpy as np

from flatcal_dist.calibration.records.records import Records

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def golden_inputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Confidence and correctness of a golden vector; the largest is drawn, not stored."""
    if name != "D_synth10k":
        inputs = GOLDEN[name]["inputs"]
        return np.array(inputs["conf"]), np.array(inputs["correct"])
    random = np.random.RandomState(0)
    z = random.randn(10000) * 1.5 + 1.5
    return 1 / (1 + np.exp(-z)), random.rand(10000) < 1 / (1 + np.exp(-0.7 * z))


def make_logits(
    images: int, classes: int = 10, seed: int = 0, scale: float = 2.0, images_seed: int = 0
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, labels, over-confident logits; `images_seed` decides the images, `seed` the network."""
    shared, own = np.random.default_rng(images_seed), np.random.default_rng(1000 + seed)
    labels = shared.integers(0, classes, images)
    logits = shared.normal(size=(images, classes))
    logits[np.arange(images), labels] += 2.5 + shared.normal(size=images)
    logits += 0.4 * own.normal(size=logits.shape)
    return [f"image/{i:05d}" for i in range(images)], labels, (scale * logits).astype(np.float32)


def make_records(images: int, **options: float) -> Records:
    ids, labels, logits = make_logits(images, **options)
    return Records.from_logits(ids, labels, logits)


DEGENERATE = ("right", "constant", "two", "few", "absent")


def degenerate(case: str, images: int, few: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Ids, labels and logits at an end of what there can be.

    right: every image is. constant: all logits are 0. two: two classes. few: so few images. absent:
    a class has none.
    """
    ids, labels, logits = make_logits(few if case == "few" else images, 2 if case == "two" else 4)
    if case == "right":
        labels = logits.argmax(axis=1)
    if case == "constant":
        logits = np.zeros_like(logits)
    if case == "absent":
        labels = np.where(labels == 3, 0, labels)
    return ids, labels, logits
