"""Tiny-ImageNet as it is published: tiny-imagenet-200.zip, or its unpacked folder.

The archive holds, below tiny-imagenet-200/:

    wnids.txt                          the 200 classes
    train/WNID/images/WNID_0.JPEG      500 images of each class
    val/images/val_0.JPEG              10,000 images
    val/val_annotations.txt            a line for each of them: the file, its WNID, and a box
    test/images/test_0.JPEG            images without labels, which are not used

Labels count the sorted WNIDs, as for ImageNet and in torchvision's ImageFolder. They do not count
the lines of wnids.txt. Images are copied bit for bit. Source: Le and Yang, Tiny ImageNet Visual
Recognition Challenge (Stanford CS231N, 2015).
"""

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.image_folder import refuse_empty
from flatcal_dist.data.making.sources import Files, Source, unique_keys
from flatcal_dist.data.shards.regular import open_regular, read_regular

ARCHIVE, FOLDER = "tiny-imagenet-200.zip", "tiny-imagenet-200"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
LARGEST = 1 << 24  # bytes of one member, when it is unpacked
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
AGAIN = f"Download {ARCHIVE} again (http://cs231n.stanford.edu/{ARCHIVE})."


@dataclass(frozen=True, kw_only=True)
class Zipped(Source):
    """Images inside a zip, which is not unpacked."""

    zip: Path
    zip_size: int  # bytes
    zip_time: int  # time of modification, ns
    offset: np.ndarray  # [n] i8, first byte of the local header
    packed: np.ndarray  # [n] i8, bytes in the zip
    size: np.ndarray  # [n] i8, bytes of the image
    crc: np.ndarray  # [n] u4, CRC-32 of the image
    deflated: np.ndarray  # [n] bool: whether the image is compressed

    def images(self) -> Iterator[bytes]:
        columns = (self.offset, self.packed, self.size, self.crc, self.deflated, self.name)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        try:
            with open_regular(self.zip) as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != (self.zip_size, self.zip_time):
                    raise DataError(f"{self.zip} changed after sharding began. Start again.")
                for offset, packed, size, crc, deflated, name in rows:
                    data = _packed_bytes(file.fileno(), offset, packed)
                    data = _inflated(data, size) if deflated else data
                    if len(data) != size or zlib.crc32(data) != crc:
                        raise DataError(f"{self.zip}: {os.fsdecode(name)} is damaged. {AGAIN}")
                    yield data
        except OSError as error:
            raise DataError(f"{self.zip} cannot be read ({error.strerror or error}).") from error

    def bytes(self) -> int:
        return int(self.size.sum())


def _packed_bytes(file: int, offset: int, packed: int) -> bytes:
    header = os.pread(file, LOCAL_HEADER.size, offset)
    if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\3\4":
        return b""
    *_, name, extra = LOCAL_HEADER.unpack(header)
    return os.pread(file, packed, offset + LOCAL_HEADER.size + name + extra)


def _inflated(data: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error:
        return b""


def is_tiny_imagenet(path: Path) -> bool:
    """Tell whether a path is a zip, or a folder with the list of classes of Tiny-ImageNet."""
    return (path / "wnids.txt").is_file() if path.is_dir() else path.suffix == ".zip"


def tiny_imagenet(path: Path, split: str, *, checked: bool = True) -> Source:
    """Return the images of Tiny-ImageNet.

    Args:
        path: The zip, or the folder that it holds.
        split: "train" or "validation".
        checked: Whether the zip needs to have the published MD5 sum.

    Raises:
        DataError: The archive is cut short, damaged or not as published, or a folder lacks files.
    """
    if path.is_dir():
        return _from_folder(path, split)
    try:
        about = os.stat(path)  # noqa: PTH116 (before it is read, so that a change is noticed)
        with open_regular(path) as file:
            if checked:
                _check_sum(path, hashlib.file_digest(file, "md5").hexdigest())
            with zipfile.ZipFile(file) as archive:
                infos = {info.filename: info for info in archive.infolist()}
                top = _top(path, infos)
                texts = {
                    name: _text(archive, infos.get(top + name), f"{path}: {top}{name}")
                    for name in _texts(split)
                }
    except FileNotFoundError:
        raise DataError(f"{path}: no such archive. Check the path.") from None
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, OSError) as error:
        raise DataError(f"{path} is cut short, damaged or no zip ({error}). {AGAIN}") from None
    found = _labelled(str(path), split, [n.removeprefix(top) for n in infos], texts)
    chosen = [infos[top + name] for name in found.names]
    for info in chosen:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or (
            info.flag_bits & 1 or info.file_size > LARGEST
        ):
            raise DataError(f"{path}: {info.filename} is encrypted, too large, or packed. {AGAIN}")
    refuse_empty([f"{path}: {info.filename}" for info in chosen if not info.file_size])
    return Zipped(
        **found.columns(),
        zip=path,
        zip_size=about.st_size,
        zip_time=about.st_mtime_ns,
        offset=np.array([info.header_offset for info in chosen], np.int64),
        packed=np.array([info.compress_size for info in chosen], np.int64),
        size=np.array([info.file_size for info in chosen], np.int64),
        crc=np.array([info.CRC for info in chosen], np.uint32),
        deflated=np.array([info.compress_type == zipfile.ZIP_DEFLATED for info in chosen]),
    )


