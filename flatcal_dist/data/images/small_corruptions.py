"""Corruptions of small images at the size that they have, with the constants of CIFAR-10-C.

Eleven of its corruptions are here: those that are a few lines of arithmetic. The others need
pictures of frost or the library ImageMagick. The published arrays were made by other code and with
other random numbers, so figures on these images are near the published ones, but not the same. Gray
images stay gray, and images may have any size; CIFAR-10-C itself has 32 x 32 pixels.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations (ICLR 2019); the constants are those of their make_cifar_c.py
(https://github.com/hendrycks/robustness).
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from flatcal_dist.data.images.corruptions import seed_of
from flatcal_dist.data.images.decode import decode

GRAY = ("1", "L", "LA", "I", "I;16", "F")  # modes of Pillow


def corrupted_png(
    data: bytes | memoryview, name: str, corruption: str, severity: int, key: str
) -> bytes:
    """Return an encoded image corrupted at its own size, as PNG, which loses nothing more.

    It takes and raises what `corrupted_jpeg` does, but a corruption is one of `SMALL`.
    """
    pixels = decode(data, 3, name).permute(1, 2, 0).numpy()
    if Image.open(io.BytesIO(data)).mode in GRAY:
        pixels = pixels[:, :, :1]
    random = np.random.Generator(np.random.Philox(key=seed_of(corruption, severity, key)))
    damaged = corrupt(pixels, corruption, severity, random)
    png = io.BytesIO()
    _image(damaged).save(png, "png")
    return png.getvalue()


def corrupt(
    pixels: np.ndarray, corruption: str, severity: int, random: np.random.Generator
) -> np.ndarray:
    """Return corrupted pixels.

    Args:
        pixels: [height, width, channels] uint8, with one or three channels.
        corruption: One of `SMALL`.
        severity: 1 to 5.
        random: The source of noise.

    Returns:
        Pixels of the same shape and type. Fractions are cut off, as in the published arrays.
    """
    change, constants = _CHANGES[corruption]
    return change(pixels, constants[severity - 1], random)


def _of_unit(change: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Make a change of values in [0, 1] one of bytes, whose fractions are cut off."""

    def of_bytes(pixels: np.ndarray, constant: Any, random: np.random.Generator) -> np.ndarray:
        changed = change(pixels / 255.0, constant, random)
        return (np.clip(changed, 0.0, 1.0) * 255.0).astype(np.uint8)

    return of_bytes


def _gaussian_noise(x: np.ndarray, sd: float, random: np.random.Generator) -> np.ndarray:
    return x + random.normal(scale=sd, size=x.shape)


def _shot_noise(x: np.ndarray, photons: float, random: np.random.Generator) -> np.ndarray:
    return random.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Set a share of the values to 0 or 1, each with the same probability."""
    hit = random.random(x.shape) < share
    return np.where(hit, random.random(x.shape) < 0.5, x)


def _speckle_noise(x: np.ndarray, sd: float, random: np.random.Generator) -> np.ndarray:
    return x + x * random.normal(scale=sd, size=x.shape)


def _gaussian_blur(x: np.ndarray, sigma: float, _: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter  # takes a moment to import

    return gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _defocus_blur(
    x: np.ndarray, radius_and_sigma: tuple[float, float], _: np.random.Generator
) -> np.ndarray:
    """Convolve with a disk, whose edge is smoothed by a Gaussian of three pixels."""
    from scipy.ndimage import convolve, convolve1d

    radius, sigma = radius_and_sigma
    side = np.arange(-8, 9)
    disk = (side[:, None] ** 2 + side**2 <= radius**2).astype(np.float64)
    taps = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * sigma**2))
    for axis in (0, 1):
        disk = convolve1d(disk, taps / taps.sum(), axis=axis, mode="mirror")
    return convolve(x, (disk / disk.sum())[:, :, None], mode="mirror")


def _zoom_blur(x: np.ndarray, largest: float, _: np.random.Generator) -> np.ndarray:
    """Average the image with enlarged copies of its centre: 1.00, 1.01, up to `largest`."""
    factors = np.arange(1.0, largest + 0.005, 0.01)
    return (x + sum(_enlarged(x, factor) for factor in factors)) / (len(factors) + 1)


def _enlarged(x: np.ndarray, factor: float) -> np.ndarray:
    from scipy.ndimage import zoom

    height, width = x.shape[:2]
    rows, columns = (int(np.ceil(size / factor)) for size in (height, width))
    top, left = (height - rows) // 2, (width - columns) // 2
    centre = x[top : top + rows, left : left + columns]
    grown = zoom(centre, (factor, factor, 1), order=1)
    top, left = (grown.shape[0] - height) // 2, (grown.shape[1] - width) // 2
    return grown[top : top + height, left : left + width]


def _contrast(x: np.ndarray, factor: float, _: np.random.Generator) -> np.ndarray:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _brightness(x: np.ndarray, more: float, _: np.random.Generator) -> np.ndarray:
    """Raise the value of HSV, which is the largest channel, and keep hue and saturation."""
    value = x.max(2, keepdims=True)
    raised = np.minimum(value + more, 1.0)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1.0), raised)


def _pixelate(pixels: np.ndarray, scale: float, _: np.random.Generator) -> np.ndarray:
    height, width = pixels.shape[:2]
    fewer = (max(int(width * scale), 1), max(int(height * scale), 1))
    coarse = _image(pixels).resize(fewer, Image.Resampling.BOX)
    return np.asarray(coarse.resize((width, height), Image.Resampling.BOX)).reshape(pixels.shape)


def _jpeg_compression(pixels: np.ndarray, quality: int, _: np.random.Generator) -> np.ndarray:
    jpeg = io.BytesIO()
    _image(pixels).save(jpeg, "jpeg", quality=quality)
    return np.asarray(Image.open(jpeg)).reshape(pixels.shape)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


# What each does, and its constant at severities 1 to 5.
_CHANGES: dict[str, tuple[Callable[..., np.ndarray], tuple[Any, ...]]] = {
    "gaussian_noise": (_of_unit(_gaussian_noise), (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_of_unit(_shot_noise), (500, 250, 100, 75, 50)),
    "impulse_noise": (_of_unit(_impulse_noise), (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (
        _of_unit(_defocus_blur),
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ),
    "zoom_blur": (_of_unit(_zoom_blur), (1.05, 1.10, 1.15, 1.20, 1.25)),
    "brightness": (_of_unit(_brightness), (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_of_unit(_contrast), (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (_of_unit(_speckle_noise), (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_of_unit(_gaussian_blur), (0.4, 0.6, 0.7, 0.8, 1.0)),
}
SMALL = tuple(_CHANGES)  # the last two are meant to choose settings on, as `corruptions.EXTRA`
