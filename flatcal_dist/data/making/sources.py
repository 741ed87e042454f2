"""Sources of shards: encoded images, each with its label, its key and its original name.

A source knows where its n images are, and not what they hold. `images` reads them one by one.
`take` cuts out the part that one shard needs, which is small enough to be sent to a worker.
"""

import dataclasses
import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.regular import open_regular
from flatcal_dist.data.shards.writing import check_key


@dataclass(frozen=True, kw_only=True)
class Source:
    """n images in a natural order. All arrays have length n."""

    kind: str  # "image folder", ...
    prefix: str  # how its shards are usually called
    shards: dict[str, int] | None  # their number by split; None: it follows from the bytes
    classes: tuple[str, ...]  # the name of each label
    label: np.ndarray  # [n] i4
    key: np.ndarray  # [n] S, keys of the samples in shards
    name: np.ndarray  # [n] S, original names of the images
    left_out: tuple[str, ...] = ()  # paths that are no image of a class
    clean: np.ndarray | None = None  # [n] i4, true labels, where `label` holds noisy ones

    def __len__(self) -> int:
        return len(self.label)

    def take(self, numbers: np.ndarray) -> Self:
        """Return the images with these numbers, in this order."""
        parts = {name: value[numbers] for name, value in self._arrays()}
        return dataclasses.replace(self, **parts)

    def identity(self) -> dict[str, Any]:
        """Return what tells this source from another one, and from itself after a change."""
        digests = {name: _digest(value) for name, value in self._arrays()}
        return {"kind": self.kind, "images": len(self), **digests}

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                yield name, value

    def images(self) -> Iterator[bytes]:
        """Read the images in order. Raises DataError if one cannot be read or has changed."""
        raise NotImplementedError

    def bytes(self) -> int | None:
        """Return the bytes of all images, if they are known without reading the images."""
        return None


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Image files. `name` holds their paths below `root`."""

    root: Path
    size: np.ndarray  # [n] i8, bytes
    time: np.ndarray  # [n] i8, time of modification, ns

    def images(self) -> Iterator[bytes]:
        for name, size in zip(self.name.tolist(), self.size.tolist(), strict=True):
            path = self.root / os.fsdecode(name)
            try:
                with open_regular(path) as file:
                    image = file.read(size + 1)
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
            if len(image) != size:
                raise DataError(
                    f"{path} has {path.stat().st_size} bytes, but had {size} when sharding began: "
                    "the source changes. Wait until it is complete, then shard it again."
                )
            yield image

    def bytes(self) -> int:
        return int(self.size.sum())


@dataclass(frozen=True, kw_only=True)
class Members(Source):
    """Images inside an uncompressed tar, or inside tars that it holds."""

    tar: Path
    tar_size: int  # bytes
    tar_time: int  # time of modification, ns
    offset: np.ndarray  # [n] i8, first byte of the image in the tar
    size: np.ndarray  # [n] i8, bytes

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "tar_size": self.tar_size, "tar_time": self.tar_time}

    def images(self) -> Iterator[bytes]:
        try:
            with open_regular(self.tar) as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != (self.tar_size, self.tar_time):
                    raise DataError(f"{self.tar} changed after sharding began. Start again.")
                for offset, size in zip(self.offset.tolist(), self.size.tolist(), strict=True):
                    image = os.pread(file.fileno(), size, offset)
                    if len(image) != size:
                        raise DataError(f"{self.tar} ends before byte {offset + size}.")
                    yield image
        except OSError as error:
            raise DataError(f"{self.tar} cannot be read ({error.strerror or error}).") from error

    def bytes(self) -> int:
        return int(self.size.sum())


@dataclass(frozen=True, kw_only=True)
class Pixels(Source):
    """Images in memory. They are written as PNG, which loses nothing."""

    pixels: np.ndarray  # [n, H, W] or [n, H, W, 3] uint8

    def images(self) -> Iterator[bytes]:
        for pixels in self.pixels:
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "png")
            yield png.getvalue()


def unique_keys(names: Sequence[str], where: str = "") -> np.ndarray:
    """Return keys [n] S for images of these names: the file names without extension.

    Where these are not unique, the folder comes in front. Dots become _, because a key ends at the
    first dot. Raises DataError, which begins with `where`, if two images would still share a key,
    or if a name cannot be a key.
    """
    keys = [_stem(name) for name in names]
    if len(set(keys)) < len(keys):
        folders = (name.rpartition("/")[0].rpartition("/")[2] for name in names)
        keys = [
            f"{folder.replace('.', '_')}_{key}" for folder, key in zip(folders, keys, strict=True)
        ]
    for key, name in zip(keys, names, strict=True):
        check_key(key, f"{where}{name!r}: ")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        first, second = [name for name, key in zip(names, keys, strict=True) if key == twice[0]][:2]
        raise DataError(
            f"{where}{first} and {second} would both have the key {twice[0]!r} ({len(twice)} such "
            "keys; extensions do not count, and dots become _). Rename or remove one of each."
        )
    return np.array([key.encode() for key in keys])


def _stem(name: str) -> str:
    stem = name.rpartition("/")[2].rpartition(".")[0]
    return stem.replace(".", "_")  # webdataset would cut the key at a dot


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]
