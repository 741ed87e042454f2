"""How a metric follows from resamples of the images, and its 95 % interval from their values.

Each class here is one construction of intervals; a metric's entry names the one that it has. Which
construction a metric has was chosen by how often its intervals hold the truth
(`benchmarks/interval_coverage.py`, and the table in this room's README).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

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
from flatcal_dist.calibration.statistics.sampling import Edges, Images, Resample

BATCH = 32  # of resamples that smooth ECE convolves at a time
FEWEST_ERRORS = 5  # among the images answered; a coverage that rests on fewer has no interval


@dataclass(frozen=True)
class Sampled:
    """A statistic of one set of scores, on the images themselves and on resamples of them.

    point and replicates [R]: its values, NaN where undefined. gaps [R + 1, D]: see `Inflated`.
    images: how many there are; rarer: how many have the rarer outcome (mostly: are wrong).
    one_outcome: all images are right, or all are wrong.
    """

    point: float
    replicates: FloatArray
    gaps: FloatArray | None
    images: int
    rarer: int
    one_outcome: bool

    def without_ends(self) -> Interval:
        return Interval(float(self.point) if np.isfinite(self.point) else None, None, None)


class Collector(Protocol):
    """Takes the resamples of one set of scores one by one, first the images themselves."""

    def add(self, sample: Resample) -> None: ...

    def values(self) -> tuple[FloatArray, FloatArray | None]:
        """The statistic [R + 1], and its gaps [R + 1, D] if it is made of gaps."""
        ...


class Statistic:
    """A function of a resample; its interval is the central 95 % of the values on resamples.

    of_outcomes: it depends on which images are right. Where all images are right, or all wrong,
    resamples know no other outcome, which is no proof that there is none: no interval then.
    """

    of_outcomes: bool = True
    of_order: ClassVar[bool] = False  # depends on the order and correctness of the images alone
    centred: ClassVar[bool] = False  # resampling adds to it: differences are spread around the seen
    combined: ClassVar[bool] = False  # differences combine the intervals of both networks

    def of(self, sample: Resample) -> float | None:
        raise NotImplementedError

    def collect(self, images: Images) -> Collector:
        return _Values(self.of)

    def natural(self, values: FloatArray) -> FloatArray:
        """The metric, from the values that are kept of it."""
        return values

    def interval(self, s: Sampled) -> Interval:
        if s.one_outcome and self.of_outcomes:
            return s.without_ends()
        return self._interval(s)

    def _interval(self, s: Sampled) -> Interval:
        interval = percentile(s.point, s.replicates)
        # Equal confidences, or a single image: nothing varies, which is no proof either.
        return Interval(interval.value, None, None) if no_width(interval) else interval


class _Values:
    """Collects a statistic that each resample gives by itself."""

    def __init__(self, of: Callable[[Resample], float | None]) -> None:
        self.of = of
        self.found: list[float] = []

    def add(self, sample: Resample) -> None:
        value = self.of(sample)
        self.found.append(np.nan if value is None else value)

    def values(self) -> tuple[FloatArray, None]:
        return np.array(self.found), None


@dataclass(frozen=True)
class Function(Statistic):
    """Any function of a resample."""

    function: Callable[[Resample], float]
    of_outcomes: bool = True

    def of(self, sample: Resample) -> float:
        return self.function(sample)


class Accuracy(Statistic):
    """The share of right images; Wilson's interval where all images are right, or all wrong."""

    def of(self, sample: Resample) -> float:
        return sample.mean("correct")

    def interval(self, s: Sampled) -> Interval:
        if s.one_outcome and s.images:
            low, high = proportion_interval(round(s.point * s.images), s.images)
            return Interval(float(s.point), float(low), float(high))
        return super().interval(s)


@dataclass(frozen=True)
class Ranking(Statistic):
    """Failure prediction; `intervals.of_ranking` on the scale where its spread is even."""

    function: Callable[[TieGroups], float | None]
    scale: intervals.Scale
    of_order: ClassVar[bool] = True
    combined: ClassVar[bool] = True

    def of(self, sample: Resample) -> float | None:
        return self.function(sample.groups)

    def _interval(self, s: Sampled) -> Interval:
        return intervals.of_ranking(self.scale, s.point, s.replicates, s.rarer)


