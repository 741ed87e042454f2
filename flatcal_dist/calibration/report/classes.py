"""What a network does class by class: plain columns, one entry per class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flatcal_dist.calibration.checks import FloatArray, IntArray
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.statistics.intervals import proportion_interval


def class_numbers(records: Records) -> IntArray:
    """The network's number of each class that labels and predictions of the records count."""
    chosen = records.source.classes
    return np.arange(records.classes) if chosen is None else np.array(chosen)


def per_class(records: Records, names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Columns over the classes that have images, in the order of the classes.

    class (the network's number), name (None where not known), images, correct: how many of them
    the network gets right; accuracy of the class's images, their mean confidence and signed gap,
    its interval (`gap_low`, `gap_high`: mean confidence minus Wilson's interval of the accuracy),
    their mean NLL; answers: images answered with this class, and precision: the share of them that
    are of this class (None without answers); confused_with: the most frequent wrong answer, None if
    there is none, how many of the class's images get it (confused_images), and their share.
    """
    k, label, answer = records.classes, records.label, records.prediction
    images = np.bincount(label, minlength=k)
    right = np.bincount(label, weights=records.correct, minlength=k).astype(np.int64)
    low, high = proportion_interval(right, images)
    at = np.flatnonzero(images)

    def mean(values: FloatArray) -> FloatArray:
        return np.bincount(label, weights=values, minlength=k)[at] / images[at]

    answers = np.bincount(answer, minlength=k)[at]
    confidence, accuracy = mean(records.confidence), right[at] / images[at]
    with np.errstate(invalid="ignore"):
        precision = right[at] / np.where(answers > 0, answers, np.nan)
    wrong_class, wrong_images = _most_confused(records)
    number = class_numbers(records).tolist()
    confused = [wrong_class.get(i) for i in at.tolist()]
    return {
        "class": [number[i] for i in at.tolist()],
        "name": [
            names[number[i]] if names and number[i] < len(names) else None for i in at.tolist()
        ],
        "images": images[at].tolist(),
        "correct": right[at].tolist(),
        "accuracy": accuracy.tolist(),
        "mean_confidence": confidence.tolist(),
        "signed_gap": (confidence - accuracy).tolist(),
        "gap_low": (confidence - high[at]).tolist(),
        "gap_high": (confidence - low[at]).tolist(),
        "nll": mean(records.before.nll).tolist(),
        "answers": answers.tolist(),
        "precision": [None if np.isnan(v) else float(v) for v in precision],
        "confused_with": [None if i is None else number[i] for i in confused],
        "confused_images": [wrong_images.get(i, 0) for i in at.tolist()],
        "confused_share": [wrong_images.get(i, 0) / int(images[i]) for i in at.tolist()],
    }


def _most_confused(records: Records) -> tuple[dict[int, int], dict[int, int]]:
    """Per true class its most frequent wrong answer (the lowest of equals), and how often."""
    wrong = ~records.correct
    pairs, counts = np.unique(
        np.stack([records.label[wrong], records.prediction[wrong]], axis=1),
        axis=0, return_counts=True,
    )  # fmt: skip
    order = np.lexsort((-pairs[:, 1], counts))  # ascending: the last of a class stays
    best = {int(pairs[i, 0]): (int(pairs[i, 1]), int(counts[i])) for i in order}
    return {k: v[0] for k, v in best.items()}, {k: v[1] for k, v in best.items()}
