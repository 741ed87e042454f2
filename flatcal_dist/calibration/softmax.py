"""From logits to what is known of each image, in float64 and without saturation.

A confidence of 1 - 1e-20 rounds to 1.0, and such ties make a ranking arbitrary. The logarithm of
the confidence, -log1p(sum_{j != argmax} exp(z_j - z_max)), does not round: it is the score that
ranks, and its exponential is the confidence that is binned.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .checks import BoolArray, FloatArray, IntArray, logits_and_labels

CHUNK = 256  # rows at a time: 1,000 classes in float64 are then 2 MB and stay in the cache


@dataclass(frozen=True)
class ImageScores:
    """What a softmax says about each of N images; all arrays have shape [N].

    prediction: first class of the largest logit. rank: classes placed before the label (0 means
    correct). log_confidence: log of the largest probability. nll in nats. brier: sum over classes
    of (p_k - [k = label])^2, in [0, 2]. entropy in nats.
    """

    prediction: IntArray
    rank: IntArray
    log_confidence: FloatArray
    nll: FloatArray
    brier: FloatArray
    entropy: FloatArray

    @property
    def confidence(self) -> FloatArray:
        return np.exp(self.log_confidence)

    @property
    def correct(self) -> BoolArray:
        return self.rank == 0


def log_softmax(logits: ArrayLike) -> FloatArray:
    """log softmax of logits [N, K] in float64; the largest entry is exact to the last bit.

    log p_k = (z_k - z_max) - log1p(sum_{j != argmax} exp(z_j - z_max)).
    """
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2:
        raise ValueError(f"logits must have shape [N, K], got {z.shape}")
    if not np.isfinite(z).all():
        raise ValueError("logits hold NaN or infinite values")
    shifted, _, log_sum = _shift(z)
    return shifted - log_sum[:, None]


def log_confidence(logits: ArrayLike) -> FloatArray:
    """Log of the largest softmax probability of each row of logits [N, K]; shape [N]."""
    z = np.asarray(logits)
    labels = np.zeros(len(z), np.int64)
    return score_images(z, labels).log_confidence


def _shift(z: FloatArray) -> tuple[FloatArray, IntArray, FloatArray]:
    """z - z_max, the argmax, and log sum exp(z - z_max) by log1p over the other classes."""
    rows = np.arange(len(z))
    top = z.argmax(axis=1)
    shifted = z - z[rows, top][:, None]
    others = np.exp(shifted)
    others[rows, top] = 0.0
    return shifted, top, np.log1p(others.sum(axis=1))


def score_images(
    logits: ArrayLike, labels: ArrayLike, temperature: float | FloatArray = 1.0
) -> ImageScores:
    """Score logits [N, K] / temperature against labels [N]; see ImageScores.

    temperature: one number, or one per image [N] (cross-fitting). Raises ValueError for what
    `checks.logits_and_labels` refuses and for temperatures that are not positive.
    """
    z, y = logits_and_labels(logits, labels)
    t = np.broadcast_to(np.asarray(temperature, dtype=np.float64), (len(z),))
    if not (t > 0).all():
        raise ValueError("temperature must be positive")
    parts = [
        _score_chunk(z[i : i + CHUNK].astype(np.float64) / t[i : i + CHUNK, None], y[i : i + CHUNK])
        for i in range(0, len(z), CHUNK)
    ]
    return ImageScores(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _score_chunk(z: FloatArray, y: IntArray) -> tuple[np.ndarray, ...]:
    rows, label_column = np.arange(len(z)), y[:, None]
    z_label = z[rows, y][:, None]
    # Of equal logits the lower class comes first, as argmax has it.
    before = np.arange(z.shape[1]) < label_column
    rank = ((z > z_label) | ((z == z_label) & before)).sum(axis=1)
    shifted, top, log_sum = _shift(z)
    p = np.exp(shifted - log_sum[:, None])
    entropy = log_sum - np.einsum("nk,nk->n", p, shifted)
    nll = log_sum - shifted[rows, y]
    p[rows, y] -= 1.0
    brier = np.einsum("nk,nk->n", p, p)
    return top, rank, -log_sum, nll, brier, np.maximum(entropy, 0.0)
