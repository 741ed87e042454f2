"""Arrays of scores in the shapes that people save, as scores [N, K].

    [N, K] or [N, K, 1, 1]      scores of K classes
    [N] or [N, 1]               scores of class 1 of a binary classifier
    [M, N, K] or [N, M, K]      M members of an ensemble, whose probabilities are averaged

A name may leave open whether scores are probabilities. Values that lie in 0..1 and sum to 1 are
then taken for probabilities, and values beyond 0..1 for logits. Anything else is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from flatcal_dist.calibration.checks import FloatArray, IntArray
from flatcal_dist.calibration.pages.display import counted
from flatcal_dist.calibration.records.column_names import Found
from flatcal_dist.calibration.records.label_arrays import SEGMENTATION
from flatcal_dist.calibration.records.tables import is_number, refuse_thousands, text_of

OFF = 0.01  # how far the sum of rounded probabilities may be from 1
LOOK = 1000  # rows that are looked at first, because they mostly rule out a kind


@dataclass(frozen=True)
class Table:
    """Scores [N, K] and how they were read.

    Args:
        scores: The scores [N, K].
        kind: logits, probabilities or log-probabilities.
        notes: How the scores were read.
        warnings: What is likely to be a mistake.
    """

    scores: np.ndarray
    kind: str
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def stacked(arrays: Sequence[np.ndarray], chosen: Found) -> np.ndarray:
    """Return the scores as one array of numbers.

    A column of texts may hold numbers, or lists of numbers. ValueError for anything else.
    """
    if len(arrays) > 1:
        for array, name in zip(arrays, chosen.names, strict=True):
            if array.ndim != 1 or array.dtype.kind not in "biuf":
                raise ValueError(f"column {name} has to hold one number per image")
        return np.stack(arrays, axis=1)
    (array,), (name,) = arrays, chosen.names
    if array.dtype.kind in "SUO":
        array = _numbers(text_of(array, name), name)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    return array


def _numbers(texts: list[str], name: str) -> FloatArray:
    """Texts such as 0.5, or [0.1, 0.9] as Python, numpy and torch print lists."""
    if all(is_number(text) for text in texts):
        refuse_thousands(texts, name)
        return np.array([text.strip().replace(",", ".") for text in texts], dtype=np.float64)
    rows = []
    for number, text in enumerate(texts):
        inside = re.fullmatch(r"\s*(?:tensor|array)?\(?\s*\[([^\[\]]*)\].*", text, re.DOTALL)
        if inside is None or "..." in text:
            why = "was shortened when it was printed" if "..." in text else "is no list of numbers"
            raise ValueError(
                f"row {number} of column {name} {why}: {text[:60]!r}. Write a column per class, "
                "logit_0, logit_1 and so on, or parquet or npz"
            )
        try:
            rows.append([float(part) for part in re.split(r"[\s,]+", inside[1].strip())])
        except ValueError:
            raise ValueError(f"row {number} of column {name} is no list of numbers") from None
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"the lists in column {name} have different lengths")
    return np.array(rows, dtype=np.float64)


def read(raw: np.ndarray, images: int, chosen: Found, wanted: str | None) -> Table:
    """Return the scores [N, K] of an array in any of the shapes.

    Args:
        raw: The array.
        images: The number of labels.
        chosen: Where the scores were found.
        wanted: The kind that the user names.

    Raises:
        ValueError: Shape or values cannot be read, or can be read in more than one way.
    """
    kind, name = wanted or chosen.kind, chosen.names[0]
    array = raw
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim > 3:
        raise ValueError(f"{name} has shape {list(raw.shape)}; {SEGMENTATION}")
    if array.ndim == 3:
        return _ensemble(array, images, kind, name)
    if array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
        return _binary(array.reshape(-1), images, kind, chosen)
    if array.shape[0] != images:
        turned = array.ndim == 2 and array.shape[1] == images
        raise ValueError(
            f"labels must have shape [{array.shape[0]}] to match the scores {list(array.shape)}, "
            f"got [{images}]" + "; are the scores transposed? Expected [N, K]" * turned
        )
    kind, notes, warnings = _kind(array, kind, name)
    return Table(_percent(array, kind, notes), kind, tuple(notes), tuple(warnings))


def _kind(array: np.ndarray, kind: str | None, name: str) -> tuple[str, list[str], list[str]]:
    """The kind of scores [N, K], by their name or else by their values."""
    if not np.isfinite(array).all():
        return kind or "logits", [], []  # refused later, with the name of the image
    if kind is None:
        if np.isin(array[:LOOK], (0, 1)).all():
            raise ValueError(
                f"{name} holds zeros and ones, which are answers and no scores: expected logits or "
                "probabilities"
            )
        for found, fits in (("probabilities", _sum_to_one), ("log-probabilities", _logs)):
            if fits(array, OFF):
                return found, [f"{name} are {found} by their values"], []
        if array.min() < 0 or array.max() > 1:
            return "logits", [f"{name} are logits by their values"], []
        raise ValueError(
            f"{name} may be logits or probabilities: they lie in 0..1 and do not sum to 1. Call "
            "them logits, or say --scores logits. There is no report for a sigmoid per class"
        )
    if kind == "logits" and _sum_to_one(array, 1e-3):
        return kind, [], [
            f"the scores are called logits ({name}), and lie in 0..1 and sum to 1 for every image, "
            "as probabilities do. They are taken as logits, which makes all figures wrong if they "
            "are probabilities: then say --scores probabilities"
        ]  # fmt: skip
    if kind == "logits" and _logs(array, 1e-3):
        return "log-probabilities", [f"{name} are logarithms of probabilities"], []
    if kind == "log-probabilities" and not _logs(array, OFF):
        raise ValueError(
            f"the exponentials of {name} do not sum to 1; if these are logits, call them logits"
        )
    return kind, [], []


def _sum_to_one(array: np.ndarray, off: float) -> bool:
    def fits(part: np.ndarray) -> bool:
        inside = part.min() >= 0 and part.max() <= 1 + 1e-6
        return bool(inside and np.abs(part.sum(axis=1, dtype=np.float64) - 1).max() <= off)

    return len(array) > 0 and array.shape[1] > 1 and fits(array[:LOOK]) and fits(array)


def _logs(array: np.ndarray, off: float) -> bool:
    def fits(part: np.ndarray) -> bool:
        return bool(part.max() <= 1e-3 and np.abs(logsumexp(part, axis=1)).max() <= off)

    return len(array) > 0 and array.shape[1] > 1 and fits(array[:LOOK]) and fits(array)


def _percent(array: np.ndarray, kind: str, notes: list[str]) -> np.ndarray:
    if kind != "probabilities" or not len(array) or not np.isfinite(array).all():
        return array
    sums = array.sum(axis=1, dtype=np.float64)
    if array.min() >= 0 and array.shape[1] > 1 and (np.abs(sums - 100) <= 100 * OFF).all():
        notes.append("probabilities in per cent")
        return array / 100
    return array


def _binary(array: np.ndarray, images: int, kind: str | None, chosen: Found) -> Table:
    """Scores of class 1 of a binary classifier, as a sigmoid returns them."""
    name = chosen.names[0]
    if len(array) != images:
        raise ValueError(f"labels must have shape [{len(array)}] to match {name}, got [{images}]")
    if chosen.first == 0:
        raise ValueError(
            f"{name} is the only column of scores: expected one for each class, or one for class 1 "
            "of two, such as prob_1"
        )
    array = array.astype(np.float64)
    finite = np.isfinite(array).all()
    if kind is None and finite:
        if (array % 1 == 0).all():
            raise ValueError(f"{name} holds whole numbers, which are answers and no scores")
        kind = "probabilities" if array.min() >= 0 and array.max() <= 1 else "logits"
    if kind == "log-probabilities":
        array, kind = np.exp(array), "probabilities"
    note = f"{name} belongs to class 1 of two"
    if kind == "probabilities":
        if not finite or array.min() < 0 or array.max() > 1:
            raise ValueError(
                "probabilities must lie in 0..1; if these are logits, call them logits"
            )
        return Table(np.stack([1 - array, array], axis=1), kind, (note,))
    warnings: tuple[str, ...] = ()
    if finite and len(array) and array.min() >= 0 and array.max() <= 1:
        warnings = (
            f"the logits {name} all lie in 0..1, as probabilities do: if they are, say --scores "
            "probabilities",
        )
    return Table(np.stack([np.zeros_like(array), array], axis=1), "logits", (note,), warnings)


def _ensemble(array: np.ndarray, images: int, kind: str | None, name: str) -> Table:
    """The mean of the members' probabilities, as log-probabilities."""
    first, second, _ = array.shape
    if first != images and second != images:
        raise ValueError(f"{name} has shape {list(array.shape)}, and there are {images} labels")
    if first == images == second:
        raise ValueError(f"{name} has shape {list(array.shape)}: which axis counts images is open")
    members = array if second == images else np.moveaxis(array, 1, 0)
    if first == images:
        flat, turned = array.reshape(-1, array.shape[2]), np.moveaxis(array, 2, 1)
        last = _sum_to_one(flat, OFF) or _logs(flat, OFF)
        if not last and _sum_to_one(turned.reshape(-1, second), OFF):
            members, last = np.moveaxis(array, 2, 0), True
        if not last:
            raise ValueError(
                f"{name} has shape {list(array.shape)}: if it holds an ensemble, save it as [M, N, "
                "K]: members, images, classes. If an image has several answers: " + SEGMENTATION
            )
    if not len(members):
        raise ValueError(f"{name} has no members")
    kind, notes, warnings = _kind(members.reshape(-1, members.shape[2]), kind, name)
    if len(members) == 1:
        return Table(members[0], kind, tuple(notes), tuple(warnings))
    total = None
    for member in members:
        logs = member.astype(np.float64)
        if not np.isfinite(logs).all():
            raise ValueError(f"{name} has NaN or infinite values")
        if kind == "probabilities":
            logs = log_probabilities(logs)
        logs = logs - logsumexp(logs, axis=1, keepdims=True)
        total = logs if total is None else np.logaddexp(total, logs)
    notes.append(f"the mean of the probabilities of {len(members)} members")
    scores = total - np.log(len(members))
    return Table(scores, "log-probabilities", tuple(notes), tuple(warnings))


