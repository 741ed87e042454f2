"""From logits to what is known of each image, in float64 and without saturation.

A confidence of 1 - 1e-20 rounds to 1.0, and such ties make a ranking arbitrary. The logarithm of
the confidence, -log1p(sum_{j != argmax} exp(z_j - z_max)), does not round: it is the score that
ranks, and its exponential is the confidence that is binned. Logits are taken a few rows at a
time, so that nothing but them has N x K entries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import BoolArray, FloatArray, IntArray, logits_and_labels

if TYPE_CHECKING:
    from flatcal_dist.calibration.metrics.classwise import ClasswiseSums

CHUNK = 1 << 18  # entries at a time: in float64 they are 2 MB and stay in the cache
TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Scores:
    """What a network, calibrated or not, says of each of N images; all arrays have shape [N].

    log_confidence ranks images (it does not saturate); `confidence` is its exponential. nll and
    entropy in nats; brier over all classes, in [0, 2]; these three are None for a calibrator of
    the confidence alone, which says nothing of the other classes.
    """

    correct: BoolArray
    log_confidence: FloatArray
    nll: FloatArray | None
    brier: FloatArray | None
    entropy: FloatArray | None

    @property
    def confidence(self) -> FloatArray:
        return np.exp(self.log_confidence)

    def take(self, chosen: BoolArray | IntArray) -> "Scores":
        """The scores of some of the images."""
        columns = (getattr(self, f.name) for f in fields(self))
        return Scores(*(None if c is None else c[chosen] for c in columns))


@dataclass(frozen=True)
class ImageScores:
    """What a softmax says about each of N images; all arrays have shape [N].

    prediction: first class of the largest logit. rank: classes placed before the label (0 means
    correct). log_confidence: log of the largest probability. nll in nats. brier: sum over classes
    of (p_k - [k = label])^2, in [0, 2]. entropy in nats.
    The rest are confidence scores, higher meaning more confident, in forms that do not saturate:
    margin: -log(1 - (p_1 - p_2)) of the two largest probabilities. doctor: -log(1 - sum p^2).
    max_logit. energy: log sum exp of the logits.
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
        return np.exp(self.log_confidence)

    @property
    def correct(self) -> BoolArray:
        return self.rank == 0

    def scores(self, correct: BoolArray | None = None) -> Scores:
        """The columns that a record keeps."""
        own = self.correct if correct is None else correct
        return Scores(own, self.log_confidence, self.nll, self.brier, self.entropy)


def chunks(rows: int, classes: int) -> Iterator[slice]:
    """Slices of about `CHUNK` entries that cover the rows of [rows, classes]."""
    keep_memory()
    size = max(1, CHUNK // classes)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def keep_memory() -> None:
    """Have the C library keep the memory of temporary arrays for the next ones.

    glibc returns it to the system and asks for it again at every step of a loop, which takes
    longer than the arithmetic, until it has seen one larger block freed. Costs nothing elsewhere.
    """
    np.empty(31 << 20, dtype=np.uint8)  # 32 MB is the most that it learns from


def log_softmax(logits: ArrayLike) -> FloatArray:
    """log softmax of logits [N, K] in float64; the largest entry is exact to the last bit.

    log p_k = (z_k - z_max) - log1p(sum_{j != argmax} exp(z_j - z_max)).
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2:
        raise ValueError(f"logits must have shape [N, K], got {z.shape}")
    if not np.isfinite(z).all():
        raise ValueError("logits hold NaN or infinite values")
    shifted, others, _ = _shift(z)
    return shifted - np.log1p(others.sum(axis=1))[:, None]


def log_confidence(logits: ArrayLike) -> FloatArray:
    """Log of the largest softmax probability of each row of logits [N, K]; shape [N]."""
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
    """Score logits [N, K] / temperature against labels [N]; see ImageScores.

    temperature: one number, or one per image [N] (cross-fitting). transform: instead, a function
    of some rows of float64 logits. classwise: sums to which the images are added on the way.
    Raises ValueError for what `checks.logits_and_labels` refuses and for temperatures that are
    not positive and finite.
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
    total = others.sum(axis=1)  # of exp(z_j - z_max) over all classes but the first largest
    log_sum, square = np.log1p(total), np.vecdot(others, others)
    entropy = log_sum - np.vecdot(others, shifted) / (1 + total)
    # What is left to 1 is summed, not subtracted from 1, so that it keeps its digits.
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
    # Where the next class is 700 behind nothing is left to 1: the scores end at 708.
    doctor, margin = (-np.log(np.maximum(x, TINY)) for x in (doctor, margin))
    return (
        top, _rank(z, y), -log_sum, -log_p, brier, np.maximum(entropy, 0.0),
        margin, doctor, z_top, z_top + log_sum,
    )  # fmt: skip


def _rank(z: FloatArray, y: IntArray) -> IntArray:
    """Classes before the label; of equal logits the lower class comes first, as argmax has it."""
    z_label = z[np.arange(len(z)), y][:, None]
    rank = (z > z_label).sum(axis=1)
    equal = z == z_label
    tied = np.flatnonzero(equal.sum(axis=1) > 1)
    rank[tied] += (equal[tied] & (np.arange(z.shape[1]) < y[tied, None])).sum(axis=1)
    return rank
