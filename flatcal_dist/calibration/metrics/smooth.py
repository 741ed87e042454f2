"""Smooth calibration error: a kernel takes the place of bins.

The kernel K_s on [0, 1] is the Gaussian of width s, reflected at 0 and at 1 as often as it reaches
them. Each image has mass 1 under the kernel, wherever its confidence lies. An image at exactly 1
counts as much as one at 0.99. This kernel is the heat kernel of an interval with closed ends.
Therefore smoothing multiplies cosine coefficients: that of cos(k pi t) by exp(-(k pi s)^2 / 2).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.fft import dct
from scipy.optimize import brentq

from flatcal_dist.calibration.checks import BoolArray, FloatArray, confidence_and_correct

NARROWEST = 2.0**-12  # the least kernel width; smaller errors are not resolved
POINTS = 256  # points at which residuals are kept for an interval


def smooth_calibration_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Return smECE, the smooth calibration error, in [0, 1].

    For n images of confidence c_i that are right (a_i = 1) or wrong (a_i = 0), and the kernel K_s
    of this module,

        smECE_s = integral over t in [0, 1] of | sum_i K_s(t, c_i) (c_i - a_i) | / n

    falls with the width s, and smECE is the fixed point smECE_s = s. Source: Blasiok and Nakkiran,
    Smooth ECE (ICLR 2024), section 3. The package of the authors treats images at exactly 0 or 1
    differently, see `smooth_relplot`.

    Raises ValueError for empty input, unequal lengths, and confidences outside [0, 1].
    """
    c, a = confidence_and_correct(confidence, correct)
    return smooth_error_at(c, a, kernel_width(c, a))


def kernel_width(c: FloatArray, a: BoolArray) -> float:
    """Return the width s at which smECE_s = s, and at least `NARROWEST`."""

    def above(width: float) -> float:
        return smooth_error_at(c, a, width) - width

    if above(NARROWEST) <= 0:
        return NARROWEST
    return float(brentq(above, NARROWEST, 1.0, xtol=1e-7)) if above(1.0) < 0 else 1.0


def smooth_error_at(c: FloatArray, a: BoolArray, width: float) -> float:
    """Return smECE_s at one kernel width.

    Args:
        c: The confidences [N].
        a: Which images are right [N].
        width: The kernel width s.
    """
    cells = _cells(width)
    left, right_share = _places(c, cells)
    gap = c - a
    grid = np.zeros(cells + 1)
    grid += np.bincount(left, weights=(1 - right_share) * gap, minlength=cells + 1)
    grid += np.bincount(left + 1, weights=right_share * gap, minlength=cells + 1)
    return float(np.abs(_residuals(grid, width)).sum() / len(c))


def _cells(width: float) -> int:
    """The cells of the grid on [0, 1]: a power of two, and at least ten per kernel width."""
    return max(1024, 2 ** int(np.ceil(np.log2(10 / width))))


def _places(c: FloatArray, cells: int) -> tuple[np.ndarray, FloatArray]:
    """The node to the left of each image, and the share of the image that the right node takes."""
    place = c * cells
    left = np.minimum(place.astype(np.int64), cells - 1)
    return left, place - left


def _residuals(grid: FloatArray, width: float) -> FloatArray:
    """Smooth sums at the nodes [..., cells + 1] and weight them so that they add up to integrals.

    By the trapezoidal rule, the nodes at 0 and 1 have half a cell each.
    """
    cells = grid.shape[-1] - 1
    grid = grid.copy()
    grid[..., 1:-1] /= 2  # dct counts all nodes but the first and the last twice
    coefficients = dct(grid, type=1, axis=-1)
    coefficients *= np.exp(-0.5 * (np.pi * width * np.arange(cells + 1)) ** 2)
    smooth = dct(coefficients, type=1, axis=-1, overwrite_x=True) / cells
    smooth[..., [0, -1]] /= 2
    return smooth


class SmoothSums:
    """smECE for other weights of the images, at the kernel width of the images themselves.

    `sums` is quick for sorted images, and `errors` turns many sums at once into smECE. The images
    must be sorted by falling confidence [N].
    """

    def __init__(self, confidence: FloatArray, correct: ArrayLike) -> None:
        c, a = confidence_and_correct(confidence, correct)
        self.width = kernel_width(c, a)
        self.cells = _cells(self.width)
        left, right_share = _places(c, self.cells)
        self.gap_right = right_share * (c - a)
        # The images of cell k begin at bounds[k + 1] and end before bounds[k].
        self.bounds = np.searchsorted(-left, -np.arange(self.cells + 1) + 0.5, side="left")

    def sums(self, weight: FloatArray, drift: FloatArray) -> FloatArray:
        """Return the mean of weight times gap at the nodes of the grid [cells + 1].

        `drift` [N + 1] is the running sum of weight times gap.
        """
        total = drift[self.bounds]
        right = np.append(0.0, np.cumsum(weight * self.gap_right))[self.bounds]
        total, right = total[:-1] - total[1:], right[:-1] - right[1:]
        grid = np.append(0.0, right)
        grid[:-1] += total - right
        return grid / weight.sum()

    def errors(self, sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return smECE [R] of sums [R, cells + 1], and residuals [R, T].

        The absolute values of the residuals add up to smECE. T is `POINTS` or a few more.
        """
        residual = _residuals(sums, self.width)
        step = max(1, (self.cells + 1) // POINTS)
        return np.abs(residual).sum(axis=-1), residual[:, ::step] * step
