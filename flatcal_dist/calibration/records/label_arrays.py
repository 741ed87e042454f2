"""Labels in the forms that people save, as class numbers.

Labels [N] may be class numbers of any type, names of classes, texts of digits, or true and false
for two classes. They may have the shape [N, 1]. They may be one-hot, as one array [N, K] or K
columns.
"""

import re
from collections.abc import Sequence

import numpy as np

from flatcal_dist.calibration.checks import IntArray
from flatcal_dist.calibration.records.tables import is_number, refuse_thousands, text_of

SEGMENTATION = (
    "that is more than one answer per image, as in segmentation or detection: the report is about "
    "one label [N] and scores [N, K] per image"
)


def labels(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return labels [N] as int64, as bool, or as str if they are names.

    `arrays` holds one array, or one-hot columns. ValueError for anything else.
    """
    if len(arrays) > 1:
        return _one_hot(np.stack([_whole(labels([array])) for array in arrays], axis=1))
    (array,) = arrays
    if array.ndim == 2 and 1 in array.shape:
        array = array.reshape(-1)
    if array.ndim == 2 and array.dtype.kind in "biuf":
        return _one_hot(array)
    if array.ndim != 1:
        raise ValueError(f"labels have shape {list(array.shape)}; {SEGMENTATION}")
    if array.dtype.kind in "SUO":
        return _of_texts(text_of(array, "labels"))
    if array.dtype.kind == "b":
        return array
    return _whole(array)


def _of_texts(texts: list[str]) -> np.ndarray:
    empty = sum(not text.strip() for text in texts)
    if empty:
        raise ValueError(f"{empty} of {len(texts)} labels are empty")
    words = {text.strip().lower() for text in texts}
    if words <= {"true", "false"}:
        return np.array([text.strip().lower() == "true" for text in texts])
    if words <= {"nan", "inf", "-inf"} or all(is_number(word) for word in words):
        refuse_thousands(texts, "of labels")
        values = np.array([text.strip().replace(",", ".") for text in texts])
        return _whole(values.astype(np.float64))
    return np.array([text.strip() for text in texts])


def _whole(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError("labels must be integers, and some are NaN or infinite")
        if (values % 1 != 0).any():
            raise ValueError(f"labels must be integers, found {values[values % 1 != 0][0]:g}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"labels must be integers, got dtype {values.dtype}")
    if len(values) and not -(2**53) <= values.min() <= values.max() <= 2**53:
        raise ValueError(f"labels must be class numbers, found {values.max()}")
    return values.astype(np.int64)


def _one_hot(array: np.ndarray) -> IntArray:
    if not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"labels have shape {list(array.shape)} and other values than 0 and 1: soft labels, or "
            "labels of pixels, are not understood; expected class numbers [N]"
        )
    if (array.astype(np.int64).sum(axis=1) != 1).any():
        raise ValueError(
            "some images have several labels, or none, among the one-hot ones: the report is about "
            "one label per image"
        )
    return array.astype(np.int64).argmax(axis=1)


def class_numbers(
    found: np.ndarray, classes: int, names: Sequence[str] | None, first: int | None
) -> tuple[IntArray, str | None]:
    """Return labels as class numbers 0..K-1, and a note on how they were read.

    Args:
        found: The labels [N], as `labels` returns them.
        classes: The number of classes.
        names: The names of the classes, which labels may use.
        first: The number of the first column of scores.

    Raises:
        ValueError: Labels are out of range, or can be read in more than one way.
    """
    if found.dtype.kind == "U":
        return _by_name(found, classes, names)
    if found.dtype.kind == "b":
        if classes != 2:
            raise ValueError(
                f"labels are true and false, and there are {classes} classes: expected class "
                f"numbers 0..{classes - 1}. Whether an answer is right is no label"
            )
        return found.astype(np.int64), "labels false and true are classes 0 and 1"
    low, high = (int(found.min()), int(found.max())) if len(found) else (0, 0)
    if first == 1 and classes > 2 and low >= 1 and high <= classes:
        return found - 1, "classes count from 1"
    if first == 1 and classes == 2 and low == high == 1:
        raise ValueError(
            "all labels are 1, and the columns of scores count from 1: whether that is the first "
            "class or the second is open. Call the columns prob_0 and prob_1, or name the classes"
        )
    if first == 1 and classes == 2 and {low, high} <= {1, 2} and high == 2:
        return found - 1, "classes count from 1"
    if low < 0 or high >= classes:
        advice = ""
        if low < 0:
            advice = "; leave out rows without a label"
        elif low >= 1 and high == classes:
            advice = (
                "; if they count from 1, subtract 1, or call the columns of scores "
                f"prob_1 to prob_{classes}"
            )
        raise ValueError(
            f"labels must lie in 0..{classes - 1} for {classes} classes, found {low} to {high}"
            + advice
        )
    return found, None


def _by_name(
    found: np.ndarray, classes: int, names: Sequence[str] | None
) -> tuple[IntArray, str | None]:
    texts = found.tolist()
    if names is None and classes == 1000 and all(re.fullmatch(r"n\d{8}", t) for t in set(texts)):
        from flatcal_dist.data.sets.imagenet import wnids

        names = wnids()
    if names is None:
        few = ", ".join(sorted(set(texts))[:3])
        raise ValueError(
            f"labels must be integers, or names of classes whose order is known, found {few}: give "
            "--classes FILE with the names in the order of the scores, one a line"
        )
    number = {name.strip(): i for i, name in enumerate(names)}
    if len(number) < len(names):
        raise ValueError("two classes have one name: give labels as class numbers")
    strange = sorted(set(texts) - number.keys())
    if strange:
        raise ValueError(
            f"{len(strange)} labels are no names of classes, first {strange[0]!r}; they are "
            f"{', '.join(names[:4])}{', ...' * (len(names) > 4)}"
        )
    return np.array([number[text] for text in texts], np.int64), "labels are names of classes"