@dataclass(frozen=True)
class Coverage(Statistic):
    """Coverage at a risk; no interval if that allows fewer than `FEWEST_ERRORS` errors."""

    risk: float
    of_order: ClassVar[bool] = True

    def of(self, sample: Resample) -> float:
        return groups_coverage_at_risk(sample.groups, self.risk)

    def _interval(self, s: Sampled) -> Interval:
        if s.point * s.images * self.risk < FEWEST_ERRORS:
            return s.without_ends()
        return super()._interval(s)


@dataclass(frozen=True)
class Risk(Statistic):
    """Risk at a coverage; Wilson's interval among the images answered."""

    coverage: float
    of_order: ClassVar[bool] = True

    def of(self, sample: Resample) -> float:
        return groups_risk_at_coverage(sample.groups, self.coverage)

    def _interval(self, s: Sampled) -> Interval:
        answered = np.ceil(self.coverage * s.images - 1e-9)
        low, high = proportion_interval(s.point * answered, answered)
        return Interval(float(s.point), float(low), float(high))


class Inflated(Statistic):
    """A norm of gaps, which noise makes larger: the interval is that of `inflated`.

    The interval begins at 0 unless calibration is refuted, and may lie below the value.
    """

    norm: ClassVar[inflated.Norm] = staticmethod(inflated.absolute)
    fewest: int = 0  # images; with fewer there is no interval
    centred: ClassVar[bool] = True

    def gaps(self, sample: Resample) -> FloatArray:
        """The gaps [D], times the number of images."""
        raise NotImplementedError

    def of(self, sample: Resample) -> float:
        return self.norm(self.gaps(sample)) / sample.total

    def noise(self, images: Images) -> FloatArray | None:
        """How many times as much [D] as between resamples the gaps vary; None: once."""
        return None

    def collect(self, images: Images) -> Collector:
        return _Gaps(self, images)

    def _interval(self, s: Sampled) -> Interval:
        if s.images < self.fewest:
            return s.without_ends()
        limits = inflated.interval(s.gaps[0], s.gaps[1:], self.norm, LEVEL)
        return Interval(float(s.point), *limits)


class _Gaps:
    """Collects a norm together with the gaps that it is taken of."""

    def __init__(self, statistic: Inflated, images: Images) -> None:
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
class Binned(Inflated):
    """Sum of the absolute gaps of the bins between `edges`."""

    edges: Edges
    fewest: int = 0

    def gaps(self, sample: Resample) -> FloatArray:
        return sample.gaps(self.edges)

    def noise(self, images: Images) -> FloatArray:
        # Resampled from n images, a bin's gap varies (n - 1) / n times as much as it should.
        n = np.diff(images.cuts(self.edges))
        return np.sqrt(n / np.maximum(n - 1, 1))


class RootMeanSquare(Binned):
    """Root of the mean over images of the squared gap of their bin."""

    norm: ClassVar[inflated.Norm] = staticmethod(inflated.euclidean)

    def of(self, sample: Resample) -> float:
        count, _ = sample.bin_counts(self.edges)
        squares = sample.gaps(self.edges) ** 2 / np.maximum(count, 1)
        return np.sqrt(squares.sum() / sample.total)

    def gaps(self, sample: Resample) -> FloatArray:
        images = sample.images
        share = np.maximum(np.diff(images.cuts(self.edges)), 1) / len(images)
        return sample.gaps(self.edges) / np.sqrt(share)


@dataclass(frozen=True)
class DebiasedSquare(Statistic):
    """Mean squared gap less what chance adds, kept as such because it may be negative.

    Only its resamples are inflated: their percentiles are shifted to the square.
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


class LargestDrift(Inflated):
    """Largest running sum of gaps (KS); the interval rests on `sampling.DRIFT_POINTS` of them."""

    norm: ClassVar[inflated.Norm] = staticmethod(inflated.largest)

    def of(self, sample: Resample) -> float:
        return np.abs(sample.rising_drift[sample.images.tie_starts]).max() / sample.total

    def gaps(self, sample: Resample) -> FloatArray:
        return sample.rising_drift[sample.images.drift_points]


class Smooth(Inflated):
    """Smooth ECE at the kernel width that the images themselves have."""

    def collect(self, images: Images) -> Collector:
        return _Smoothed(images)


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
