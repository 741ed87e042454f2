"""Calibrators of the confidence alone.

They change how sure the network says it is of its answer, and say nothing about the other classes.
The answers stay, and so does the accuracy. Many images get the same calibrated confidence. Such
images are ties, so that a ranking by it is coarser.
"""

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray, confidence_and_correct, positive_integer
from flatcal_dist.calibration.metrics.calibration_errors import equal_mass_edges
from flatcal_dist.calibration.metrics.corp import isotonic_curve


class TopLabelIsotonic:
    """The rising step function from confidence to accuracy with the least squared error.

    It is interpolated between the confidences of the fit, and constant beyond them.
    Source: Zadrozny and Elkan, Transforming classifier scores (KDD 2002), applied to the
    predicted class alone as in Gupta and Ramdas, Top-label calibration (ICLR 2022).
    """

    def __init__(self) -> None:
        self.confidence: FloatArray | None = None
        self.accuracy: FloatArray | None = None

    def fit(self, confidence: ArrayLike, correct: ArrayLike) -> Self:
        """Fit on confidence [N] and correct [N], and return the calibrator itself."""
        curve = isotonic_curve(confidence, correct)
        self.confidence, self.accuracy = curve.confidence, curve.accuracy
        return self

    def transform(self, confidence: ArrayLike) -> FloatArray:
        """Return the calibrated confidence [N]. RuntimeError before `fit`."""
        if self.confidence is None or self.accuracy is None:
            raise RuntimeError("fit before transforming: call fit(confidence, correct)")
        c = np.asarray(confidence, dtype=np.float64)
        return np.interp(c, self.confidence, self.accuracy)


class TopLabelHistogram:
    """The accuracy of each of `bins` bins of equal mass. Ties share a bin.

    Source: Zadrozny and Elkan (ICML 2001), for the predicted class alone as in Gupta and Ramdas
    (ICLR 2022).
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = positive_integer(bins, "bins")
        self.edges: FloatArray | None = None
        self.accuracy: FloatArray | None = None

    def fit(self, confidence: ArrayLike, correct: ArrayLike) -> Self:
        """Fit on confidence [N] and correct [N], and return the calibrator itself."""
        c, a = confidence_and_correct(confidence, correct)
        self.edges = equal_mass_edges(c, self.bins)
        index = np.searchsorted(self.edges, c, side="left")
        self.accuracy = np.bincount(index, weights=a) / np.bincount(index)
        return self

    def transform(self, confidence: ArrayLike) -> FloatArray:
        """Return the calibrated confidence [N]. RuntimeError before `fit`."""
        if self.edges is None or self.accuracy is None:
            raise RuntimeError("fit before transforming: call fit(confidence, correct)")
        c = np.asarray(confidence, dtype=np.float64)
        return self.accuracy[np.searchsorted(self.edges, c, side="left")]
