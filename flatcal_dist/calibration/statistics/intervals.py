"""95 % intervals of one statistic, from its value and its values on resamples of the images.

Which construction a statistic has was chosen by how often its intervals hold the truth, on real
logits: `benchmarks/interval_coverage.py` measures it, and the room's README has the table.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, ndtri, stdtrit

from flatcal_dist.calibration.checks import FloatArray

LEVEL = 0.95
ROUNDING = 1e-12  # what is smaller, of rates and nats, is an error of rounding
Scale = Literal["logarithm", "log-odds"]  # of a positive figure, and of a share


@dataclass(frozen=True)
class Interval:
    """A value and its interval; `low` and `high` are None where resamples leave it undefined."""

    value: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        return beyond_zero(self.low, self.high)


def beyond_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval leaves out zero, by more than an error of rounding."""
    return low is not None and high is not None and (low > ROUNDING or high < -ROUNDING)


def no_width(interval: Interval) -> bool:
    """Whether the ends differ by rounding alone: nothing varied between resamples."""
    if interval.low is None:
        return False
    return interval.high - interval.low <= ROUNDING * max(1.0, abs(interval.low))


def percentile(point: float, replicates: FloatArray) -> Interval:
    """The central 95 % of the values on resamples."""
    value = float(point) if np.isfinite(point) else None
    defined = replicates[np.isfinite(replicates)]
    # With few wrong images a resample can hold none; some such are left out, many are a warning.
    if value is None or len(defined) < 0.95 * len(replicates):
        return Interval(value, None, None)
    low, high = np.quantile(defined, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, float(low), float(high))


def of_ranking(scale: Scale, point: float, replicates: FloatArray, rarer: int) -> Interval:
    """Interval of a metric of failure prediction, which depends on few images.

    Percentiles of resamples are too narrow there: the metric's spread grows with its value, and a
    resample of few wrong images varies less than new images would. So the metric is taken on the
    scale where its spread is even (the logarithm, or the log-odds where it is a share),
    with the bootstrap's standard deviation carried there by the derivative, and Student's t.

    Args:
        scale: where its spread is even.
        point: its value on the images themselves.
        replicates: its values [R] on resamples; NaN where undefined.
        rarer: how many images have the rarer outcome (mostly: are wrong); t has one degree of
            freedom less than that.

    Returns:
        The interval; with ends None where fewer than two images have the rarer outcome, where the
        value lies at the end of its range, and where nothing varies.
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
    """Ends of the interval of first minus second, from the interval of each.

    The distances from each value to the ends of its own interval are combined like standard errors,
    with the correlation of their replicates ([R] each, on the same resamples), so that the interval
    of the difference is as lopsided as theirs are.
    Source: Zou and Donner, Construction of confidence limits about effect measures: a general
    approach (Statistics in Medicine 2008), equations for dependent estimates.
    """
    a, b = replicates
    both = np.isfinite(a) & np.isfinite(b)
    spread = a[both].std() * b[both].std()
    together = float(np.mean((a[both] - a[both].mean()) * (b[both] - b[both].mean())))
    correlation = together / spread if spread > 0 else 0.0
    below, above = first.value - first.low, first.high - first.value
    below_second, above_second = second.value - second.low, second.high - second.value
    down = below**2 + above_second**2 - 2 * correlation * below * above_second
    up = above**2 + below_second**2 - 2 * correlation * above * below_second
    moved = first.value - second.value
    return moved - float(np.sqrt(max(down, 0.0))), moved + float(np.sqrt(max(up, 0.0)))


def proportion_interval(successes: ArrayLike, trials: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Wilson's 95 % interval of a share; NaN where there is no trial. Arrays of any one shape.

    Source: Wilson, Probable inference (JASA 1927).
    """
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    if (k < 0).any() or (k > n).any():
        raise ValueError("successes must lie between 0 and trials")
    z = ndtri((1 + LEVEL) / 2)
    n = np.where(n > 0, n, np.nan)
    middle = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    low, high = np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)
    # By the formula these ends are 0 and 1, and rounding must not make a gap of them.
    return np.where(k == 0, 0 * low, low), np.where(k == n, 1.0, high)