def _from_folder(path: Path, split: str) -> Files:
    texts = {}
    for name in _texts(split):
        try:
            texts[name] = read_regular(path / name, LARGEST).decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise DataError(f"{path / name} cannot be read ({error}). Unpack it again.") from None
    below = path / ("train" if split == "train" else "val")
    names = [file.relative_to(path).as_posix() for file in sorted(below.rglob("*.JPEG"))]
    found = _labelled(str(path), split, names, texts)
    about = [os.stat(path / name) for name in found.names]  # noqa: PTH116 (as elsewhere)
    refuse_empty([f"{path}/{n}" for n, a in zip(found.names, about, strict=True) if not a.st_size])
    return Files(
        **found.columns(),
        root=path,
        size=np.array([one.st_size for one in about], np.int64),
        time=np.array([one.st_mtime_ns for one in about], np.int64),
    )


@dataclass(frozen=True)
class _Found:
    """The images of a split in their order."""

    where: str
    classes: list[str]
    names: list[str]
    labels: list[int]

    def columns(self) -> dict:
        """Return what every source has."""
        return {
            "kind": "Tiny-ImageNet",
            "prefix": "tiny_imagenet",
            "shards": None,
            "classes": tuple(self.classes),
            "label": np.array(self.labels, np.int32),
            "key": unique_keys(self.names, f"{self.where}: "),
            "name": np.array([os.fsencode(name) for name in self.names]),
        }


def _texts(split: str) -> tuple[str, ...]:
    return ("wnids.txt",) if split == "train" else ("wnids.txt", "val/val_annotations.txt")


def _text(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None, where: str) -> str:
    if info is None or info.file_size > LARGEST:
        raise DataError(f"{where} is missing or too large: the archive is not whole. {AGAIN}")
    return archive.read(info).decode("utf-8-sig", "replace")


def _top(path: Path, infos: dict[str, zipfile.ZipInfo]) -> str:
    """Return the folder of the list of classes in the archive, with a slash, or nothing."""
    for name in infos:
        if name == "wnids.txt" or name.endswith("/wnids.txt"):
            return name.removesuffix("wnids.txt")
    raise DataError(
        f"{path} holds no wnids.txt, so it is not Tiny-ImageNet ({ARCHIVE}). Unpack other archives "
        "into one folder per class and shard that."
    )


def _check_sum(path: Path, found: str) -> None:
    if found != MD5:
        raise DataError(
            f"{path} has the MD5 sum {found}, and Tiny-ImageNet was published with {MD5}: it was "
            f"damaged on the way, or is another file. {AGAIN} To read it as it is: --unchecked."
        )


def _labelled(where: str, split: str, names: list[str], texts: dict[str, str]) -> _Found:
    """Return the images of a split with their labels, after checks."""
    classes = sorted(set(texts["wnids.txt"].split()))
    number = {wnid: label for label, wnid in enumerate(classes)}
    # Macs leave a file ._NAME beside each file.
    images = [n for n in names if n.endswith(".JPEG") and not n.rpartition("/")[2].startswith(".")]
    if split == "train":
        chosen = {n: n.split("/")[1] for n in images if n.startswith("train/")}
    else:
        lines = texts["val/val_annotations.txt"].splitlines()
        fields = (line.split("\t") for line in lines if "\t" in line)
        pairs = sorted({(file, wnid) for file, wnid, *_ in fields})
        told = dict(pairs)
        if len(told) < len(pairs):
            twice = next(file for (file, _), (other, _) in pairwise(pairs) if file == other)
            raise DataError(
                f"{where}: val/val_annotations.txt has two classes for {twice}. {AGAIN}"
            )
        there = {n.rpartition("/")[2]: n for n in images if n.startswith("val/")}
        if odd := sorted({*told} ^ {*there}):
            raise DataError(
                f"{where}: {odd[0]} is in val/images or in val/val_annotations.txt, and not in "
                f"both ({len(odd)} such images). {AGAIN}"
            )
        chosen = {there[file]: wnid for file, wnid in told.items()}
    if unknown := sorted({*chosen.values()} - {*number}):
        raise DataError(f"{where}: the class {unknown[0]} is not in wnids.txt. {AGAIN}")
    if split == "train" and (empty := sorted({*number} - {*chosen.values()})):
        raise DataError(f"{where}: the class {empty[0]} of wnids.txt has no images. {AGAIN}")
    if not chosen:
        raise DataError(f"{where} holds no images of the {split} split. {AGAIN}")
    ordered = sorted(chosen, key=lambda name: (number[chosen[name]], _natural(name)))
    return _Found(where, classes, ordered, [number[chosen[name]] for name in ordered])


def _natural(name: str) -> tuple[int, str]:
    """Return what sorts val_10.JPEG behind val_9.JPEG."""
    digits = name.rpartition("_")[2].removesuffix(".JPEG")
    return (int(digits) if digits.isdecimal() else 0, name)
