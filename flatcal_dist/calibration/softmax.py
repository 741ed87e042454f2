"""From logits to what is known about each image, in float64 and without saturation.

A confidence of 1 - 1e-20 rounds to 1.0. Such ties make a ranking arbitrary. The logarithm of the
confidence, -log1p(sum_{j != argmax} exp(z_j - z_max)), does not round. It is the score that ranks
images, and its exponential is the confidence that is binned. Logits are processed a few rows at a
time, so that no other array has N x K entries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import BoolArray, FloatArray, IntArray, logits_and_labels

if TYPE_CHECKING:
    from flatcal_dist.calibration.metrics.classwise import ClasswiseSums

CHUNK = 1 << 18  # entries at a time; in float64 they take 2 MB and stay in the cache
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Scores:
    """What a network, calibrated or not, says about each of N images. All arrays have shape [N].

    A calibrator of the confidence alone says nothing about the other classes. Its scores have no
    nll, brier and entropy.

    Args:
        correct: Which images are right.
        log_confidence: The logarithm of the confidence. It ranks images and does not saturate.
        nll: The negative log-likelihood of the label in nats, or None.
        brier: The Brier score over all classes, in [0, 2], or None.
        entropy: The entropy in nats, or None.
    """

    correct: BoolArray
    log_confidence: FloatArray
    nll: FloatArray | None
    brier: FloatArray | None
    entropy: FloatArray | None

    @property
    def confidence(self) -> FloatArray:
        """The confidence [N], in [0, 1]."""
        return np.exp(self.log_confidence)

    def column(self, name: Literal["nll", "brier", "entropy"]) -> FloatArray:
        """Return a column that depends on all classes.

        ValueError for the scores of a calibrator of the confidence alone, which have none.
        """
        found: FloatArray | None = getattr(self, name)
        if found is None:
            raise ValueError(f"these scores hold confidences alone, and no {name}")
        return found

    def take(self, chosen: BoolArray | IntArray) -> "Scores":
        """Return the scores of some of the images."""
        nll, brier, entropy = (
            None if column is None else column[chosen]
            for column in (self.nll, self.brier, self.entropy)
        )
        return Scores(self.correct[chosen], self.log_confidence[chosen], nll, brier, entropy)


def joined(parts: Sequence[Scores]) -> Scores:
    """Return the scores of several sets of images, one set after the other."""

    def column(name: Literal["nll", "brier", "entropy"]) -> FloatArray | None:
        known = [c for c in (getattr(part, name) for part in parts) if c is not None]
        return np.concatenate(known) if len(known) == len(parts) else None

    return Scores(
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.log_confidence for part in parts]),
        column("nll"),
        column("brier"),
        column("entropy"),
    )


@dataclass(frozen=True)
class ImageScores:
    """What a softmax says about each of N images. All arrays have shape [N].

    The last four are confidence scores in forms that do not saturate; higher means more confident.

    Args:
        prediction: The class of the largest logit, and the first one of several.
        rank: How many classes stand before the label. 0 means correct.
        log_confidence: The logarithm of the largest probability.
        nll: The negative log-likelihood of the label, in nats.
        brier: The sum over classes of (p_k - [k = label])^2, in [0, 2].
        entropy: The entropy, in nats.
        margin: -log(1 - (p_1 - p_2)), with the two largest probabilities.
        doctor: -log(1 - sum p^2).
        max_logit: The largest logit.
        energy: log sum exp of the logits.
    """

    prediction: IntArray
    rank: IntArray
    log_confidence: FloatArray
    nll: FloatArray
    brier: FloatArray
    entropy: FloatArray
    margin: FloatArray
    doctor: FloatArray
    max_logit: FloatArray
    energy: FloatArray

    @property
    def confidence(self) -> FloatArray:
        """The largest probability [N]."""
        return np.exp(self.log_confidence)

    @property
    def correct(self) -> BoolArray:
        """Which images are right [N]."""
        return self.rank == 0

    def scores(self, correct: BoolArray | None = None) -> Scores:
        """Return the columns that a record keeps."""
        own = self.correct if correct is None else correct
        return Scores(own, self.log_confidence, self.nll, self.brier, self.entropy)


def chunks(rows: int, classes: int) -> Iterator[slice]:
    """Return slices of about `CHUNK` entries that cover the rows of [rows, classes]."""
    keep_memory()
    size = max(1, CHUNK // classes)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def keep_memory() -> None:
    """Make the C library keep the memory of temporary arrays for the next ones.

    Otherwise glibc returns the memory to the system and asks for it again at every step of a loop,
    which takes longer than the arithmetic. It stops doing so once a larger block has been freed.
    With other C libraries this call costs nothing.
    """
    np.empty(31 << 20, dtype=np.uint8)  # glibc learns from blocks of up to 32 MB


def log_softmax(logits: ArrayLike) -> FloatArray:
    """Return the log softmax of logits [N, K] in float64.

    log p_k = (z_k - z_max) - log1p(sum_{j != argmax} exp(z_j - z_max)). The largest entry is exact
    to the last bit. ValueError for another shape, and for NaN or infinite values.
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2:
        raise ValueError(f"logits must have shape [N, K], got {z.shape}")
    if not np.isfinite(z).all():
        raise ValueError("logits hold NaN or infinite values")
    shifted, others, _ = _shift(z)
    return shifted - np.log1p(others.sum(axis=1))[:, None]


