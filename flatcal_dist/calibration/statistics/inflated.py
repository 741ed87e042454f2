"""Intervals of calibration errors, which noise inflates.

Such an error is a norm of a vector of gaps: of the bins, of the running sum of KS, of the smoothed
residual of smooth ECE. The gaps seen are the true ones and noise, so the norm of a calibrated
network is not 0, and resampling adds the noise once more: neither percentiles of a bootstrap nor
their reflection hold the truth as often as they say. What is inverted here instead is the test
"are the true gaps lambda times those seen?", with the bootstrap's noise, over all lambda >= 0.
At lambda = 0 it is the test for calibration, so the interval begins at 0 unless that is refuted.

The largest gap (KS) hangs on few gaps, and it matters there that the true gaps are no multiple of
those seen. Its interval holds whatever they are: the value plus and minus the 95 % quantile of the
largest noise, for |norm(true) - norm(seen)| <= norm(true - seen). It errs on the wide side.
"""

from collections.abc import Callable

import numpy as np

from flatcal_dist.calibration.checks import FloatArray

Norm = Callable[[FloatArray], FloatArray]


def absolute(gaps: FloatArray) -> FloatArray:
    """Sum of the absolute values of gaps [..., D]."""
    return np.abs(gaps).sum(axis=-1)


def euclidean(gaps: FloatArray) -> FloatArray:
    return np.sqrt((gaps**2).sum(axis=-1))


def largest(gaps: FloatArray) -> FloatArray:
    return np.abs(gaps).max(axis=-1)


def interval(
    seen: FloatArray, resampled: FloatArray, norm: Norm, level: float
) -> tuple[float, float]:
    """Interval of norm(true gaps), from the gaps seen [D] and those of resamples [R, D].

    It may lie below norm(seen) as a whole, where that is mostly noise.
    """
    noise = resampled - seen
    value, tail = float(norm(seen)), (1 - level) / 2
    if norm is largest:
        reach = float(np.quantile(norm(noise), level))
        return max(0.0, value - reach), value + reach
    if value == 0:
        return 0.0, float(np.quantile(norm(noise), level))

    def as_large(scale: float) -> float:
        return float((norm(scale * seen + noise) >= value * (1 - 1e-12)).mean())

    def as_small(scale: float) -> float:
        return float((norm(scale * seen + noise) <= value * (1 + 1e-12)).mean())

    low = 0.0 if as_large(0.0) >= tail else _crossing(lambda s: as_large(s) >= tail)
    high = 0.0 if as_small(0.0) < tail else _crossing(lambda s: as_small(s) < tail)
    return low * value, max(low, high) * value


def _crossing(beyond: Callable[[float], bool]) -> float:
    """The scale from which on `beyond` holds, to 1e-6; it does not at 0."""
    low, high = 0.0, 1.0
    while not beyond(high) and high < 1e6:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
