"""Smooth calibration error: a kernel takes the place of bins.

The kernel K_s on [0, 1] is the Gaussian of width s, reflected at 0 and at 1 as often as it reaches
them. Each image has mass 1 under it, wherever its confidence lies: one at exactly 1 counts as much
as one at 0.99. This kernel is the heat kernel of an interval with closed ends, so smoothing is one
multiplication of cosine coefficients: that of cos(k pi t) by exp(-(k pi s)^2 / 2).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct
from scipy.optimize import brentq

from flatcal_dist.calibration.checks import BoolArray, FloatArray, confidence_and_correct

NARROWEST = 2.0**-12  # kernel width; smooth errors below it are not resolved further
POINTS = 256  # of residuals that are kept for an interval


def smooth_calibration_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """smECE, the smooth calibration error, in [0, 1].

    With n images of confidence c_i that are right (a_i = 1) or wrong (0), and the kernel K_s above,

        smECE_s = integral over t in [0, 1] of | sum_i K_s(t, c_i) (c_i - a_i) | / n

    falls with the width s, and smECE is the fixed point smECE_s = s.
    Source: Blasiok and Nakkiran, Smooth ECE (ICLR 2024), section 3. The authors' package treats
    images at exactly 0 or 1 differently: see `smooth_relplot`.

    Raises ValueError for empty input, unequal lengths, and confidences outside [0, 1].
    """
    c, a = confidence_and_correct(confidence, correct)
    return smooth_error_at(c, a, kernel_width(c, a))


def kernel_width(c: FloatArray, a: BoolArray) -> float:
    """The width s at which smECE_s = s; `NARROWEST` where the fixed point lies below it."""

    def above(width: float) -> float:
        return smooth_error_at(c, a, width) - width

    if above(NARROWEST) <= 0:
        return NARROWEST
    return float(brentq(above, NARROWEST, 1.0, xtol=1e-7)) if above(1.0) < 0 else 1.0


def smooth_error_at(c: FloatArray, a: BoolArray, width: float) -> float:
    """smECE_s at one kernel width s."""
    cells = _cells(width)
    left, right_share = _places(c, cells)
    gap = c - a
    grid = np.bincount(left, weights=(1 - right_share) * gap, minlength=cells + 1)
    grid += np.bincount(left + 1, weights=right_share * gap, minlength=cells + 1)
    return float(np.abs(_residuals(grid, width)).sum() / len(c))


def _cells(width: float) -> int:
    """Cells of the grid on [0, 1]: a power of two, and at least ten to a kernel width."""
    return max(1024, 2 ** int(np.ceil(np.log2(10 / width))))


def _places(c: FloatArray, cells: int) -> tuple[np.ndarray, FloatArray]:
    """The node to the left of each image, and the share of the image that the right node gets."""
    place = c * cells
    left = np.minimum(place.astype(np.int64), cells - 1)
    return left, place - left


def _residuals(grid: FloatArray, width: float) -> FloatArray:
    """Smooth sums at the nodes [..., cells + 1], and weigh them so that they add up to integrals.

    The trapezoidal rule gives the nodes at 0 and 1 half a cell each.
    """
    cells = grid.shape[-1] - 1
    grid = grid.copy()
    grid[..., 1:-1] /= 2  # dct takes all but the first and last node twice
    coefficients = dct(grid, type=1, axis=-1)
    coefficients *= np.exp(-0.5 * (np.pi * width * np.arange(cells + 1)) ** 2)
    smooth = dct(coefficients, type=1, axis=-1, overwrite_x=True) / cells
    smooth[..., [0, -1]] /= 2
    return smooth


class SmoothSums:
    """smECE at the width that the images themselves have, for other weights of the images.

    `sums(weight)` [cells + 1] of sorted images are quick to make; `errors` turns many of them at
    once into smECE. confidence [N] must not rise.
    """

    def __init__(self, confidence: FloatArray, correct: ArrayLike) -> None:
        c, a = confidence_and_correct(confidence, correct)
        self.width = kernel_width(c, a)
        self.cells = _cells(self.width)
        left, right_share = _places(c, self.cells)
        self.gap_right = right_share * (c - a)
        # Images of cell k are those from bounds[k + 1] on, up to bounds[k].
        self.bounds = np.searchsorted(-left, -np.arange(self.cells + 1) + 0.5, side="left")

    def sums(self, weight: FloatArray, drift: FloatArray) -> FloatArray:
        """Mean of weight times gap at the nodes of the grid: [cells + 1].

        drift: the running sum [N + 1] of weight times gap, which the caller has.
        """
        total = drift[self.bounds]
        right = np.append(0.0, np.cumsum(weight * self.gap_right))[self.bounds]
        total, right = total[:-1] - total[1:], right[:-1] - right[1:]
        grid = np.append(0.0, right)
        grid[:-1] += total - right
        return grid / weight.sum()

    def errors(self, sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        """smECE [R] of sums [R, cells + 1], and the residuals [R, T] whose absolute values add up
        to it, at `POINTS` points or a few more.
        """
        residual = _residuals(sums, self.width)
        step = max(1, (self.cells + 1) // POINTS)
        return np.abs(residual).sum(axis=-1), residual[:, ::step] * step
