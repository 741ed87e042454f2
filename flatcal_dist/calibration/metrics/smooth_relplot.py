"""Smooth calibration error as the authors' package relplot computes it.

It allows to compare values with published ones. It differs from the definition in `smooth` in three
ways. Images at exactly 0 or 1 have no mirror image and count half, which changes the value of a
network whose confidences saturate. The kernel ends half a unit from its centre. Ten bisections from
1 find the fixed point, to one part in a thousand.
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import irfft, next_fast_len, rfft

from flatcal_dist.calibration.checks import BoolArray, FloatArray, confidence_and_correct


def smooth_calibration_error_relplot(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return smECE in [0, 1] as in relplot 1.0.3 (Apple, 2025), the code of Blasiok and Nakkiran
    (ICLR 2024).

    Raises ValueError for empty input, unequal lengths, and confidences outside [0, 1].
    """
    c, a = confidence_and_correct(confidence, correct)
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if relplot_error_at(c, a, middle) < middle else (middle, high)
    return relplot_error_at(c, a, high)


def relplot_error_at(c: FloatArray, a: BoolArray, width: float) -> float:
    """Return relplot's smECE_sigma at one kernel width.

    Args:
        c: The confidences [N].
        a: Which images are right [N].
        width: The kernel width sigma.
    """
    cells = int(max(1000, 10 / width))
    place = c * cells
    left = np.minimum(place.astype(np.int64), cells - 1)
    share = place - left
    grids = np.zeros((2, cells + 1))
    for grid, weight in zip(grids, (c - a, np.ones(len(c))), strict=True):
        grid += np.bincount(left, weights=(1 - share) * weight, minlength=cells + 1)
        grid += np.bincount(left + 1, weights=share * weight, minlength=cells + 1)
    kernel = np.exp(-0.5 * (np.arange(-(cells // 2), cells // 2 + 1) / cells / width) ** 2)
    # The end nodes are not repeated, so that images exactly there have no mirror image.
    mirrored = np.concatenate([grids[:, :0:-1], grids, grids[:, -2::-1]], axis=1)
    size = next_fast_len(mirrored.shape[1] + len(kernel), real=True)
    smooth = irfft(rfft(mirrored, size) * rfft(kernel, size), size)
    smooth = smooth[:, cells + len(kernel) // 2 :][:, : cells + 1]
    at = np.linspace(0.0, cells, max(200, int(np.ceil(10 / width))))
    gap, images = (np.interp(at, np.arange(cells + 1), row) for row in smooth)
    return float(np.abs(gap).sum() / images.sum())
