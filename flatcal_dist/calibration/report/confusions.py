"""Which classes are taken for which: the confusion matrix and its largest entries."""

from typing import Any

import numpy as np

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.report.classes import class_numbers

LARGEST_MATRIX = 30  # classes; nobody can read a larger matrix
PAIRS = 20  # the number of confusions that are listed


def confusions(records: Records) -> dict[str, Any]:
    """Count the answers by true class.

    Returns:
        classes: The numbers that the network gives to the classes, in the order of the matrix.
        matrix: The images of each class (row) by answer (column). None for more than
            `LARGEST_MATRIX` classes.
        pairs: The `PAIRS` most frequent confusions. Each holds label, answer and images, `of` (the
            number of images of the label) and `back` (how many images of the answer's class were
            taken for the label).
    """
    k, number = records.classes, class_numbers(records)
    cell = records.label * k + records.prediction
    used, counts = np.unique(cell, return_counts=True)
    known = dict(zip(used.tolist(), counts.tolist(), strict=True))
    of_label = np.bincount(records.label, minlength=k)
    label, answer = np.divmod(used, k)
    wrong = np.flatnonzero(label != answer)
    order = wrong[np.lexsort((used[wrong], -counts[wrong]))][:PAIRS]
    matrix = None
    if k <= LARGEST_MATRIX:
        matrix = np.bincount(cell, minlength=k * k).reshape(k, k).tolist()
    return {
        "classes": number.tolist() if matrix is not None else None,
        "matrix": matrix,
        "pairs": [
            {
                "label": int(number[label[i]]),
                "answer": int(number[answer[i]]),
                "images": int(counts[i]),
                "of": int(of_label[label[i]]),
                "back": known.get(int(answer[i] * k + label[i]), 0),
            }
            for i in order.tolist()
        ],
    }
