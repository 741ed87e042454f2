"""Calibration of every class's probability, from sums over parts of the data."""

import numpy as np

from flatcal_dist.calibration.checks import FloatArray, IntArray, positive_integer


class ClasswiseSums:
    """Count, probability and outcome per class and bin, for all entries and for large ones.

    Everything is held in `state` [2, 3, classes, bins]. The states of two parts of the data add up.

    Args:
        classes: The number of classes.
        bins: The number of right-closed bins of equal width.
        threshold: Entries with p_k > threshold are also counted apart. Default: 1 / classes.
    """

    def __init__(self, classes: int, bins: int = 15, threshold: float | None = None) -> None:
        self.classes = positive_integer(classes, "classes")
        self.bins = positive_integer(bins, "bins")
        self.threshold = 1 / classes if threshold is None else threshold
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
        self.state = np.zeros((2, 3, self.classes, self.bins))

    def add(self, probability: FloatArray, labels: IntArray) -> None:
        """Count probabilities [n, K], whose rows sum to 1, with labels [n]."""
        n, classes = probability.shape
        edges = np.linspace(0.0, 1.0, self.bins + 1)
        # Few of 1,000 probabilities are large. These are looked at one by one, and the first bin
        # holds the rest.
        row, column = np.nonzero(probability > min(self.threshold, edges[1]))
        p, hit = probability[row, column], column == labels[row]
        index = np.clip(np.searchsorted(edges, p, side="left") - 1, 0, self.bins - 1)
        everything, large = self.state
        for sums, chosen in ((everything, index > 0), (large, p > self.threshold)):
            cell = column[chosen] * self.bins + index[chosen]
            for part, weights in zip(sums, (None, p[chosen], hit[chosen]), strict=True):
                counted = np.bincount(cell, weights, minlength=classes * self.bins)
                part += counted.reshape(classes, self.bins)
        upper = index > 0
        column, p, hit = column[upper], p[upper], hit[upper]
        counted = np.bincount(labels, minlength=classes)
        everything[0, :, 0] += n - np.bincount(column, minlength=classes)
        everything[1, :, 0] += probability.sum(axis=0) - np.bincount(column, p, minlength=classes)
        everything[2, :, 0] += counted - np.bincount(column, hit, minlength=classes)

    @property
    def per_class(self) -> FloatArray:
        """The calibration error of each class's probability [K]: sum_m (n_mk / N) |gap_mk|."""
        count, p, hit = self.state[0]
        return np.abs(p - hit).sum(axis=1) / np.maximum(count.sum(axis=1), 1)

    @property
    def error(self) -> float:
        """Classwise ECE, the mean over classes."""
        return float(self.per_class.mean())

    @property
    def thresholded_error(self) -> float | None:
        """Classwise ECE over the entries above the threshold. None if there are none.

        Each class is weighted by the number of such entries that it has, and the mean is over the
        classes that have any.
        """
        count, p, hit = self.state[1]
        entries = count.sum(axis=1)
        seen = entries > 0
        if not seen.any():
            return None
        return float((np.abs(p - hit).sum(axis=1)[seen] / entries[seen]).mean())
