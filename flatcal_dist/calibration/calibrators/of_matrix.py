"""Calibrators whose factors are a matrix, so that each class can correct every other one.

They have K^2 + K parameters, which few images per class over-fit. ODIR, the penalty on off-diagonal
factors and on the bias, holds them near a calibrator with few parameters. How strongly it does so
is chosen on a quarter of the images that may be fitted on.
"""

from abc import abstractmethod
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from flatcal_dist.calibration.calibrators.of_logits import LogitCalibrator, TemperatureScaling
from flatcal_dist.calibration.checks import FloatArray, IntArray, logits_and_labels
from flatcal_dist.calibration.softmax import log_softmax

# lambda, from the strongest penalty, which leaves next to nothing of the matrix, to the weakest
STRENGTHS = (10000.0, 1000.0, 100.0, 10.0, 1.0, 0.1, 0.01)
QUARTER = 4  # one image of so many judges the strengths


class _OfMatrix(LogitCalibrator):
    """softmax(x + V x + b) of inputs x [K], with V [K, K] and b [K] near 0.

    The fit minimises mean NLL + lambda (sum_{i != j} V_ij^2 / (K (K - 1)) + sum_j b_j^2 / K), and
    more where a subclass says so. Source of the penalty: Kull et al., Beyond temperature scaling
    (NeurIPS 2019), section 4, with lambda = mu.

    Args:
        strength: lambda. None chooses among `STRENGTHS`: the penalty is weakened as long as this
            lowers the NLL of every fourth image, fitted on the others.
    """

    diagonal = 0.0  # what the penalty of sum_j V_jj^2 / K is multiplied with
    _first = 0.0  # the diagonal of V from which the search begins

    def __init__(self, strength: float | None = None) -> None:
        if strength is not None and not strength > 0:
            raise ValueError(f"strength must be positive, got {strength}")
        self.strength = strength
        self.weight: FloatArray | None = None
        self.bias: FloatArray | None = None

    @abstractmethod
    def _prepare(self, z: np.ndarray, y: IntArray) -> None:
        """Fit what the inputs or the search need."""

    @abstractmethod
    def _inputs(self, z: np.ndarray) -> FloatArray:
        """Return the inputs x float64 [N, K] of logits [N, K]."""

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        """See `LogitCalibrator.fit`. `start` is not used: each fit sees its own images alone."""
        z, y = logits_and_labels(logits, labels)
        self._prepare(z, y)
        x, classes = self._inputs(z), z.shape[1]
        first: FloatArray = np.column_stack(
            [self._first * np.eye(classes), np.zeros(classes)]
        ).ravel()
        if self.strength is None:
            self.strength, first = self._chosen(x, y, first)
        found = self._minimum(x, y, self.strength, first)
        self.weight, self.bias = _parts(found, classes)
        return self

    def _chosen(self, x: FloatArray, y: IntArray, first: FloatArray) -> tuple[float, FloatArray]:
        """The strength whose fit does best on images that it has not seen, and this fit."""
        judged = np.arange(len(x)) % QUARTER == 0
        if judged.all():
            return STRENGTHS[0], first
        best, chosen = np.inf, (STRENGTHS[0], first)
        found = first
        for strength in STRENGTHS:
            found = self._minimum(x[~judged], y[~judged], strength, found)
            log_p = log_softmax(_apply(x[judged], *_parts(found, x.shape[1])))
            nll = -log_p[np.arange(len(log_p)), y[judged]].mean()
            if nll >= best:
                break
            best, chosen = nll, (strength, found)
        return chosen

    def _minimum(
        self, x: FloatArray, y: IntArray, strength: float, first: FloatArray
    ) -> FloatArray:
        images, classes = x.shape
        share = np.full((classes, classes), 1 / (classes * (classes - 1)))
        np.fill_diagonal(share, self.diagonal / classes)
        share = strength * np.column_stack([share, np.full(classes, 1 / classes)])
        pick = np.arange(images), y

        def penalised(flat: FloatArray) -> tuple[float, FloatArray]:
            log_p = log_softmax(_apply(x, *_parts(flat, classes)))
            loss = -log_p[pick].mean()
            p = np.exp(log_p)
            p[pick] -= 1
            slope = np.column_stack([p.T @ x, p.sum(axis=0)]) / images
            theta = flat.reshape(classes, classes + 1)
            penalty = share * theta
            return loss + (penalty * theta).sum(), (slope + 2 * penalty).ravel()

        options = {"maxiter": 200, "ftol": 1e-10, "gtol": 1e-5}
        found = minimize(penalised, first, jac=True, method="L-BFGS-B", options=options)
        if not np.isfinite(found.fun):
            raise ValueError(f"{type(self).__name__} found no finite optimum: {found.message}")
        return found.x

    def transform(self, logits: ArrayLike) -> FloatArray:
        if self.weight is None or self.bias is None:
            raise RuntimeError("fit the weights before transforming: call fit(logits, labels)")
        return _apply(self._inputs(np.asarray(logits)), self.weight, self.bias)


class MatrixScaling(_OfMatrix):
    """softmax((I + V) z / T + b), with a matrix V [K, K] and a bias b [K] near 0.

    `TemperatureScaling` fits T, and V and b depart from it as far as images ask for it: the penalty
    is ODIR and the same for the diagonal. So classes of few images keep the temperature.
    Source: Guo et al. (ICML 2017), section 4.2. The penalty is an addition.
    """

    diagonal = 1.0

    def __init__(self, strength: float | None = None) -> None:
        super().__init__(strength)
        self.scaling = TemperatureScaling()

    def _prepare(self, z: np.ndarray, y: IntArray) -> None:
        self.scaling.fit(z, y)

    def _inputs(self, z: np.ndarray) -> FloatArray:
        return self.scaling.transform(z)


class DirichletScaling(_OfMatrix):
    """softmax(W log p + b) of the probabilities p, with ODIR. The diagonal of W is free.

    Source: Kull et al. (NeurIPS 2019), sections 3 and 4, the linear parametrisation.
    """

    def _prepare(self, z: np.ndarray, y: IntArray) -> None:
        self._first = 1 / TemperatureScaling().fit(z, y).temperature - 1

    def _inputs(self, z: np.ndarray) -> FloatArray:
        return log_softmax(z)


def _parts(flat: FloatArray, classes: int) -> tuple[FloatArray, FloatArray]:
    """V [K, K] and b [K] of the vector in which the search holds them."""
    theta = flat.reshape(classes, classes + 1)
    return theta[:, :-1], theta[:, -1]


def _apply(x: FloatArray, weight: FloatArray, bias: FloatArray) -> FloatArray:
    return x + x @ weight.T + bias
