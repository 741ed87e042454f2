"""The images of one set of scores, sorted once, and resamples of them as weights of the images.

If images are sorted by confidence, a bin is a stretch of images, and its sum is the difference of
two running sums. All metrics of a resample follow from the same few sums. Each sum is computed when
it is first asked for.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from flatcal_dist.calibration.checks import BoolArray, FloatArray, IntArray
from flatcal_dist.calibration.metrics import selective
from flatcal_dist.calibration.metrics.calibration_errors import equal_mass_edges
from flatcal_dist.calibration.softmax import Scores

# One product makes the means of all these columns. Their order decides the last bits of the means.
# A metric that needs another mean computes it by itself, so that published figures stay as they
# are.
COLUMNS = ("correct", "nll", "brier", "gap", "entropy", "confidence", "squared_gap")
DRIFT_POINTS = 256  # points at which the running sum of gaps is kept for an interval
Edges = Callable[["Images"], FloatArray]


class Ranked:
    """The images [N] in the order of one score, highest first. Images of equal score are tied."""

    def __init__(self, score: FloatArray, correct: BoolArray) -> None:
        self.order, starts = selective.tie_order(score)
        self.wrong = (~correct[self.order]).astype(np.float64)
        tied = len(starts) < len(score)
        self.ends = np.append(starts[1:], len(score)) - 1 if tied else slice(None)


class Images(Ranked):
    """The images [N] of one set of scores, most confident first, and what all resamples share."""

    def __init__(self, scores: Scores, bins: int) -> None:
        super().__init__(scores.log_confidence, scores.correct)
        self.bins = bins
        self.confidence = scores.confidence[self.order]
        self.correct = scores.correct[self.order].astype(np.float64)
        self.gap = self.confidence - self.correct
        missing = np.full(len(self.order), np.nan)
        nll, brier, self.entropy = (
            missing if column is None else column[self.order]
            for column in (scores.nll, scores.brier, scores.entropy)
        )
        self.columns = np.stack(
            [self.correct, nll, brier, self.gap, self.entropy, self.confidence, self.gap**2], axis=1
        )
        self._cuts: dict[Edges, IntArray] = {}

    def __len__(self) -> int:
        return len(self.order)

    @cached_property
    def entropy_correct(self) -> FloatArray:
        """The entropy of correct images [N], and 0 for the others."""
        return self.entropy * self.correct

    def cuts(self, edges: Edges) -> IntArray:
        """Return where the bins between these inner edges begin and end, most confident first."""
        if edges not in self._cuts:
            inner = np.searchsorted(-self.confidence, -edges(self)[::-1])
            self._cuts[edges] = np.concatenate([[0], inner, [len(self)]])
        return self._cuts[edges]

    @cached_property
    def tie_starts(self) -> IntArray:
        """Where each group of equal confidences begins."""
        return np.flatnonzero(np.append(True, np.diff(-self.confidence) > 0))

    @cached_property
    def drift_points(self) -> IntArray:
        """`DRIFT_POINTS` of `tie_starts`, spread evenly; all of them where there are fewer."""
        places = np.linspace(0, len(self.tie_starts) - 1, DRIFT_POINTS).round().astype(np.int64)
        return self.tie_starts[np.unique(places)]


def with_confidence(ranked: Ranked) -> Images:
    """Return the images themselves. TypeError if only their order is known."""
    if not isinstance(ranked, Images):
        raise TypeError(
            "this statistic needs confidences, and only an order of the images is known"
        )
    return ranked


def equal_width(images: Images) -> FloatArray:
    """Return the inner edges of `bins` bins of equal width."""
    return np.linspace(0.0, 1.0, images.bins + 1)[1:-1]


def equal_mass(images: Images) -> FloatArray:
    """Return the inner edges of `bins` bins of equal mass."""
    return equal_mass_edges(images.confidence, images.bins)


def equal_mass_100(images: Images) -> FloatArray:
    """Return the inner edges of 100 bins of equal mass."""
    return equal_mass_edges(images.confidence, 100)


class Resample:
    """How often each image was drawn, and sums in which each image counts that often.

    `weight` [N] is in the order in which the images were given.
    """

    def __init__(self, ranked: Ranked, weight: FloatArray) -> None:
        self.ranked = ranked
        self.weight = weight[ranked.order]
        self._gaps: dict[Edges, FloatArray] = {}

    @property
    def images(self) -> Images:
        """The images with their confidences. TypeError if only their order is known."""
        return with_confidence(self.ranked)

    @cached_property
    def total(self) -> float:
        """The number of images drawn."""
        return self.weight.sum()

    @cached_property
    def accepted(self) -> FloatArray:
        """The number of images among the first k [N + 1], for k from 0 to N."""
        running = np.zeros(len(self.weight) + 1)
        np.cumsum(self.weight, out=running[1:])
        return running

    @cached_property
    def errors(self) -> FloatArray:
        """The number of wrong images among the first k [N + 1], for k from 0 to N."""
        running = np.zeros(len(self.weight) + 1)
        np.cumsum(self.weight * self.ranked.wrong, out=running[1:])
        return running

    @cached_property
    def groups(self) -> selective.TieGroups:
        """The drawn images, grouped by equal score."""
        ends = self.ranked.ends
        return selective.TieGroups(self.accepted[1:][ends], self.errors[1:][ends])

    @cached_property
    def _means(self) -> FloatArray:
        return self.weight @ self.images.columns / self.total

    def mean(self, column: str) -> float:
        """Return the mean of one of `COLUMNS`."""
        return self._means[COLUMNS.index(column)]

    @cached_property
    def _entropy_correct(self) -> float:
        return float(self.weight @ self.images.entropy_correct)

    def entropy_of(self, correct: bool) -> float:
        """Return the mean entropy of the correct images, or of the wrong ones; NaN if none."""
        right = self.mean("correct") * self.total
        if correct:
            return self._entropy_correct / right if right else np.nan
        rest = self.mean("entropy") * self.total - self._entropy_correct
        return rest / (self.total - right) if right < self.total else np.nan

    @cached_property
    def drift(self) -> FloatArray:
        """The sum of confidence minus correctness over the first k [N + 1], for k from 0 to N."""
        running = np.zeros(len(self.weight) + 1)
        np.cumsum(self.weight * self.images.gap, out=running[1:])
        return running

    @cached_property
    def rising_drift(self) -> FloatArray:
        """The sum of confidence minus correctness over all but the first k [N + 1]."""
        return self.drift[-1] - self.drift

    def gaps(self, edges: Edges) -> FloatArray:
        """Return the sum of confidence minus correctness in each bin."""
        if edges not in self._gaps:
            self._gaps[edges] = np.diff(self.drift[self.images.cuts(edges)])
        return self._gaps[edges]

    def bin_counts(self, edges: Edges) -> tuple[FloatArray, FloatArray]:
        """Return the number of images in each bin, and the number of correct ones."""
        cuts = self.images.cuts(edges)
        count = np.diff(self.accepted[cuts])
        return count, count - np.diff(self.errors[cuts])
