"""Calibrators of the logits, which are fitted after training.

A temperature T divides the logits. T > 1 means that the network was over-confident. `crossfit`
decides which images a fit may score.
"""

import warnings
from abc import ABC, abstractmethod
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from flatcal_dist.calibration.checks import FloatArray, IntArray, logits_and_labels
from flatcal_dist.calibration.softmax import chunks, log_softmax

BOUNDS = (1e-3, 1e3)  # temperatures that a fit may return


def is_fitted(temperature: float) -> bool:
    """Return whether a fit found this temperature. If not, it ran to the end of its range."""
    return temperature not in BOUNDS


class LogitCalibrator(ABC):
    """A function of the logits that is fitted on some images and applied to others."""

    @abstractmethod
    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        """Fit on logits and labels, and return the calibrator itself.

        Args:
            logits: The logits [N, K].
            labels: The labels int [N].
            start: A fitted calibrator of this kind, from which the search begins.

        Raises:
            ValueError: `checks.logits_and_labels` refuses the input.
        """

    @abstractmethod
    def transform(self, logits: ArrayLike) -> FloatArray:
        """Return float64 logits [N, K] whose softmax is calibrated. RuntimeError before `fit`."""


class Identity(LogitCalibrator):
    """The network as it is."""

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        logits_and_labels(logits, labels)
        return self

    def transform(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(logits, dtype=np.float64)


class TemperatureScaling(LogitCalibrator):
    """softmax(z / T), where T minimises the NLL.

    The NLL is convex in b = 1/T. Newton's method in u = log b finds the zero of its slope,
    mean(E_p[z] - z_label), inside a shrinking bracket. A step that would leave the bracket is
    replaced by a bisection. There is no finite optimum if every label has the largest logit, or if
    labels score below the average class. T is then clamped to `BOUNDS` with a RuntimeWarning.
    Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 4.2.

    Attributes:
        standard_error: The standard error of log T over images. None if T is clamped, or if there
            is one image.
    """

    def __init__(self, temperature: float | None = None) -> None:
        self._temperature = temperature
        self.standard_error: float | None = None

    @property
    def temperature(self) -> float:
        """The temperature T. RuntimeError before `fit`."""
        if self._temperature is None:
            raise RuntimeError("fit the temperature before transforming: call fit(logits, labels)")
        return self._temperature

    @classmethod
    def at(cls, temperature: float) -> Self:
        """Return a scaling by a known temperature."""
        return cls(temperature)

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        z, y = logits_and_labels(logits, labels)
        z_label = z[np.arange(len(z)), y].astype(np.float64)
        high = z.max(axis=1)
        self.standard_error = None
        if (high == z.min(axis=1)).all():
            self._temperature = 1.0  # every temperature gives the uniform distribution
        elif (z_label == high).all():
            self._temperature = _clamp(BOUNDS[0], "every label already has the largest logit")
        elif (z.mean(axis=1, dtype=np.float64) - z_label).mean() >= 0:
            self._temperature = _clamp(BOUNDS[1], "the labels score no higher than others")
        else:
            first = 1.0 if start is None else start.temperature
            temperature, self.standard_error = _solve(z, y, first)
            # The result is rounded well above the error of the search. So it does not depend on
            # where the search began.
            self._temperature = temperature if start is None else float(f"{temperature:.10e}")
        return self

    def transform(self, logits: ArrayLike) -> FloatArray:
        return np.asarray(logits, dtype=np.float64) / self.temperature

    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of T over images, by the sandwich variance of log T."""
        if self.standard_error is None:
            return None
        factor = float(np.exp(1.959964 * self.standard_error))
        return self.temperature / factor, self.temperature * factor


def _clamp(bound: float, reason: str) -> float:
    warnings.warn(
        "no finite temperature minimises the NLL of the images, or of those outside of a fold: "
        f"{reason}; clamped to {bound:g}",
        RuntimeWarning,
        stacklevel=3,
    )
    return bound


def _solve(z: np.ndarray, y: IntArray, start: float) -> tuple[float, float | None]:
    low, high = -np.log(BOUNDS[1]), -np.log(BOUNDS[0])
    u = -np.log(start)
    for _ in range(100):
        slope, curvature, square = _slope(z, y, np.exp(u))
        if slope == 0:
            break
        low, high = (u, high) if slope < 0 else (low, u)
        step = slope / (np.exp(u) * curvature) if curvature > 0 else np.inf
        target = u - step
        newton = low < target < high
        if not newton:
            target = (low + high) / 2
        moved, u = abs(target - u), target
        # A Newton step squares the error, so that the last step needs no check.
        if moved < (1e-8 if newton else 1e-12):
            break
    if min(u + np.log(BOUNDS[1]), -np.log(BOUNDS[0]) - u) < 1e-9:
        return _clamp(BOUNDS[1] if u < 0 else BOUNDS[0], "the optimum lies beyond the bounds"), None
    temperature = float(np.exp(-u))
    if len(z) < 2 or curvature <= 0:
        return temperature, None
    return temperature, float(np.sqrt(square / len(z)) / (np.exp(u) * curvature))


def _slope(z: np.ndarray, y: IntArray, inverse: float) -> tuple[float, float, float]:
    """The first and second derivative of the NLL in 1/T, and the mean square of its summands.

    They are the means of E_p[z] - z_label, of Var_p[z], and of the square of the former.
    """
    slope = curvature = squares = 0.0
    for rows in chunks(*z.shape):
        s = z[rows].astype(np.float64)
        s -= s.max(axis=1, keepdims=True)
        p = np.exp(inverse * s)
        total = p.sum(axis=1)
        p *= s
        mean, square = p.sum(axis=1) / total, np.vecdot(p, s) / total
        each = mean - s[np.arange(len(s)), y[rows]]
        slope += each.sum()
        squares += each @ each
        curvature += (square - mean**2).sum()
    return slope / len(z), curvature / len(z), squares / len(z)


class EnsembleTemperatureScaling(LogitCalibrator):
    """w_0 softmax(z / T) + w_1 softmax(z) + w_2 / K, with positive weights that sum to 1.

    `TemperatureScaling` fits T. The weights minimise the NLL, which is convex in them. The squared
    error that the authors minimise lowers ECE further and makes the NLL worse. The predicted class
    stays the same. Source: Zhang, Kailkhura and Han, Mix-n-Match (ICML 2020), section 3.1.
    """

    def __init__(self) -> None:
        self.scaling = TemperatureScaling()
        self.weights: FloatArray | None = None

    @property
    def temperature(self) -> float:
        """The temperature T. RuntimeError before `fit`."""
        return self.scaling.temperature

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        z, y = logits_and_labels(logits, labels)
        self.scaling.fit(z, y, None if start is None else start.scaling)
        parts = []
        for rows in chunks(*z.shape):
            chunk, label = z[rows].astype(np.float64), y[rows]
            pick = np.arange(len(chunk)), label
            scaled = np.exp(log_softmax(chunk / self.temperature)[pick])
            parts.append(np.stack([scaled, np.exp(log_softmax(chunk)[pick])], axis=1))
        of_label = np.concatenate(parts)
        self.weights = _mixture(np.column_stack([of_label, np.full(len(z), 1 / z.shape[1])]))
        return self

    def transform(self, logits: ArrayLike) -> FloatArray:
        if self.weights is None:
            raise RuntimeError("fit the weights before transforming: call fit(logits, labels)")
        z = np.asarray(logits, dtype=np.float64)
        scaled, plain, uniform = np.log(self.weights)  # weights are at least 1e-12
        mixed = np.logaddexp(log_softmax(z / self.temperature) + scaled, log_softmax(z) + plain)
        return np.logaddexp(mixed, uniform - np.log(z.shape[1]))


def _mixture(p: FloatArray) -> FloatArray:
    """The weights [J] >= 0, which sum to 1, of the mixture sum_j w_j p_j with the least NLL.

    `p` [N, J] holds the probabilities of the labels.
    """
    p = np.maximum(p, np.finfo(np.float64).tiny)

    def nll(weights: FloatArray) -> tuple[float, FloatArray]:
        mixed = p @ weights
        return float(-np.log(mixed).mean()), -(p / mixed[:, None]).mean(axis=0)

    parts = p.shape[1]
    found = minimize(
        nll,
        np.full(parts, 1 / parts),
        jac=True,
        method="SLSQP",
        bounds=[(1e-12, 1.0)] * parts,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 200},
    )
    weights = np.clip(found.x, 0.0, 1.0)
    return weights / weights.sum()


class VectorScaling(LogitCalibrator):
    """softmax(z w / T + b), with a factor w [K] near 1 and a bias b [K] near 0 per class.

    `TemperatureScaling` fits T. The fit of w and b minimises the mean NLL plus
    (|w - 1|^2 + |b|^2) / (2 N sd^2), a normal prior of standard deviation `sd`. Without the prior,
    1,000 classes of 40 images each are over-fitted. The predicted class may change. Source: Guo et
    al. (ICML 2017), section 4.2, with the bias. The penalty is an addition.
    """

    def __init__(self, sd: float = 0.1) -> None:
        if not sd > 0:
            raise ValueError(f"sd must be positive, got {sd}")
        self.sd = sd
        self.scaling = TemperatureScaling()
        self.weight: FloatArray | None = None
        self.bias: FloatArray | None = None

    @property
    def temperature(self) -> float:
        """The temperature T. RuntimeError before `fit`."""
        return self.scaling.temperature

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        z, y = logits_and_labels(logits, labels)
        classes = z.shape[1]
        self.scaling.fit(z, y, None if start is None else start.scaling)
        found = minimize(
            lambda x: self._penalised(z, y, x),
            np.zeros(2 * classes),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 200, "ftol": 1e-12, "gtol": 1e-7},
        )
        if not np.isfinite(found.fun):
            raise ValueError(f"vector scaling found no finite optimum: {found.message}")
        self.weight, self.bias = 1 + found.x[:classes], found.x[classes:]
        return self

    def _penalised(self, z: np.ndarray, y: IntArray, x: FloatArray) -> tuple[float, FloatArray]:
        images, classes = z.shape
        w, b = (1 + x[:classes]) / self.temperature, x[classes:]
        loss, slope_w, slope_b = 0.0, np.zeros(classes), np.zeros(classes)
        for rows in chunks(images, classes):
            chunk = z[rows].astype(np.float64)
            log_p = log_softmax(chunk * w + b)
            pick = np.arange(len(chunk)), y[rows]
            loss -= log_p[pick].sum()
            p = np.exp(log_p)
            p[pick] -= 1
            slope_b += p.sum(axis=0)
            slope_w += np.einsum("nk,nk->k", p, chunk)
        precision = 1 / self.sd**2
        slope = np.concatenate([slope_w / self.temperature, slope_b]) + precision * x
        return (loss + precision * (x @ x) / 2) / images, slope / images

    def transform(self, logits: ArrayLike) -> FloatArray:
        if self.weight is None or self.bias is None:
            raise RuntimeError("fit the weights before transforming: call fit(logits, labels)")
        z = np.asarray(logits, dtype=np.float64)
        return z * (self.weight / self.temperature) + self.bias
