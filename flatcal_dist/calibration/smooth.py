"""Smooth calibration error and the smooth reliability curve: a kernel in place of bins."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.signal import fftconvolve

from .checks import BoolArray, FloatArray, confidence_and_correct

POINTS = 256  # of residuals that are kept for an interval


@dataclass(frozen=True)
class SmoothCurve:
    """Kernel estimate of accuracy at `confidence` [T], an even grid over [0, 1].

    accuracy: NaN where there is no image near. density: of the confidences, integrates to 1.
    error: the smooth calibration error. width: of the kernel, chosen by the error itself.
    """

    confidence: FloatArray
    accuracy: FloatArray
    density: FloatArray
    error: float
    width: float


def smooth_calibration_error(confidence: ArrayLike, correct: ArrayLike) -> float:
    """smECE: the fixed point s = smECE_s, where smECE_s is the integral over t in [0, 1] of
    |sum_i K_s(t, c_i) (c_i - a_i)| / (integral of sum_i K_s(t, c_i)).

    K_s is the Gaussian of width s reflected at 0 and 1. Resolution, reflection and kernel support
    follow the authors' implementation, so that values compare with published ones: s is searched
    by ten bisections from 1, and images at exactly 0 or 1 have no mirror image.
    Source: Blasiok and Nakkiran, Smooth ECE (ICLR 2024), section 3.
    """
    c, a = confidence_and_correct(confidence, correct)
    return smooth_error_at(c, a, _width(c, a))


def smooth_curve(confidence: ArrayLike, correct: ArrayLike) -> SmoothCurve:
    """The curve of a reliability diagram without bins, at the width that smECE finds."""
    c, a = confidence_and_correct(confidence, correct)
    width = _width(c, a)
    at, (right, images) = _smoothed(c, (a.astype(np.float64), np.ones(len(c))), width)
    near = images > 1e-6 * images.max()  # less is the rounding of the convolution
    accuracy = np.where(near, np.clip(right / np.where(near, images, 1.0), 0, 1), np.nan)
    images = np.maximum(images, 0.0)
    density = images / np.trapezoid(images, at)
    return SmoothCurve(at, accuracy, density, smooth_error_at(c, a, width), width)


def _width(c: FloatArray, a: BoolArray) -> float:
    low, high = 0.0, 1.0
    for _ in range(10):  # smECE_s falls with s, so the crossing is unique
        middle = (low + high) / 2
        low, high = (low, middle) if smooth_error_at(c, a, middle) < middle else (middle, high)
    return high


def smooth_error_at(c: FloatArray, a: BoolArray, width: float) -> float:
    """smECE_s at one kernel width s."""
    _, (gap, images) = _smoothed(c, (c - a, np.ones(len(c))), width)
    return float(np.abs(gap).sum() / images.sum())


def _smoothed(
    c: FloatArray, weights: tuple[FloatArray, ...], width: float
) -> tuple[FloatArray, FloatArray]:
    """Sums of each weight under the reflected kernel, at an even grid of points."""
    cells = _cells(width)
    place = c * cells
    left = np.minimum(place.astype(np.int64), cells - 1)
    right_share = place - left
    grids = []
    for weight in weights:
        grid = np.bincount(left, weights=(1 - right_share) * weight, minlength=cells + 1)
        grid += np.bincount(left + 1, weights=right_share * weight, minlength=cells + 1)
        grids.append(grid)
    smoothed = _convolve(np.stack(grids), width)
    return np.linspace(0.0, 1.0, smoothed.shape[1]), smoothed


def _cells(width: float) -> int:
    return int(max(1000, 10 / width))


def _convolve(grids: FloatArray, width: float) -> FloatArray:
    """Smooth grids [R, cells + 1] by the kernel reflected at both ends: [R, T], T points."""
    cells = grids.shape[1] - 1
    kernel = np.exp(-0.5 * (np.arange(-(cells // 2), cells // 2 + 1) / cells / width) ** 2)
    mirrored = np.concatenate([grids[:, :0:-1], grids, grids[:, -2::-1]], axis=1)
    smooth = fftconvolve(mirrored, kernel[None], mode="same", axes=1)[:, cells : 2 * cells + 1]
    place = np.linspace(0.0, cells, max(200, int(np.ceil(10 / width))))
    left = np.minimum(place.astype(np.int64), cells - 1)
    right_share = place - left
    return smooth[:, left] * (1 - right_share) + smooth[:, left + 1] * right_share


class SmoothSums:
    """smECE at the width that the images themselves have, for other weights of the images.

    `sums(weight)` [2, cells + 1] of sorted images are quick to make; `errors` turns many of them
    at once into smECE. confidence [N] must not rise.
    """

    def __init__(self, confidence: FloatArray, correct: ArrayLike) -> None:
        c, a = confidence_and_correct(confidence, correct)
        self.width = _width(c, a)
        self.cells = _cells(self.width)
        place = c * self.cells
        left = np.minimum(place.astype(np.int64), self.cells - 1)
        self.right_share, self.gap = place - left, c - a
        # Images of cell k are those from bounds[k + 1] on, up to bounds[k].
        self.bounds = np.searchsorted(-left, -np.arange(self.cells + 1) + 0.5, side="left")

    def sums(self, weight: FloatArray, drift: FloatArray, images: FloatArray) -> FloatArray:
        """Sums of weight times gap, and of weight, at the nodes of the grid: [2, cells + 1].

        drift, images: their running sums [N + 1], which the caller has.
        """
        shared, parts = weight * self.right_share, np.empty((2, self.cells + 1))
        for part, running, each in zip(
            parts, (drift, images), (shared * self.gap, shared), strict=True
        ):
            total = running[self.bounds]
            right = np.append(0.0, np.cumsum(each))[self.bounds]
            total, right = total[:-1] - total[1:], right[:-1] - right[1:]
            part[0], part[1:] = 0.0, right
            part[:-1] += total - right
        return parts

    def errors(self, sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        """smECE [R] of sums [R, 2, cells + 1], and the residuals [R, T] whose absolute values add
        up to it, at `POINTS` points or fewer.
        """
        images = _convolve(sums[:, 1], self.width).sum(axis=1)
        residual = _convolve(sums[:, 0], self.width) / images[:, None]
        step = -(-residual.shape[1] // POINTS)
        return np.abs(residual).sum(axis=1), residual[:, ::step] * step
