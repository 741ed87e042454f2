"""How a metric follows from resamples of the images, and its 95 % interval from their values.

Each class here is one construction of intervals. The entry of a metric names the construction that
it uses. It was chosen by how often the intervals hold the truth: `benchmarks/interval_coverage.py`
measures this, and the README of `calibration` has the table.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from flatcal_dist.calibration.checks import FloatArray
from flatcal_dist.calibration.metrics.selective import (
    TieGroups,
    groups_coverage_at_risk,
    groups_risk_at_coverage,
)
from flatcal_dist.calibration.metrics.smooth import SmoothSums
from flatcal_dist.calibration.statistics import inflated, intervals
from flatcal_dist.calibration.statistics.intervals import (
    LEVEL,
    Interval,
    no_width,
    percentile,
    proportion_interval,
)
from flatcal_dist.calibration.statistics.sampling import (
    Edges,
    Images,
    Ranked,
    Resample,
    with_confidence,
)

BATCH = 32  # resamples that smooth ECE convolves at a time
FEWEST_ERRORS = 5  # errors among the answered images, below which a coverage has no interval


if TYPE_CHECKING:
    StaticNorm = staticmethod[[FloatArray], FloatArray]


@dataclass(frozen=True)
class Sampled:
    """A statistic of one set of scores, on the images themselves and on resamples of them.

    Args:
        point: The value on the images themselves, NaN where undefined.
        replicates: The values on resamples [R].
        gaps: The gaps [R + 1, D] of a statistic of the kind `Inflated`, else None.
        images: The number of images.
        rarer: The number of images with the rarer outcome, which mostly is a wrong answer.
        one_outcome: Whether all images are right, or all are wrong.
    """

    point: float
    replicates: FloatArray
    gaps: FloatArray | None
    images: int
    rarer: int
    one_outcome: bool

    def without_ends(self) -> Interval:
        """Return the value without an interval."""
        return Interval(float(self.point) if np.isfinite(self.point) else None, None, None)


class Collector(Protocol):
    """Takes the resamples of one set of scores one by one, first the images themselves."""

    def add(self, sample: Resample) -> None:
        """Take one resample."""
        ...

    def values(self) -> tuple[FloatArray, FloatArray | None]:
        """Return the statistic [R + 1], and its gaps [R + 1, D] if it is made of gaps."""
        ...


class Statistic(ABC):
    """A function of a resample. Its interval is the central 95 % of the values on resamples.

    Attributes:
        of_outcomes: Whether it depends on which images are right. If all images are right, or all
            wrong, resamples hold no other outcome. This does not prove that there is none, so such
            a statistic then has no interval.
        of_order: Whether it depends on the order and the correctness of the images alone.
        centred: Whether resampling inflates it. Differences are then spread around the observed
            one.
        combined: Whether a difference combines the intervals of both networks.
    """

    of_outcomes: bool = True
    of_order: ClassVar[bool] = False
    centred: ClassVar[bool] = False
    combined: ClassVar[bool] = False

    @abstractmethod
    def collect(self, images: Ranked) -> Collector:
        """Return what collects the values on resamples of these images."""

    def natural(self, values: FloatArray) -> FloatArray:
        """Return the metric, from the values that are kept of it."""
        return values

    def interval(self, s: Sampled) -> Interval:
        """Return the value with its 95 % interval."""
        if s.one_outcome and self.of_outcomes:
            return s.without_ends()
        return self._interval(s)

    def _interval(self, s: Sampled) -> Interval:
        interval = percentile(s.point, s.replicates)
        # With equal confidences, or a single image, nothing varies. This proves nothing either.
        return Interval(interval.value, None, None) if no_width(interval) else interval


class _Values:
    """Collects a statistic that follows from each resample by itself."""

    def __init__(self, of: Callable[[Resample], float | None]) -> None:
        self.of = of
        self.found: list[float] = []

    def add(self, sample: Resample) -> None:
        value = self.of(sample)
        self.found.append(np.nan if value is None else value)

    def values(self) -> tuple[FloatArray, None]:
        return np.array(self.found), None


class Single(Statistic):
    """A statistic that follows from each resample by itself."""

    @abstractmethod
    def of(self, sample: Resample) -> float | None:
        """Return the value on one resample. None where it is undefined."""

    def collect(self, images: Ranked) -> Collector:
        return _Values(self.of)


@dataclass(frozen=True)
class Function(Single):
    """Any function of a resample."""

    function: Callable[[Resample], float]
    of_outcomes: bool = True

    def of(self, sample: Resample) -> float:
        return self.function(sample)


class Accuracy(Single):
    """The share of right images. If all are right, or all wrong, it has Wilson's interval."""

    def of(self, sample: Resample) -> float:
        return sample.mean("correct")

    def interval(self, s: Sampled) -> Interval:
        if s.one_outcome and s.images:
            low, high = proportion_interval(round(s.point * s.images), s.images)
            return Interval(float(s.point), float(low), float(high))
        return super().interval(s)


