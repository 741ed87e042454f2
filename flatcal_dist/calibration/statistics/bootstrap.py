"""Bootstrap over images: intervals, and paired differences on the same images; exact tests.

Images are resampled with replacement; every run or score given together sees the same draws, so
that differences are paired. Intervals tell of the sampling of images, not of training seeds: for
those see `seeds`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from flatcal_dist.calibration.checks import FloatArray, confidence_and_correct, positive_integer
from flatcal_dist.calibration.metrics.entries import RANKS, STATISTICS
from flatcal_dist.calibration.softmax import Scores, keep_memory
from flatcal_dist.calibration.statistics import intervals
from flatcal_dist.calibration.statistics.intervals import ROUNDING, Interval, no_width, percentile
from flatcal_dist.calibration.statistics.resampled import Sampled, Statistic
from flatcal_dist.calibration.statistics.sampling import Images, Ranked, Resample

RESAMPLES = 1000


@dataclass(frozen=True)
class Bootstrap:
    """Statistics of several sets of scores of the same images.

    point [S, M] on the images themselves; replicates [R, S, M] on resamples; NaN where undefined.
    statistics: the M names. "rmsce_debiased" is kept as its square, which may be negative.
    gaps: for each statistic that is made of gaps, and for each of the S scores, the gaps
    [R + 1, D], first those of the images themselves. images: how many there are. rarer [S]: how
    many of them have the rarer outcome.
    """

    point: FloatArray
    replicates: FloatArray
    statistics: tuple[str, ...] = tuple(STATISTICS)
    gaps: dict[str, list[FloatArray]] = field(default_factory=dict)
    images: int = 0
    rarer: Sequence[int] = ()

    def interval(self, which: int, statistic: str) -> Interval:
        """95 % interval of one statistic, by the construction that the metric's entry names."""
        m = self.statistics.index(statistic)
        gaps = self.gaps.get(statistic)
        sampled = Sampled(
            point=self.point[which, m],
            replicates=self.replicates[:, which, m],
            gaps=None if gaps is None else gaps[which],
            images=self.images,
            rarer=self.rarer[which] if len(self.rarer) else 0,
            one_outcome=self._one_outcome(which),
        )
        return STATISTICS[statistic].interval(sampled)

    def _one_outcome(self, which: int) -> bool:
        if "accuracy" not in self.statistics:
            return False
        return self.point[which, self.statistics.index("accuracy")] in (0.0, 1.0)

    def difference(self, which: int, baseline: int, statistic: str) -> Interval:
        """Paired difference (which minus baseline) with its 95 % interval.

        Errors of calibration are inflated in resamples, more so the smaller they are: their
        differences are spread around the observed difference instead of around their own mean.
        Differences of failure prediction combine the intervals of both: `intervals.of_difference`.
        """
        m, kind = self.statistics.index(statistic), STATISTICS[statistic]
        values = kind.natural(np.stack([self.point[:, m], *self.replicates[:, :, m]]))
        moved = values[:, which] - values[:, baseline]
        point, *replicates = np.where(np.abs(moved) < ROUNDING, 0.0, moved)
        replicates = np.array(replicates)
        if kind.centred:
            replicates = replicates - replicates.mean() + point
        if kind.combined and np.any(replicates):
            mine, theirs = (self.interval(place, statistic) for place in (which, baseline))
            if mine.low is not None and theirs.low is not None:
                pair = self.replicates[:, which, m], self.replicates[:, baseline, m]
                return Interval(float(point), *intervals.of_difference(mine, theirs, pair))
        interval = percentile(point, replicates)
        alike = no_width(interval) and point != 0
        return Interval(interval.value, None, None) if alike else interval


def weights(images: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each image is drawn: first once each, then in `resamples` draws."""
    positive_integer(resamples, "resamples")
    keep_memory()
    yield np.ones(images)
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(images, size=images), minlength=images).astype(np.float64)


def _same_images(lengths: set[int]) -> int:
    if len(lengths) != 1:
        raise ValueError(f"paired scores must be of the same images, got lengths {sorted(lengths)}")
    return lengths.pop()


def bootstrap(
    scores: Sequence[Scores], resamples: int = RESAMPLES, seed: int = 0, bins: int = 15
) -> Bootstrap:
    """Resample the images of `scores`, which must be of the same images in the same order."""
    _same_images({len(s.correct) for s in scores})
    return _resampled([Images(s, bins) for s in scores], STATISTICS, resamples, seed)


def rank_bootstrap(
    scores: Sequence[FloatArray], correct: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Bootstrap:
    """Failure prediction (`RANKS`) by several scores [N] of the same images."""
    _same_images({len(score) for score in scores})
    checked = (confidence_and_correct(score, correct, probability=False) for score in scores)
    return _resampled([Ranked(*pair) for pair in checked], RANKS, resamples, seed)


def _resampled(
    sets: Sequence[Ranked], statistics: Mapping[str, Statistic], resamples: int, seed: int
) -> Bootstrap:
    """These statistics of every set of images, on the same resamples."""
    n = len(sets[0].order)
    positive_integer(resamples, "resamples")
    collectors = [[statistic.collect(s) for statistic in statistics.values()] for s in sets]
    for weight in weights(n, resamples, seed):
        for images, of_images in zip(sets, collectors, strict=True):
            sample = Resample(images, weight)
            for collector in of_images:
                collector.add(sample)
    table = np.empty((resamples + 1, len(sets), len(statistics)))
    gaps: dict[str, list[FloatArray]] = {}
    for i, of_images in enumerate(collectors):
        for m, (name, collector) in enumerate(zip(statistics, of_images, strict=True)):
            table[:, i, m], own = collector.values()
            if own is not None:
                gaps.setdefault(name, []).append(own)
    rarer = [int(min(s.wrong.sum(), n - s.wrong.sum())) for s in sets]
    return Bootstrap(table[0], table[1:], tuple(statistics), gaps, n, rarer)


@dataclass(frozen=True)
class McNemar:
    """Do two networks differ in accuracy on the same images?

    only_first, only_second: images that one alone gets right. exact, mid_p: two-sided p-values
    under which either is as likely to be the one; the exact one errs on the side of no difference,
    mid-p hardly ever exceeds its level and finds more.
    """

    only_first: int
    only_second: int
    exact: float
    mid_p: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """McNemar's test on which images [N] two networks get right.

    Source: McNemar (Psychometrika 1947); mid-p: Fagerland, Lydersen and Laake, The McNemar test for
    binary matched-pairs data (BMC Medical Research Methodology 2013).
    """
    zeros = np.zeros(np.shape(first))
    _, a = confidence_and_correct(zeros, first)
    _, b = confidence_and_correct(np.zeros(np.shape(second)), second)
    _same_images({len(a), len(b)})
    one, two = int((a & ~b).sum()), int((b & ~a).sum())
    fewer, total = min(one, two), one + two
    tail = float(bdtr(fewer, total, 0.5))
    exact = min(1.0, 2 * tail)
    mid = 1.0 if one == two else tail + (float(bdtr(fewer - 1, total, 0.5)) if fewer else 0.0)
    return McNemar(one, two, exact, mid)
