"""Bootstrap over images: intervals, and paired differences on the same images.

Images are resampled with replacement; every run or score given together sees the same draws, so
that differences are paired. Intervals tell of the sampling of images, not of training seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import selective
from .checks import FloatArray, IntArray, positive_integer
from .metrics import equal_width_index
from .records import Scores

LEVEL = 0.95
RESAMPLES = 1000
MEANS = ("accuracy", "nll", "brier", "signed_gap", "mean_entropy")
RANKS = {
    "aurc": selective.groups_aurc,
    "eaurc": selective.groups_eaurc,
    "augrc": selective.groups_augrc,
    "auroc": selective.groups_auroc,
    "fpr_at_95_tpr": selective.groups_fpr_at_95_tpr,
    "aupr_success": selective.groups_aupr_success,
    "aupr_error": selective.groups_aupr_error,
}
STATISTICS = (*MEANS, "ece", *RANKS)


@dataclass(frozen=True)
class Interval:
    """A value and its interval; `low` and `high` are None where resamples leave it undefined."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


class _Sorted:
    """One set of scores, sorted once; evaluates all statistics for a vector of image weights."""

    def __init__(self, scores: Scores, bins: int) -> None:
        confidence, correct = scores.confidence, scores.correct.astype(np.float64)
        gap = confidence - correct
        self.columns = np.stack([correct, scores.nll, scores.brier, gap, scores.entropy], axis=1)
        self.gap, self.bins = gap, bins
        self.index = equal_width_index(confidence, bins)
        self.order, self.starts = selective.tie_order(scores.log_confidence)
        self.wrong = (~scores.correct[self.order]).astype(np.int64)

    def __call__(self, weight: IntArray) -> list[float]:
        n = weight.sum()
        means = weight @ self.columns / n
        binned = np.bincount(self.index, weights=weight * self.gap, minlength=self.bins)
        in_order = weight[self.order]
        size, errors = in_order, in_order * self.wrong
        if len(self.starts) < len(weight):
            size = np.add.reduceat(size, self.starts)
            errors = np.add.reduceat(errors, self.starts)
        groups = selective.TieGroups(size, errors)
        ranks = (np.nan if (v := f(groups)) is None else v for f in RANKS.values())
        return [*means, np.abs(binned).sum() / n, *ranks]


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of several sets of scores of the same images.

    point [S, M] on the images themselves; replicates [R, S, M] on resamples; M follows
    `STATISTICS`; NaN where undefined.
    """

    point: FloatArray
    replicates: FloatArray

    def interval(self, which: int, statistic: str) -> Interval:
        """Percentile interval of one statistic; not for ECE, whose resamples are biased upwards."""
        if statistic == "ece":
            raise ValueError("the bootstrap interval of ECE is biased: show its null band instead")
        m = STATISTICS.index(statistic)
        interval = _percentile(self.point[which, m], self.replicates[:, which, m])
        # All images correct, or a single one: resampling knows no other outcome, which is no proof.
        return Interval(interval.value, None, None) if interval.low == interval.high else interval

    def difference(self, which: int, baseline: int, statistic: str) -> Interval:
        """Paired difference (which minus baseline) with its interval.

        ECE is biased upwards in resamples, more so the smaller it is: its differences are spread
        around the observed difference instead of around their own mean.
        """
        m = STATISTICS.index(statistic)
        point = self.point[which, m] - self.point[baseline, m]
        replicates = self.replicates[:, which, m] - self.replicates[:, baseline, m]
        if statistic == "ece":
            replicates = replicates - replicates.mean() + point
        interval = _percentile(point, replicates)
        alike = interval.low == interval.high and point != 0
        return Interval(interval.value, None, None) if alike else interval


def _percentile(point: float, replicates: FloatArray) -> Interval:
    value = float(point) if np.isfinite(point) else None
    defined = replicates[np.isfinite(replicates)]
    # With few wrong images a resample can hold none; some such are left out, many are a warning.
    if value is None or len(defined) < 0.95 * len(replicates):
        return Interval(value, None, None)
    low, high = np.quantile(defined, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high))


def bootstrap(
    scores: Sequence[Scores], resamples: int = RESAMPLES, seed: int = 0, bins: int = 15
) -> Bootstrap:
    """Resample the images of `scores`, which must be of the same images in the same order."""
    positive_integer(resamples, "resamples")
    lengths = {len(s.correct) for s in scores}
    if len(lengths) != 1:
        raise ValueError(f"paired scores must be of the same images, got lengths {sorted(lengths)}")
    n = lengths.pop()
    evaluate = [_Sorted(s, bins) for s in scores]
    rng = np.random.default_rng(seed)
    replicates = np.empty((resamples, len(scores), len(STATISTICS)))
    for row in replicates:
        weight = np.bincount(rng.integers(n, size=n), minlength=n)
        row[:] = [f(weight) for f in evaluate]
    return Bootstrap(np.array([f(np.ones(n, np.int64)) for f in evaluate]), replicates)
