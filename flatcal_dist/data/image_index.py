"""What loaders and evaluation need of a data set, however its images are stored."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np


class ImageIndex(Protocol):
    """Encoded images with labels, numbered from 0 to n - 1.

    `Index` holds the images of shards, `TreeIndex` the images of folders, and `Corrupted` corrupts
    the images of another index as they are read.
    """

    @property
    def label(self) -> np.ndarray:
        """The class of each image, int [n]."""

    @property
    def size(self) -> np.ndarray:
        """The bytes of each image as it is stored, int [n]."""

    @property
    def identity(self) -> str:
        """The SHA-256 that names the data in reports."""

    def __len__(self) -> int: ...

    def read(self, sample: int) -> bytes | memoryview:
        """Return one encoded image. Raises DataError if it cannot be read."""

    def announce(self, samples: Iterable[int]) -> None:
        """Tell the system that these images will be read soon."""

    def name(self, sample: int) -> str:
        """Return the name of one image for messages: where it lies, and its key."""

    def key(self, sample: int) -> str:
        """Return the key of one image, which no other image of the data set has."""

    def keys(self) -> list[str]:
        """Return the keys of all images."""
