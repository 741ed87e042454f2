"""Calibrators fitted after training. Temperature T divides the logits: T > 1 means that the
network was over-confident.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .checks import FloatArray, IntArray, logits_and_labels, positive_integer
from .softmax import CHUNK

BOUNDS = (1e-3, 1e3)  # temperatures that a fit may return


class TemperatureScaling:
    """softmax(z / T), T the minimiser of the NLL.

    The NLL is convex in b = 1/T; the zero of its slope, mean(E_p[z] - z_label), is found in
    u = log b by Newton's method inside a shrinking bracket, with bisection where a step leaves it.
    Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 4.2.
    """

    def __init__(self) -> None:
        self.temperature: float | None = None

    def fit(self, logits: ArrayLike, labels: ArrayLike) -> "TemperatureScaling":
        """Fit on logits [N, K] and labels [N].

        Where there is no finite optimum (every label has the largest logit, or the labels
        score below the average class) T is clamped to `BOUNDS` with a RuntimeWarning. ValueError
        for what `checks.logits_and_labels` refuses.
        """
        z, y = logits_and_labels(logits, labels)
        z_label = z[np.arange(len(z)), y].astype(np.float64)
        spread = z.max(axis=1) - z.min(axis=1)
        if not (spread > 0).any():
            self.temperature = 1.0  # every temperature gives the uniform distribution
        elif (z_label == z.max(axis=1)).all():
            self.temperature = _clamp(BOUNDS[0], "every label already has the largest logit")
        elif (z.mean(axis=1, dtype=np.float64) - z_label).mean() >= 0:
            self.temperature = _clamp(BOUNDS[1], "the labels score no higher than other classes")
        else:
            self.temperature = _solve(z, y)
        return self

    def transform(self, logits: ArrayLike) -> FloatArray:
        """logits / T, float64; RuntimeError before `fit`."""
        if self.temperature is None:
            raise RuntimeError("fit the temperature before transforming: call fit(logits, labels)")
        return np.asarray(logits, dtype=np.float64) / self.temperature


def _clamp(bound: float, reason: str) -> float:
    warnings.warn(
        f"no finite temperature minimises the NLL: {reason}; clamped to {bound:g}",
        RuntimeWarning,
        stacklevel=3,
    )
    return bound


def _solve(z: np.ndarray, y: IntArray) -> float:
    low, high = -np.log(BOUNDS[1]), -np.log(BOUNDS[0])
    u = 0.0
    for _ in range(100):
        slope, curvature = _slope(z, y, np.exp(u))
        if slope == 0:
            break
        low, high = (u, high) if slope < 0 else (low, u)
        step = slope / (np.exp(u) * curvature) if curvature > 0 else np.inf
        target = u - step
        newton = low < target < high
        if not newton:
            target = (low + high) / 2
        moved, u = abs(target - u), target
        # A Newton step squares the error, so that the last one needs no check.
        if moved < (1e-8 if newton else 1e-12):
            break
    if min(u + np.log(BOUNDS[1]), -np.log(BOUNDS[0]) - u) < 1e-9:
        return _clamp(BOUNDS[1] if u < 0 else BOUNDS[0], "the optimum lies beyond the bounds")
    return float(np.exp(-u))


def _slope(z: np.ndarray, y: IntArray, inverse: float) -> tuple[float, float]:
    """Mean of E_p[z] - z_label and of Var_p[z]: first and second derivative of the NLL in 1/T."""
    slope = curvature = 0.0
    for i in range(0, len(z), CHUNK):
        s = z[i : i + CHUNK].astype(np.float64)
        s -= s.max(axis=1, keepdims=True)
        p = np.exp(inverse * s)
        total = p.sum(axis=1)
        p *= s
        mean, square = p.sum(axis=1) / total, np.vecdot(p, s) / total
        slope += (mean - s[np.arange(len(s)), y[i : i + CHUNK]]).sum()
        curvature += (square - mean**2).sum()
    return slope / len(z), curvature / len(z)


@dataclass(frozen=True)
class FoldTemperatures:
    """Cross-fitted temperatures.

    fold [N]: the fold of each image. per_fold: the temperature that scores each fold, fitted on
    all the others; None for a fold without images. temperature: fitted on all images, the number
    to report and to ship.
    """

    fold: IntArray
    per_fold: tuple[float | None, ...]
    temperature: float

    @property
    def per_image(self) -> FloatArray:
        """The out-of-fold temperature of each image [N]."""
        table = np.array([1.0 if t is None else t for t in self.per_fold])
        return table[self.fold]


def fold_of(ids: Sequence[str], folds: int = 5, seed: int = 0) -> IntArray:
    """Fold of each id: SHA-256 of seed and id, modulo folds; the same on every machine."""
    positive_integer(folds, "folds")
    digests = (hashlib.sha256(f"{seed}:{i}".encode()).digest()[:8] for i in ids)
    return np.array([int.from_bytes(d, "big") % folds for d in digests], dtype=np.int64)


def fit_fold_temperatures(
    ids: Sequence[str], logits: ArrayLike, labels: ArrayLike, folds: int = 5, seed: int = 0
) -> FoldTemperatures:
    """Fit one temperature on all images, and for each fold one on the images of the others.

    ids: N unique strings; logits [N, K]; labels int [N]; folds >= 2. A fold outside of which there
    is no image keeps T = 1, with a RuntimeWarning. ValueError for duplicated ids and for what
    `checks.logits_and_labels` refuses.
    """
    z, y = logits_and_labels(logits, labels)
    if len(ids) != len(z):
        raise ValueError(f"ids and logits must have equal lengths, got {len(ids)} and {len(z)}")
    if len(set(ids)) != len(ids):
        raise ValueError("ids must be unique: a duplicate would be fitted on and scored by itself")
    if positive_integer(folds, "folds") < 2:
        raise ValueError("folds must be at least 2 for cross-fitting")
    fold = fold_of(ids, folds, seed)
    overall = TemperatureScaling().fit(z, y).temperature
    per_fold: list[float | None] = []
    for f in range(folds):
        held_out = fold == f
        if not held_out.any():
            per_fold.append(None)
        elif held_out.all():
            warnings.warn("too few images to cross-fit: T = 1", RuntimeWarning, stacklevel=2)
            per_fold.append(1.0)
        else:
            # Not started from the overall optimum, which knows the labels that are held out.
            fitted = TemperatureScaling().fit(z[~held_out], y[~held_out])
            per_fold.append(fitted.temperature)
    return FoldTemperatures(fold, tuple(per_fold), overall)


@dataclass(frozen=True)
class CrossFit(FoldTemperatures):
    """FoldTemperatures together with the logits [N, K] divided by them."""

    logits: FloatArray


def cross_fit_temperature(
    ids: Sequence[str], logits: ArrayLike, labels: ArrayLike, folds: int = 5, seed: int = 0
) -> CrossFit:
    """Temperature scaling in which no image is scored by a temperature fitted on it.

    Returns the out-of-fold logits [N, K] in float64, the temperatures per fold and the overall
    one. Arguments and errors as in `fit_fold_temperatures`.
    """
    fit = fit_fold_temperatures(ids, logits, labels, folds, seed)
    transformed = np.asarray(logits, dtype=np.float64) / fit.per_image[:, None]
    return CrossFit(fit.fold, fit.per_fold, fit.temperature, transformed)