@dataclass(frozen=True)
class Ranking(Single):
    """A metric of failure prediction, with the interval of `intervals.of_ranking`."""

    function: Callable[[TieGroups], float | None]
    scale: intervals.Scale
    of_order: ClassVar[bool] = True
    combined: ClassVar[bool] = True

    def of(self, sample: Resample) -> float | None:
        return self.function(sample.groups)

    def _interval(self, s: Sampled) -> Interval:
        return intervals.of_ranking(self.scale, s.point, s.replicates, s.rarer)


@dataclass(frozen=True)
class Coverage(Single):
    """Coverage at a risk. It has no interval if the risk allows fewer than `FEWEST_ERRORS`."""

    risk: float
    of_order: ClassVar[bool] = True

    def of(self, sample: Resample) -> float:
        return groups_coverage_at_risk(sample.groups, self.risk)

    def _interval(self, s: Sampled) -> Interval:
        if s.point * s.images * self.risk < FEWEST_ERRORS:
            return s.without_ends()
        return super()._interval(s)


@dataclass(frozen=True)
class Risk(Single):
    """Risk at a coverage, with Wilson's interval among the answered images."""

    coverage: float
    of_order: ClassVar[bool] = True

    def of(self, sample: Resample) -> float:
        return groups_risk_at_coverage(sample.groups, self.coverage)

    def _interval(self, s: Sampled) -> Interval:
        answered = np.ceil(self.coverage * s.images - 1e-9)
        low, high = proportion_interval(s.point * answered, answered)
        return Interval(float(s.point), float(low), float(high))


class Inflated(Statistic):
    """A norm of gaps, which noise makes larger. `inflated.interval` gives its interval.

    The interval begins at 0 unless calibration is refuted. It may lie below the value.
    """

    norm: "ClassVar[StaticNorm]" = staticmethod(inflated.absolute)
    fewest: int = 0  # images, below which there is no interval
    centred: ClassVar[bool] = True

    def _interval(self, s: Sampled) -> Interval:
        if s.images < self.fewest or s.gaps is None:
            return s.without_ends()
        limits = inflated.interval(s.gaps[0], s.gaps[1:], self.norm, LEVEL)
        return Interval(float(s.point), *limits)


class GapNorm(Inflated):
    """A norm of gaps that follow from each resample by itself."""

    @abstractmethod
    def gaps(self, sample: Resample) -> FloatArray:
        """Return the gaps [D], times the number of images."""

    def of(self, sample: Resample) -> float:
        return float(self.norm(self.gaps(sample)) / sample.total)

    def noise(self, images: Images) -> FloatArray | None:
        """Return by which factors [D] gaps vary more than between resamples. None: not more."""
        return None

    def collect(self, images: Ranked) -> Collector:
        return _Gaps(self, with_confidence(images))


