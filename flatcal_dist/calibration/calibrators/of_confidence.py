"""Calibrators of the confidence alone: they mend how sure the network says it is of its answer,
and say nothing of the other classes. The answers, and so the accuracy, stay.

Both have `fit(confidence [N], correct [N])`, which returns the calibrator itself, and
`transform(confidence [N]) -> [N]`. Equal outputs are ties: a ranking by them is coarser.
"""

from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from flatcal_dist.calibration.checks import FloatArray, confidence_and_correct, positive_integer
from flatcal_dist.calibration.metrics.calibration_errors import equal_mass_edges
from flatcal_dist.calibration.metrics.corp import isotonic_curve


class TopLabelIsotonic:
    """The rising step function from confidence to accuracy with the least squared error.

    Between two confidences seen in fitting it is interpolated, beyond them it is constant.
    Source: Zadrozny and Elkan, Transforming classifier scores (KDD 2002), applied to the
    predicted class alone as in Gupta and Ramdas, Top-label calibration (ICLR 2022).
    """

    def __init__(self) -> None:
        self.confidence: FloatArray | None = None
        self.accuracy: FloatArray | None = None

    def fit(self, confidence: ArrayLike, correct: ArrayLike) -> Self:
        curve = isotonic_curve(confidence, correct)
        self.confidence, self.accuracy = curve.confidence, curve.accuracy
        return self

    def transform(self, confidence: ArrayLike) -> FloatArray:
        if self.confidence is None:
            raise RuntimeError("fit before transforming: call fit(confidence, correct)")
        c = np.asarray(confidence, dtype=np.float64)
        return np.interp(c, self.confidence, self.accuracy)


class TopLabelHistogram:
    """The accuracy of each of `bins` bins of equal mass, ties kept together.

    Source: Zadrozny and Elkan (ICML 2001), for the predicted class alone as in Gupta and Ramdas
    (ICLR 2022).
    """

    def __init__(self, bins: int = 15) -> None:
        self.bins = positive_integer(bins, "bins")
        self.edges: FloatArray | None = None
        self.accuracy: FloatArray | None = None

    def fit(self, confidence: ArrayLike, correct: ArrayLike) -> Self:
        c, a = confidence_and_correct(confidence, correct)
        self.edges = equal_mass_edges(c, self.bins)
        index = np.searchsorted(self.edges, c, side="left")
        self.accuracy = np.bincount(index, weights=a) / np.bincount(index)
        return self

    def transform(self, confidence: ArrayLike) -> FloatArray:
        if self.edges is None:
            raise RuntimeError("fit before transforming: call fit(confidence, correct)")
        c = np.asarray(confidence, dtype=np.float64)
        return self.accuracy[np.searchsorted(self.edges, c, side="left")]
