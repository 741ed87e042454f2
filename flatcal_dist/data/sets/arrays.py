"""CIFAR-10-C and CIFAR-100-C as they are published: one array of numpy for each corruption.

A directory holds gaussian_noise.npy and so on, each [50000, 32, 32, 3] uint8: the 10,000 test
images at severity 1, then the same at severity 2, up to 5. labels.npy holds the 50,000 labels.
Source: Hendrycks and Dietterich (ICLR 2019), https://zenodo.org/records/2535967 (CIFAR-10-C) and
https://zenodo.org/records/3555552 (CIFAR-100-C).
"""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.images import corruptions
from flatcal_dist.data.shards.regular import check_regular

SEVERITIES = len(corruptions.SEVERITIES)


def has_arrays(root: Path) -> bool:
    """Tell whether a directory holds arrays of corrupted images."""
    return (root / "labels.npy").exists() and bool(corruption_arrays(root))


def corruption_arrays(root: Path) -> dict[str, Path]:
    """Return the file of each corruption that is there, in the usual order."""
    known = corruptions.COMMON + corruptions.EXTRA
    return {name: root / f"{name}.npy" for name in known if (root / f"{name}.npy").exists()}


@dataclass(frozen=True)
class ArrayIndex:
    """The images of one corruption at one severity.

    Their keys are those that `flatcal shard` gives to the test images of CIFAR, whose order the
    arrays have.
    """

    file: Path
    corruption: str
    severity: int
    label: np.ndarray  # [n] int64
    prefix: str  # of the keys

    def __len__(self) -> int:
        return len(self.label)

    def read(self, sample: int) -> bytes:
        """Return one image as PNG, which loses nothing. Raises DataError."""
        pixels = _opened(self.file)[(self.severity - 1) * len(self) + sample]
        png = io.BytesIO()
        Image.fromarray(np.asarray(pixels)).save(png, "png", compress_level=1)
        return png.getvalue()

    def announce(self, samples: Iterable[int]) -> None:
        """Do nothing, because images that are read in order come by themselves."""

    def name(self, sample: int) -> str:
        return f"{self.file}: image {(self.severity - 1) * len(self) + sample}"

    def key(self, sample: int) -> str:
        return f"{self.prefix}{sample:05d}"

    def keys(self) -> list[str]:
        return [self.key(sample) for sample in range(len(self))]

    @property
    def size(self) -> np.ndarray:
        """The bytes of each image, without any encoding."""
        return np.full(len(self), _opened(self.file)[0].nbytes)

    @property
    def identity(self) -> str:
        about = f"{self.file.name} {self.file.stat().st_size} {self.severity} {self.prefix}"
        return hashlib.sha256(about.encode() + self.label.tobytes()).hexdigest()


def open_arrays(root: Path, corruption: str, severity: int, classes: int) -> ArrayIndex:
    """Return the images of a corruption at a severity.

    Args:
        root: The directory of the arrays.
        corruption: The name of the corruption.
        severity: 1 to 5.
        classes: The number of classes of the network.

    Raises:
        DataError: An array is cut short, has another form, or does not fit the network.
    """
    file, labels = root / f"{corruption}.npy", _opened(root / "labels.npy")
    images = _opened(file)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(
            f"{file} holds {images.dtype} of shape {list(images.shape)}, expected uint8 of shape "
            f"[n, height, width, 3]. {_AGAIN}"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{root / 'labels.npy'} holds no list of whole numbers. {_AGAIN}")
    if len(images) != len(labels) or not len(labels) or len(labels) % SEVERITIES:
        raise DataError(
            f"{file} holds {len(images)} images and labels.npy {len(labels)} labels: expected the "
            f"same number, and {SEVERITIES} times the number of test images. {_AGAIN}"
        )
    each = len(labels) // SEVERITIES
    label = np.asarray(labels[(severity - 1) * each : severity * each], np.int64)
    if label.min() < 0 or label.max() >= classes:
        raise DataError(
            f"{root / 'labels.npy'} has labels from {label.min()} to {label.max()}, and the "
            f"network has {classes} classes: expected labels from 0 to {classes - 1}. Is this the "
            "set of the other CIFAR?"
        )
    return ArrayIndex(file, corruption, severity, label, f"cifar{classes}_validation_")


_AGAIN = "Unpack CIFAR-10-C.tar or CIFAR-100-C.tar again, or download it again."


@lru_cache(maxsize=64)
def _opened(file: Path) -> np.ndarray:
    """Return an array that stays on the disk."""
    try:
        check_regular(file)
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read as an array ({error}). {_AGAIN}") from None