class _Gaps:
    """Collects a norm together with its gaps."""

    def __init__(self, statistic: GapNorm, images: Images) -> None:
        self.statistic, self.images = statistic, images
        self.found: list[float] = []
        self.gaps: list[FloatArray] = []

    def add(self, sample: Resample) -> None:
        self.found.append(self.statistic.of(sample))
        self.gaps.append(self.statistic.gaps(sample) / sample.total)

    def values(self) -> tuple[FloatArray, FloatArray]:
        gaps, noise = np.array(self.gaps), self.statistic.noise(self.images)
        if noise is not None:
            gaps = gaps[0] + (gaps - gaps[0]) * noise
        return np.array(self.found), gaps


@dataclass(frozen=True)
class Binned(GapNorm):
    """The sum of the absolute gaps of the bins between `edges`."""

    edges: Edges
    fewest: int = 0

    def gaps(self, sample: Resample) -> FloatArray:
        return sample.gaps(self.edges)

    def noise(self, images: Images) -> FloatArray:
        # Resampled from n images, a bin's gap varies (n - 1) / n times as much as it should.
        n = np.diff(images.cuts(self.edges))
        return np.sqrt(n / np.maximum(n - 1, 1))


class RootMeanSquare(Binned):
    """The root of the mean over images of the squared gap of their bin."""

    norm: "ClassVar[StaticNorm]" = staticmethod(inflated.euclidean)

    def of(self, sample: Resample) -> float:
        count, _ = sample.bin_counts(self.edges)
        squares = sample.gaps(self.edges) ** 2 / np.maximum(count, 1)
        return float(np.sqrt(squares.sum() / sample.total))

    def gaps(self, sample: Resample) -> FloatArray:
        images = sample.images
        share = np.maximum(np.diff(images.cuts(self.edges)), 1) / len(images)
        return sample.gaps(self.edges) / np.sqrt(share)


@dataclass(frozen=True)
class DebiasedSquare(Single):
    """The mean squared gap less what chance adds. The square is kept, because it may be negative.

    Only its resamples are inflated. Their percentiles are shifted to the observed square.
    """

    edges: Edges
    centred: ClassVar[bool] = True

    def of(self, sample: Resample) -> float:
        count, hits = sample.bin_counts(self.edges)
        squares = sample.gaps(self.edges) ** 2 / np.maximum(count, 1)
        noise = hits * (count - hits) / np.maximum(count * (count - 1), 1)
        return np.where(count > 1, squares - noise, 0.0).sum() / sample.total

    def natural(self, values: FloatArray) -> FloatArray:
        return np.sqrt(np.maximum(values, 0.0))

    def _interval(self, s: Sampled) -> Interval:
        shifted = percentile(s.point, s.replicates - s.replicates.mean() + s.point)
        return Interval(*(float(np.sqrt(max(v, 0.0))) for v in vars(shifted).values()))


class LargestDrift(GapNorm):
    """The largest running sum of gaps (KS). `sampling.DRIFT_POINTS` sums give its interval."""

    norm: "ClassVar[StaticNorm]" = staticmethod(inflated.largest)

    def of(self, sample: Resample) -> float:
        return np.abs(sample.rising_drift[sample.images.tie_starts]).max() / sample.total

    def gaps(self, sample: Resample) -> FloatArray:
        return sample.rising_drift[sample.images.drift_points]


class Smooth(Inflated):
    """Smooth ECE at the kernel width of the images themselves."""

    def collect(self, images: Ranked) -> Collector:
        return _Smoothed(with_confidence(images))


class _Smoothed:
    """Convolves `BATCH` resamples at a time."""

    def __init__(self, images: Images) -> None:
        self.smooth = SmoothSums(images.confidence, images.correct)
        self.waiting: list[FloatArray] = []
        self.found: list[FloatArray] = []
        self.gaps: list[FloatArray] = []

    def add(self, sample: Resample) -> None:
        self.waiting.append(self.smooth.sums(sample.weight, sample.drift))
        if len(self.waiting) == BATCH:
            self._convolve()

    def _convolve(self) -> None:
        values, residuals = self.smooth.errors(np.stack(self.waiting))
        self.found.append(values)
        self.gaps.append(residuals)
        self.waiting.clear()

    def values(self) -> tuple[FloatArray, FloatArray]:
        if self.waiting:
            self._convolve()
        return np.concatenate(self.found), np.concatenate(self.gaps)
