"""95 % intervals of one statistic, from its value and its values on resamples of the images.

How an interval is constructed differs between statistics. Each construction was chosen by how often
its intervals hold the truth on real logits. `benchmarks/interval_coverage.py` measures this, and
the README of `calibration` has the table.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, ndtri, stdtrit

from flatcal_dist.calibration.checks import FloatArray

LEVEL = 0.95
ROUNDING = 1e-12  # a smaller rate, or number of nats, is an error of rounding
Scale = Literal["logarithm", "log-odds"]  # for positive numbers, and for shares


@dataclass(frozen=True)
class Interval:
    """A value and its interval. `low` and `high` are None where there is no interval."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends. None where there is no interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def whole(self) -> tuple[float, float, float] | None:
        """The value and both ends. None where there is no interval."""
        return None if self.value is None or self.ends is None else (self.value, *self.ends)

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside of the interval."""
        return beyond_zero(self.low, self.high)

    @property
    def direction(self) -> int:
        """1 or -1 for a value that is shown to lie above or below zero, else 0."""
        if self.value is None or not self.excludes_zero:
            return 0
        return -1 if self.value < 0 else 1


def beyond_zero(low: float | None, high: float | None) -> bool:
    """Return whether zero lies outside of an interval by more than an error of rounding."""
    return low is not None and high is not None and (low > ROUNDING or high < -ROUNDING)


def no_width(interval: Interval) -> bool:
    """Return whether the ends differ by rounding alone, so that nothing varied."""
    if interval.ends is None:
        return False
    low, high = interval.ends
    return high - low <= ROUNDING * max(1.0, abs(low))


def percentile(point: float, replicates: FloatArray) -> Interval:
    """Return the central 95 % of the values on resamples [R] as the interval of `point`."""
    value = float(point) if np.isfinite(point) else None
    defined = replicates[np.isfinite(replicates)]
    # With few wrong images, a resample can hold none. A few such resamples are left out. Where
    # there are many, there is no interval.
    if value is None or len(defined) < 0.95 * len(replicates):
        return Interval(value, None, None)
    low, high = np.quantile(defined, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high))


def of_ranking(scale: Scale, point: float, replicates: FloatArray, rarer: int) -> Interval:
    """Return the interval of a metric of failure prediction, which depends on few images.

    Percentiles of resamples are too narrow for such a metric. Its spread grows with its value, and
    a resample of few wrong images varies less than new images would. Therefore the interval is made
    on a scale where the spread is even. The standard deviation of the bootstrap is carried to this
    scale by the derivative, and Student's t gives the width.

    Args:
        scale: The scale on which the spread is even: log-odds for a share, else the logarithm.
        point: The value on the images themselves.
        replicates: The values on resamples [R], NaN where undefined.
        rarer: The number of images with the rarer outcome, which mostly is a wrong answer.
            Student's t has one degree of freedom less.

    Returns:
        The interval. There is none if fewer than two images have the rarer outcome, if the value
        lies at the end of its range, or if nothing varies.
    """
    plain = percentile(point, replicates)
    share = scale == "log-odds"
    if plain.low is None or rarer < 2 or point <= ROUNDING or (share and point >= 1 - ROUNDING):
        return Interval(plain.value, None, None)
    deviation = np.nanstd(replicates, ddof=1) * np.sqrt(rarer / (rarer - 1))
    if deviation <= ROUNDING:
        return Interval(plain.value, None, None)
    reach = stdtrit(rarer - 1, (1 + LEVEL) / 2) * deviation * np.array([-1.0, 1.0])
    if share:
        low, high = expit(np.log(point / (1 - point)) + reach / (point * (1 - point)))
    else:
        low, high = point * np.exp(reach / point)
    return Interval(plain.value, float(low), float(high))


def of_difference(
    first: Interval, second: Interval, replicates: tuple[FloatArray, FloatArray]
) -> tuple[float, float]:
    """Return the ends of the interval of first minus second.

    The distances from a value to the ends of its interval are combined like standard errors, with
    the correlation of the replicates. If the two intervals are lopsided, so is the result.
    Source: Zou and Donner, Construction of confidence limits about effect measures: a general
    approach (Statistics in Medicine 2008), equations for dependent estimates.

    Args:
        first: The interval of the first network.
        second: The interval of the second network.
        replicates: The values of both [R] on the same resamples.

    Raises:
        ValueError: One of the two has no interval.
    """
    a, b = replicates
    both = np.isfinite(a) & np.isfinite(b)
    spread = a[both].std() * b[both].std()
    together = float(np.mean((a[both] - a[both].mean()) * (b[both] - b[both].mean())))
    correlation = together / spread if spread > 0 else 0.0
    value, below, above = _distances(first)
    value_second, below_second, above_second = _distances(second)
    down = below**2 + above_second**2 - 2 * correlation * below * above_second
    up = above**2 + below_second**2 - 2 * correlation * above * below_second
    moved = value - value_second
    return moved - float(np.sqrt(max(down, 0.0))), moved + float(np.sqrt(max(up, 0.0)))


def _distances(interval: Interval) -> tuple[float, float, float]:
    """A value, how far below it the interval begins, and how far above it the interval ends."""
    if interval.whole is None:
        raise ValueError("the interval of a difference needs the intervals of both values")
    value, low, high = interval.whole
    return value, value - low, high - value


def proportion_interval(successes: ArrayLike, trials: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the ends of Wilson's 95 % interval of a share, NaN where there is no trial.

    `successes` and `trials` have the same shape, and so do both ends. ValueError if there are more
    successes than trials. Source: Wilson, Probable inference (JASA 1927).
    """
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if (k < 0).any() or (k > n).any():
        raise ValueError("successes must lie between 0 and trials")
    z = ndtri((1 + LEVEL) / 2)
    n = np.where(n > 0, n, np.nan)
    middle = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    # By the formula these ends are exactly 0 and 1. Rounding must not change that.
    return np.where(k == 0, 0 * low, low), np.where(k == n, 1.0, high)