def log_probabilities(p: np.ndarray) -> FloatArray:
    """Return the logarithms of probabilities [N, K]. ValueError if they are no probabilities."""
    p = np.asarray(p, np.float64)
    if p.ndim != 2:
        raise ValueError(f"probabilities must have shape [N, K], got {p.shape}")
    if np.isnan(p).any():
        images = counted(int(np.isnan(p).any(axis=1).sum()), "image")
        raise ValueError(f"probabilities of {images} are NaN")
    if (p < 0).any() or (p > 1 + 1e-6).any():
        raise ValueError("probabilities must lie in 0..1; if these are logits, call them logits")
    off = np.abs(p.sum(axis=1) - 1).max(initial=0)
    if off > OFF:
        raise ValueError(
            f"the probabilities of an image must sum to 1; one sum is off by {off:.3g}"
        )
    return np.log(np.maximum(p, np.finfo(np.float64).tiny))


def to_logits(table: Table, numbers: IntArray) -> np.ndarray:
    """Return the scores as logits.

    `numbers` [N] are the labels in 0..K-1. ValueError if a label has the probability 0, which would
    make NLL infinite.
    """
    scores = table.scores
    if table.kind == "logits":
        return scores
    if table.kind == "probabilities":
        own = np.asarray(scores)[np.arange(len(numbers)), numbers] == 0
        logs = log_probabilities(scores)
    else:
        logs = np.asarray(scores, np.float64)
        if np.isnan(logs).any() or (logs == np.inf).any():
            raise ValueError("log-probabilities are NaN or infinite")
        own = logs[np.arange(len(numbers)), numbers] == -np.inf
        logs = np.maximum(logs, np.log(np.finfo(np.float64).tiny))
    if own.any():
        raise ValueError(
            f"the label of {counted(int(own.sum()), 'image')} has the probability 0, so NLL is "
            "infinite: export logits, or probabilities that were not rounded"
        )
    return logs
