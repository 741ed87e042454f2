"""Calibrators that mend the probability of each class by itself, and then let them sum to 1.

The order of the classes may change, and with it the answer and the accuracy. Source: Zadrozny and
Elkan, Transforming classifier scores into accurate multiclass probability estimates (KDD 2002).
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.calibrators.of_logits import LogitCalibrator
from flatcal_dist.calibration.checks import (
    BoolArray,
    FloatArray,
    logits_and_labels,
    positive_integer,
)
from flatcal_dist.calibration.softmax import log_softmax

if TYPE_CHECKING:
    from sklearn.isotonic import IsotonicRegression

FLOOR = np.finfo(np.float64).eps  # what a probability of 0 counts as; scikit-learn's log_loss, too


class _OneVsRest(LogitCalibrator):
    """One function of the probability for each class. Its results are divided by their sum.

    If all results of an image are 0, all classes get the same probability.
    """

    classes = 0

    @abstractmethod
    def _fit_class(self, p: FloatArray, of_class: BoolArray) -> None:
        """Fit the next class on its probabilities p [N], and on which images are of it [N]."""

    @abstractmethod
    def _mend_class(self, k: int, p: FloatArray) -> FloatArray:
        """Return the mended probabilities [N] of class k."""

    def fit(self, logits: ArrayLike, labels: ArrayLike, start: Self | None = None) -> Self:
        z, y = logits_and_labels(logits, labels)
        p = np.exp(log_softmax(z))
        self._forget()
        for k in range(z.shape[1]):
            self._fit_class(p[:, k], y == k)
        self.classes = z.shape[1]
        return self

    @abstractmethod
    def _forget(self) -> None:
        """Drop an earlier fit."""

    def transform(self, logits: ArrayLike) -> FloatArray:
        """Return the logarithms of the mended probabilities [N, K]. RuntimeError before `fit`."""
        if not self.classes:
            raise RuntimeError("fit before transforming: call fit(logits, labels)")
        p = np.exp(log_softmax(logits))
        mended = np.column_stack([self._mend_class(k, p[:, k]) for k in range(self.classes)])
        total = mended.sum(axis=1, keepdims=True)
        mended = np.where(total > 0, mended / np.where(total > 0, total, 1.0), 1 / self.classes)
        return np.log(np.maximum(mended, FLOOR))


class OneVsRestIsotonic(_OneVsRest):
    """For each class, the rising function from its probability to its frequency.

    The function has the least squared error. scikit-learn fits it and interpolates between the
    probabilities of the fit; it is constant beyond them.
    """

    def __init__(self) -> None:
        self.curves: list[IsotonicRegression] = []

    def _forget(self) -> None:
        self.curves = []

    def _fit_class(self, p: FloatArray, of_class: BoolArray) -> None:
        from sklearn.isotonic import IsotonicRegression  # its import takes a second of each start

        curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
        self.curves.append(curve.fit(p, of_class.astype(np.float64)))

    def _mend_class(self, k: int, p: FloatArray) -> FloatArray:
        mended: FloatArray = self.curves[k].predict(p)
        return mended


class OneVsRestHistogram(_OneVsRest):
    """For each class, its frequency in bins of its probability.

    The bins have equal widths and are closed on the right. Bins of equal mass would put most images
    of a class into one bin if there are more classes than bins. A bin without images keeps its
    middle. Source: Zadrozny and Elkan (ICML 2001); several classes as in Guo et al. (ICML 2017),
    section 4.2.
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = positive_integer(bins, "bins")
        self.frequencies: list[FloatArray] = []

    def _forget(self) -> None:
        self.frequencies = []

    def _bin(self, p: FloatArray) -> np.ndarray:
        edges = np.linspace(0, 1, self.bins + 1)
        return np.clip(np.searchsorted(edges, p, side="left") - 1, 0, self.bins - 1)

    def _fit_class(self, p: FloatArray, of_class: BoolArray) -> None:
        index = self._bin(p)
        images = np.bincount(index, minlength=self.bins)
        hits = np.bincount(index, weights=of_class, minlength=self.bins)
        middle = (np.arange(self.bins) + 0.5) / self.bins
        self.frequencies.append(np.where(images > 0, hits / np.maximum(images, 1), middle))

    def _mend_class(self, k: int, p: FloatArray) -> FloatArray:
        return self.frequencies[k][self._bin(p)]
