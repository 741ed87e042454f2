"""Calibrators of the logits, fitted after training. Temperature T divides the logits: T > 1 means
that the network was over-confident.

Every calibrator has `fit(logits [N, K], labels [N], start=None)`, which returns the calibrator
itself (`start`: another of its kind, already fitted, from which the search begins), and
`transform(logits) -> [N, K]` float64, whose softmax is calibrated. What may be scored with which
fit is the business of `crossfit`.
"""

import warnings
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from flatcal_dist.calibration.checks import FloatArray, IntArray, logits_and_labels
from flatcal_dist.calibration.softmax import chunks, log_softmax

BOUNDS = (1e-3, 1e3)  # temperatures that a fit may return


def is_fitted(temperature: float) -> bool:
    """Whether a fit found this temperature, and did not run to the end of its range."""
    return temperature not in BOUNDS


class Identity:
    """The network as it is."""

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        """Check logits and labels; there is nothing to fit."""
        logits_and_labels(logits, labels)
        return self

    def transform(self, logits: ArrayLike) -> FloatArray:
        """The logits in float64."""
        return np.asarray(logits, dtype=np.float64)


class TemperatureScaling:
    """softmax(z / T), T the minimiser of the NLL.

    The NLL is convex in b = 1/T; the zero of its slope, mean(E_p[z] - z_label), is found in
    u = log b by Newton's method inside a shrinking bracket, with bisection where a step leaves it.
    Source: Guo et al., On Calibration of Modern Neural Networks (ICML 2017), section 4.2.

    temperature: T, None before `fit`. standard_error: of log T over images, None where T is
    clamped or there is one image.
    """

    def __init__(self) -> None:
        self.temperature: float | None = None
        self.standard_error: float | None = None

    @classmethod
    def at(cls, temperature: float) -> Self:
        """With a temperature that is known."""
        scaling = cls()
        scaling.temperature = temperature
        return scaling

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        """Fit on logits [N, K] and labels [N].

        Where there is no finite optimum (every label has the largest logit, or the labels
        score below the average class) T is clamped to `BOUNDS` with a RuntimeWarning. ValueError
        for what `checks.logits_and_labels` refuses.
        """
        z, y = logits_and_labels(logits, labels)
        z_label = z[np.arange(len(z)), y].astype(np.float64)
        high = z.max(axis=1)
        self.standard_error = None
        if (high == z.min(axis=1)).all():
            self.temperature = 1.0  # every temperature gives the uniform distribution
        elif (z_label == high).all():
            self.temperature = _clamp(BOUNDS[0], "every label already has the largest logit")
        elif (z.mean(axis=1, dtype=np.float64) - z_label).mean() >= 0:
            self.temperature = _clamp(BOUNDS[1], "the labels score no higher than other classes")
        else:
            first = 1.0 if start is None else start.temperature
            temperature, self.standard_error = _solve(z, y, first)
            # Rounded well above the error of the search, the result cannot tell where it began.
            self.temperature = temperature if start is None else float(f"{temperature:.10e}")
        return self

    def transform(self, logits: ArrayLike) -> FloatArray:
        """logits / T, float64; RuntimeError before `fit`."""
        if self.temperature is None:
            raise RuntimeError("fit the temperature before transforming: call fit(logits, labels)")
        return np.asarray(logits, dtype=np.float64) / self.temperature

    def interval(self) -> tuple[float, float] | None:
        """95 % interval of T over images, by the sandwich variance of log T."""
        if self.standard_error is None:
            return None
        factor = float(np.exp(1.959964 * self.standard_error))
        return self.temperature / factor, self.temperature * factor


def _clamp(bound: float, reason: str) -> float:
    warnings.warn(
        f"no finite temperature minimises the NLL: {reason}; clamped to {bound:g}",
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
        # A Newton step squares the error, so that the last one needs no check.
        if moved < (1e-8 if newton else 1e-12):
            break
    if min(u + np.log(BOUNDS[1]), -np.log(BOUNDS[0]) - u) < 1e-9:
        return _clamp(BOUNDS[1] if u < 0 else BOUNDS[0], "the optimum lies beyond the bounds"), None
    temperature = float(np.exp(-u))
    if len(z) < 2 or curvature <= 0:
        return temperature, None
    return temperature, float(np.sqrt(square / len(z)) / (np.exp(u) * curvature))


def _slope(z: np.ndarray, y: IntArray, inverse: float) -> tuple[float, float, float]:
    """Means of E_p[z] - z_label and Var_p[z], the derivatives of the NLL in 1/T, and of the
    square of the first.
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


class EnsembleTemperatureScaling:
    """w_0 softmax(z / T) + w_1 softmax(z) + w_2 / K with weights that are positive and sum to 1.

    T is that of `TemperatureScaling`; the weights minimise the NLL, in which they are convex (the
    authors' squared error lowers ECE further, at the price of a worse NLL). Keeps the argmax.
    Source: Zhang, Kailkhura and Han, Mix-n-Match (ICML 2020), section 3.1.
    """

    def __init__(self) -> None:
        self.temperature: float | None = None
        self.weights: FloatArray | None = None

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        """Fit on logits [N, K] and labels [N]; errors and warnings as in `TemperatureScaling`."""
        z, y = logits_and_labels(logits, labels)
        first = None if start is None else TemperatureScaling.at(start.temperature)
        self.temperature = TemperatureScaling().fit(z, y, first).temperature
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
        """Logarithms of the mixture's probabilities; RuntimeError before `fit`."""
        if self.weights is None:
            raise RuntimeError("fit the weights before transforming: call fit(logits, labels)")
        z = np.asarray(logits, dtype=np.float64)
        scaled, plain, uniform = np.log(self.weights)  # none is 0: the bound is 1e-12
        mixed = np.logaddexp(log_softmax(z / self.temperature) + scaled, log_softmax(z) + plain)
        return np.logaddexp(mixed, uniform - np.log(z.shape[1]))


def _mixture(p: FloatArray) -> FloatArray:
    """Weights [J] >= 0, summing to 1, of the mixture sum_j w_j p_j that has the least NLL; p [N, J]
    holds the probabilities of the labels.
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


class VectorScaling:
    """softmax(z w / T + b) with a factor w [K] and a bias b [K] per class, kept near 1 and 0.

    Minimises mean NLL + (|w - 1|^2 + |b|^2) / (2 N sd^2): a normal prior of standard deviation
    `sd`, without which 1,000 classes of 40 images each are over-fitted. T is that of
    `TemperatureScaling`. May change the argmax. Source: Guo et al. (ICML 2017), section 4.2, with
    the bias; the penalty is ours.
    """

    def __init__(self, sd: float = 0.1) -> None:
        if not sd > 0:
            raise ValueError(f"sd must be positive, got {sd}")
        self.sd = sd
        self.temperature: float | None = None
        self.weight: FloatArray | None = None
        self.bias: FloatArray | None = None

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        """Fit on logits [N, K] and labels [N]; errors and warnings as in `TemperatureScaling`."""
        z, y = logits_and_labels(logits, labels)
        classes = z.shape[1]
        first = None if start is None else TemperatureScaling.at(start.temperature)
        self.temperature = TemperatureScaling().fit(z, y, first).temperature
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
        """logits w / T + b, float64; RuntimeError before `fit`."""
        if self.weight is None:
            raise RuntimeError("fit the weights before transforming: call fit(logits, labels)")
        z = np.asarray(logits, dtype=np.float64)
        return z * (self.weight / self.temperature) + self.bias
