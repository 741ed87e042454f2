"""Checks of the arguments that most functions of `calibration` take. Errors say what to mend."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
StringArray = np.ndarray[tuple[int, ...], np.dtype[np.str_]]

LARGEST_LOGIT = 1e100  # larger logits overflow in differences and in products with 1/T


def confidence_and_correct(
    confidence: ArrayLike, correct: ArrayLike, *, probability: bool = True
) -> tuple[FloatArray, BoolArray]:
    """Return confidence as float64 [N] and correct as bool [N].

    Args:
        confidence: The confidence of each image.
        correct: Which images are right, bool or 0/1.
        probability: Whether confidence must lie in [0, 1]. Metrics of ranking need an order alone,
            and take any finite score.

    Raises:
        ValueError: Shapes, lengths or values do not fit, or there is no image.
    """
    c = np.asarray(confidence, dtype=np.float64)
    a = np.asarray(correct)
    if c.ndim != 1 or a.ndim != 1:
        raise ValueError(f"confidence and correct must have shape [N], got {c.shape} and {a.shape}")
    if len(c) != len(a):
        raise ValueError(
            f"confidence and correct must have equal lengths, got {len(c)} and {len(a)}"
        )
    if len(c) == 0:
        raise ValueError("confidence is empty: at least one image is needed")
    if not np.isfinite(c).all():
        bad = int((~np.isfinite(c)).sum())
        raise ValueError(f"confidence has {bad} NaN or infinite values; mend the logits first")
    if probability and (c.min() < 0 or c.max() > 1):
        raise ValueError(
            f"confidence must lie in [0, 1], found {c.min():g} to {c.max():g}; "
            "pass softmax probabilities, not logits"
        )
    if a.dtype != np.bool_:
        if not np.isin(a, (0, 1)).all():
            raise ValueError("correct must be bool or 0/1")
        a = a.astype(np.bool_)
    return c, a


def logits_and_labels(
    logits: ArrayLike, labels: ArrayLike, ids: ArrayLike | None = None
) -> tuple[np.ndarray, IntArray]:
    """Return logits [N, K] in the floating dtype that they have, and labels as int64 [N].

    Args:
        logits: The logits [N, K], with K >= 2.
        labels: The labels [N], integers in 0..K-1.
        ids: The ids of the images [N], by which errors call them.

    Raises:
        ValueError: Shapes do not fit, there is no image, logits are NaN, infinite or beyond
            `LARGEST_LOGIT`, or labels are not integers in 0..K-1.
    """
    z, y = np.asarray(logits), np.asarray(labels)
    if z.ndim != 2 or z.shape[1] < 2:
        raise ValueError(f"logits must have shape [N, K] with K >= 2, got {z.shape}")
    if y.shape != (len(z),):
        raise ValueError(f"labels must have shape [{len(z)}] to match the logits, got {y.shape}")
    if len(z) == 0:
        raise ValueError("logits are empty: at least one image is needed")
    if z.dtype.kind not in "fiu":
        raise ValueError(f"logits must be real numbers, got dtype {z.dtype}")
    if z.dtype.kind != "f":
        z = z.astype(np.float64)
    # A NaN shows in the largest value of its row, so that no mask [N, K] is needed.
    high, low = z.max(axis=1).astype(np.float64), z.min(axis=1).astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(high) & np.isfinite(low)))
    if len(bad):
        first = f"at row {bad[0]}" if ids is None else f"{np.asarray(ids)[bad[0]]!s}"
        images = f"{len(bad)} image{'s' * (len(bad) > 1)}"
        raise ValueError(f"logits of {images} are NaN or infinite, first {first}")
    if max(high.max(), -low.min()) > LARGEST_LOGIT:
        raise ValueError(f"logits must lie within +-{LARGEST_LOGIT:g}, found {high.max():g}")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels must be integers, got dtype {y.dtype}")
    y = y.astype(np.int64)
    if y.min() < 0 or y.max() >= z.shape[1]:
        raise ValueError(
            f"labels must lie in 0..{z.shape[1] - 1} for {z.shape[1]} classes, "
            f"found {y.min()} to {y.max()}"
        )
    return z, y


def image_ids(ids: Sequence[str], images: int) -> StringArray:
    """Return ids as N strings. ValueError if their number is wrong or one occurs twice."""
    names = np.array([str(i) for i in ids], dtype=np.str_)
    if len(names) != images:
        raise ValueError(f"ids and logits must have equal lengths, got {len(names)} and {images}")
    if len(np.unique(names)) < len(names):
        repeated = sorted(name for name, n in Counter(names.tolist()).items() if n > 1)
        raise ValueError(
            f"ids must be unique, but {len(repeated)} ids occur more than once, first "
            f"{repeated[0]!r}. Drop the padding of the distributed loader and give every image one "
            "id. Otherwise an image counts twice, and is scored by a fit that has seen it"
        )
    return names


def positive_integer(value: int, name: str) -> int:
    """Return value as an integer. ValueError unless it is a whole number of at least 1."""
    if int(value) != value or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
    return int(value)
