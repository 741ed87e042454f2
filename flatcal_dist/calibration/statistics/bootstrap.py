"""Bootstrap over images: intervals, paired differences on the same images, and exact tests.

Images are resampled with replacement. All runs or scores that are given together see the same
draws, so that differences are paired. An interval tells how much a figure depends on the sample of
images. How much it depends on the training seed is the subject of `seeds`.
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
    """M statistics of S sets of scores of the same images.

    Args:
        point: The values on the images themselves [S, M], NaN where undefined. "rmsce_debiased" is
            kept as its square, which may be negative.
        replicates: The values on R resamples [R, S, M].
        statistics: The M names.
        gaps: For each statistic that is made of gaps, the gaps of each set of scores [R + 1, D].
            The first row belongs to the images themselves.
        images: The number of images.
        rarer: The number of images with the rarer outcome [S].
    """

    point: FloatArray
    replicates: FloatArray
    statistics: tuple[str, ...] = tuple(STATISTICS)
    gaps: dict[str, list[FloatArray]] = field(default_factory=dict)
    images: int = 0
    rarer: Sequence[int] = ()

    def interval(self, which: int, statistic: str) -> Interval:
        """Return the 95 % interval of a statistic for one set of scores."""
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
        """Return the paired difference, `which` minus `baseline`, with its 95 % interval.

        Resampling inflates errors of calibration, and small errors most. Therefore their
        differences are spread around the observed difference instead of around their own mean. For
        failure prediction, `intervals.of_difference` combines the intervals of both sets of scores.

        Args:
            which: The place of a set of scores.
            baseline: The place of the set that is subtracted.
            statistic: The name of the statistic.
        """
        m, kind = self.statistics.index(statistic), STATISTICS[statistic]
        values = kind.natural(np.stack([self.point[:, m], *self.replicates[:, :, m]]))
        moved = values[:, which] - values[:, baseline]
        moved = np.where(np.abs(moved) < ROUNDING, 0.0, moved)
        point, replicates = moved[0], moved[1:]
        if kind.centred:
            replicates = replicates - replicates.mean() + point
        if kind.combined and np.any(replicates):
            mine, theirs = (self.interval(place, statistic) for place in (which, baseline))
            if mine.ends is not None and theirs.ends is not None:
                pair = self.replicates[:, which, m], self.replicates[:, baseline, m]
                return Interval(float(point), *intervals.of_difference(mine, theirs, pair))
        interval = percentile(point, replicates)
        alike = no_width(interval) and point != 0
        return Interval(interval.value, None, None) if alike else interval


def weights(images: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield how often each image is drawn [N]: first once each, then for each resample.

    Args:
        images: The number of images.
        resamples: The number of resamples.
        seed: The seed of the draws.
    """
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
    """Compute all statistics of several sets of scores on the same resamples.

    Args:
        scores: Sets of scores of the same images in the same order.
        resamples: The number of resamples.
        seed: The seed of the draws.
        bins: The number of bins of ECE and related metrics.

    Raises:
        ValueError: The sets have different lengths, or `resamples` is below 1.
    """
    _same_images({len(s.correct) for s in scores})
    return _resampled([Images(s, bins) for s in scores], STATISTICS, resamples, seed)


def rank_bootstrap(
    scores: Sequence[FloatArray], correct: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> Bootstrap:
    """Compute the statistics of failure prediction (`RANKS`) on the same resamples.

    Args:
        scores: Scores [N] of the same images; higher means more confident.
        correct: Which images are right [N].
        resamples: The number of resamples.
        seed: The seed of the draws.

    Raises:
        ValueError: The scores have different lengths or are not finite, or `resamples` is below 1.
    """
    _same_images({len(score) for score in scores})
    checked = (confidence_and_correct(score, correct, probability=False) for score in scores)
    return _resampled([Ranked(*pair) for pair in checked], RANKS, resamples, seed)


def _resampled(
    sets: Sequence[Ranked], statistics: Mapping[str, Statistic], resamples: int, seed: int
) -> Bootstrap:
    """Compute these statistics of every set of images on the same resamples."""
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
    """Whether two networks differ in accuracy on the same images.

    Args:
        only_first: The number of images that the first network alone gets right.
        only_second: The number of images that the second network alone gets right.
        exact: The exact two-sided p-value. It is cautious.
        mid_p: The two-sided mid-p-value. It finds more differences and hardly ever errs more often
            than its level says.
    """

    only_first: int
    only_second: int
    exact: float
    mid_p: float


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Apply McNemar's test to which images [N] two networks get right.

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
