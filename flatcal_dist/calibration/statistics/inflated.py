"""Intervals of calibration errors, which noise inflates.

Such an error is a norm of a vector of gaps: the gaps of the bins (ECE), the running sum (KS) or the
smoothed residual (smooth ECE). The observed gaps are the true gaps plus noise. Therefore the norm
of a calibrated network is not 0, and resampling adds the noise once more. Neither percentiles of a
bootstrap nor their reflection hold the truth as often as they should. This module inverts a test
instead. The test asks whether the true gaps are lambda times the observed ones, given the noise of
the bootstrap, for all lambda >= 0. At lambda = 0 it tests for calibration. So the interval begins
at 0 unless calibration is refuted.

The largest gap (KS) depends on few gaps. For these it matters that the true gaps are no multiple of
the observed ones. The interval of KS is therefore the value plus and minus the 95 % quantile of the
largest noise, which holds for any true gaps, because
|norm(true) - norm(observed)| <= norm(true - observed). This interval is rather too wide.
"""

from collections.abc import Callable

import numpy as np

from flatcal_dist.calibration.checks import FloatArray

Norm = Callable[[FloatArray], FloatArray]


def absolute(gaps: FloatArray) -> FloatArray:
    """Return the sum of the absolute values of gaps [..., D]."""
    return np.abs(gaps).sum(axis=-1)


def euclidean(gaps: FloatArray) -> FloatArray:
    """Return the root of the sum of the squared gaps [..., D]."""
    return np.sqrt((gaps**2).sum(axis=-1))


def largest(gaps: FloatArray) -> FloatArray:
    """Return the largest absolute value of gaps [..., D]."""
    return np.abs(gaps).max(axis=-1)


def interval(
    seen: FloatArray, resampled: FloatArray, norm: Norm, level: float
) -> tuple[float, float]:
    """Return the interval of the norm of the true gaps.

    The whole interval can lie below norm(seen), if that is mostly noise.

    Args:
        seen: The observed gaps [D].
        resampled: The gaps of resamples [R, D].
        norm: One of the three norms of this module.
        level: How often the interval should hold the truth, such as 0.95.
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
    """Return the scale from which on `beyond` holds, to 1e-6. It must not hold at 0."""
    low, high = 0.0, 1.0
    while not beyond(high) and high < 1e6:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high