def log_confidence(logits: ArrayLike) -> FloatArray:
    """Return the log of the largest softmax probability [N] of each row of logits [N, K]."""
    z = np.asarray(logits)
    return score_images(z, np.zeros(len(z), np.int64)).log_confidence


def _shift(z: FloatArray) -> tuple[FloatArray, FloatArray, IntArray]:
    """z - z_max, its exponential with 0 at the argmax, and the argmax."""
    rows = np.arange(len(z))
    top = z.argmax(axis=1)
    shifted = z - z[rows, top][:, None]
    others = np.exp(shifted)
    others[rows, top] = 0.0
    return shifted, others, top


def score_images(
    logits: ArrayLike,
    labels: ArrayLike,
    temperature: float | FloatArray = 1.0,
    *,
    transform: Callable[[FloatArray], FloatArray] | None = None,
    classwise: "ClasswiseSums | None" = None,
) -> ImageScores:
    """Score logits / temperature against labels.

    Args:
        logits: The logits [N, K].
        labels: The labels int [N].
        temperature: One number, or one per image [N] as in cross-fitting.
        transform: A function of some rows of float64 logits that takes the place of the
            temperature.
        classwise: Sums to which the images are added.

    Raises:
        ValueError: `checks.logits_and_labels` refuses the input, or a temperature is not positive
            and finite.
    """
    z, y = logits_and_labels(logits, labels)
    t = np.broadcast_to(np.asarray(temperature, dtype=np.float64), (len(z),))
    if not ((t > 0) & np.isfinite(t)).all():
        raise ValueError("temperature must be positive and finite")
    parts = []
    for rows in chunks(*z.shape):
        chunk = z[rows].astype(np.float64)
        chunk = chunk / t[rows, None] if transform is None else transform(chunk)
        parts.append(_score_chunk(chunk, y[rows], classwise))
    return ImageScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _score_chunk(
    z: FloatArray, y: IntArray, classwise: "ClasswiseSums | None"
) -> tuple[np.ndarray, ...]:
    rows = np.arange(len(z))
    shifted, others, top = _shift(z)
    total = others.sum(axis=1)  # over all classes but the predicted one
    log_sum, square = np.log1p(total), np.vecdot(others, others)
    entropy = log_sum - np.vecdot(others, shifted) / (1 + total)
    # 1 - p_top is summed up, and not computed by a subtraction, so that it keeps its digits.
    rest, p_top, rest_square = total / (1 + total), 1 / (1 + total), square / (1 + total) ** 2
    log_p = shifted[rows, y] - log_sum
    right = top == y
    brier = rest_square + np.where(right, rest**2, p_top**2 + 1 - 2 * np.exp(log_p))
    doctor = rest * (1 + p_top) - rest_square
    margin = rest + others.max(axis=1) / (1 + total)
    z_top = z[rows, top]
    if classwise is not None:
        others[rows, top] = 1.0
        others /= (1 + total)[:, None]
        classwise.add(others, y)
    # If the next class lies 700 behind, 1 - p is 0 in float64: the scores end at 708.
    doctor, margin = (-np.log(np.maximum(x, TINY)) for x in (doctor, margin))
    return (
        top, _rank(z, y), -log_sum, -log_p, brier, np.maximum(entropy, 0.0),
        margin, doctor, z_top, z_top + log_sum,
    )  # fmt: skip


def _rank(z: FloatArray, y: IntArray) -> IntArray:
    """How many classes stand before the label. As in argmax, the first of equal classes leads."""
    z_label = z[np.arange(len(z)), y][:, None]
    rank = (z > z_label).sum(axis=1)
    equal = z == z_label
    tied = np.flatnonzero(equal.sum(axis=1) > 1)
    rank[tied] += (equal[tied] & (np.arange(z.shape[1]) < y[tied, None])).sum(axis=1)
    return rank
