"""The figures of each class, in columns with one entry per class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flatcal_dist.calibration.checks import FloatArray, IntArray
from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.statistics.intervals import proportion_interval


def class_numbers(records: Records) -> IntArray:
    """Return the number that the network gives to each class of the records [K]."""
    chosen = records.source.classes
    return np.arange(records.classes) if chosen is None else np.array(chosen)


def per_class(records: Records, names: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Return columns over the classes that have images, in the order of the classes.

    Returns:
        class: The number that the network gives to the class.
        name: The name of the class. None if it is not known.
        images: The number of images of the class.
        correct: How many of them are answered correctly.
        accuracy: The share of them that is answered correctly.
        mean_confidence: Their mean confidence.
        signed_gap: Their mean confidence minus their accuracy.
        gap_low: The lower end of the interval of the signed gap, by Wilson's interval of accuracy.
        gap_high: The upper end of this interval.
        nll: Their mean NLL.
        answers: The number of images that are answered with this class.
        precision: The share of these answers that is correct. None without answers.
        confused_with: The most frequent wrong answer. None if there is none.
        confused_images: How many images of the class get this wrong answer.
        confused_share: The share of the class's images that gets it.
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
        "nll": mean(records.before.column("nll")).tolist(),
        "answers": answers.tolist(),
        "precision": [None if np.isnan(v) else float(v) for v in precision],
        "confused_with": [None if i is None else number[i] for i in confused],
        "confused_images": [wrong_images.get(i, 0) for i in at.tolist()],
        "confused_share": [wrong_images.get(i, 0) / int(images[i]) for i in at.tolist()],
    }


def _most_confused(records: Records) -> tuple[dict[int, int], dict[int, int]]:
    """The most frequent wrong answer of each true class, and how often it is given.

    The lowest class counts where several are as frequent.
    """
    wrong = ~records.correct
    pairs, counts = np.unique(
        np.stack([records.label[wrong], records.prediction[wrong]], axis=1),
        axis=0, return_counts=True,
    )  # fmt: skip
    order = np.lexsort((-pairs[:, 1], counts))  # ascending: the last entry of a class counts
    best = {int(pairs[i, 0]): (int(pairs[i, 1]), int(counts[i])) for i in order}
    return {k: v[0] for k, v in best.items()}, {k: v[1] for k, v in best.items()}
