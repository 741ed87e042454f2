"""CIFAR-10 and CIFAR-100 as they are published: cifar-10-python.tar.gz and cifar-100-python.tar.gz.

Each archive holds a folder of pickles. A batch is a dictionary: `data` is [n, 3072] uint8 (32 x 32
pixels, first all red, then green, then blue values, row by row), `labels` or `fine_labels` a list
of n numbers. torchvision keeps the same folder. Source: Krizhevsky, Learning Multiple Layers of
Features from Tiny Images (2009), https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.pickles import read_pickle
from flatcal_dist.data.making.sources import Pixels
from flatcal_dist.data.shards.regular import check_regular, read_regular

LARGEST = 1 << 28  # bytes; the largest file of the two sets has 155 MB
SIDE = 32
SHARDS = {"train": 20, "validation": 4}  # 2,500 images in each


@dataclass(frozen=True)
class Published:
    """The files of one of the two sets, with their published MD5 sums."""

    name: str
    title: str
    archive: str
    folder: str
    train: dict[str, str]
    validation: dict[str, str]
    meta: tuple[str, str]
    label: str  # the key of the labels in a batch
    names: str  # the key of the names of classes in the meta file
    classes: int

    def files(self, split: str) -> dict[str, str]:
        """Return the MD5 sum of each file that a split needs."""
        batches = self.train if split == "train" else self.validation
        return {self.meta[0]: self.meta[1], **batches}


CIFAR10 = Published(
    name="cifar10",
    title="CIFAR-10",
    archive="cifar-10-python.tar.gz",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    validation={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
    label="labels",
    names="label_names",
    classes=10,
)
CIFAR100 = Published(
    name="cifar100",
    title="CIFAR-100",
    archive="cifar-100-python.tar.gz",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    validation={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta=("meta", "7973b15100ade9c7d40fb424638fde48"),
    label="fine_labels",
    names="fine_label_names",
    classes=100,
)
SETS = {published.name: published for published in (CIFAR10, CIFAR100)}


def cifar(path: Path, split: str, name: str | None = None, *, checked: bool = True) -> Pixels:
    """Return the images of CIFAR-10 or CIFAR-100.

    Args:
        path: The archive, its unpacked folder, or a directory that holds one of them, such as that
            in which torchvision keeps data sets.
        split: "train", or "validation" for the test images.
        name: "cifar10" or "cifar100". By default the files tell.
        checked: Whether the files need to have the published MD5 sums.

    Raises:
        DataError: The files are not there, are cut short, damaged or not as published.
    """
    path, published = _found(path, name)
    read = _from_folder if path.is_dir() else _from_archive
    files = read(path, published, list(published.files(split)))
    if checked:
        for file, md5 in published.files(split).items():
            _check_sum(path, published, file, files[file], md5)
    places = {file: f"{path}: {file}" for file in files}
    meta = read_pickle(files[published.meta[0]], places[published.meta[0]])
    classes = _class_names(meta, published, places[published.meta[0]])
    batches = list(published.files(split))[1:]
    parts = [_batch(files[batch], published, places[batch]) for batch in batches]
    label = np.concatenate([labels for _, labels in parts])
    numbers = range(len(label))
    return Pixels(
        kind=published.title,
        prefix=published.name,
        shards=SHARDS,
        classes=classes,
        label=label,
        key=np.array([f"{published.name}_{split}_{i:05d}".encode() for i in numbers]),
        name=np.array([f"{published.name}/{split}/{i:05d}.png".encode() for i in numbers]),
        pixels=np.concatenate([pixels for pixels, _ in parts]),
    )


def is_cifar(path: Path) -> bool:
    """Tell whether a path is an archive or an unpacked folder of CIFAR, by its name and files."""
    if path.is_dir():
        return any(path.name == one.folder or _is_folder(path, one) for one in SETS.values())
    return path.name.endswith((".tar.gz", ".tgz")) or path.name in [
        one.archive for one in SETS.values()
    ]


def _is_folder(path: Path, published: Published) -> bool:
    return (path / published.meta[0]).is_file() and any(
        (path / file).exists() for file in (*published.train, *published.validation)
    )


def _found(path: Path, name: str | None) -> tuple[Path, Published]:
    """Return the folder or archive that a path means, and which set it is."""
    wanted = [SETS[name]] if name else list(SETS.values())
    if path.is_dir():
        for published in wanted:
            if path.name == published.folder or _is_folder(path, published):
                return path, published
            for place in (path / published.folder, path / published.archive):
                if place.exists():
                    return place, published
    elif path.exists():
        return path, wanted[0] if name else _set_of_archive(path)
    one = wanted[0]
    raise DataError(
        f"{path} holds neither {one.archive} nor its folder {one.folder}. Download "
        f"https://www.cs.toronto.edu/~kriz/{one.archive}, or name the directory that holds it."
    )


def _set_of_archive(path: Path) -> Published:
    with _opened(path) as tar:
        names = [member.name for member, _ in zip(tar, range(3), strict=False)]
    for published in SETS.values():
        if any(published.folder in name.split("/") for name in names):
            return published
    raise DataError(
        f"{path} holds neither {CIFAR10.folder} nor {CIFAR100.folder}, but "
        f"{', '.join(names) or 'nothing'}: it is no archive of CIFAR. Unpack other archives into "
        "one folder per class and shard that."
    )


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive. Damage that is found inside is told with its remedy."""
    try:
        check_regular(path)
        with tarfile.open(path, mode="r:gz") as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(
            f"{path} is cut short or damaged ({error}). Delete it and download it again."
        ) from None


def _from_archive(path: Path, published: Published, names: Sequence[str]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with _opened(path) as tar:
        for member in tar:
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder != published.folder or name not in names:
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if content is None or member.size > LARGEST:
                raise DataError(f"{path}: {member.name} is no file of {published.title}.")
            files[name] = content.read()
    if missing := [name for name in names if name not in files]:
        raise DataError(
            f"{path} holds no {published.folder}/{missing[0]}: it is not the archive of "
            f"{published.title}, or not whole. Download {published.archive} again."
        )
    return files


def _from_folder(path: Path, published: Published, names: Sequence[str]) -> dict[str, bytes]:
    files = {}
    for name in names:
        try:
            files[name] = read_regular(path / name, LARGEST)
        except OSError as error:
            raise DataError(
                f"{path / name} cannot be read ({error.strerror or error}). Unpack "
                f"{published.archive} again."
            ) from None
    return files


def _check_sum(path: Path, published: Published, file: str, data: bytes, md5: str) -> None:
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(
            f"{path}: {file} has the MD5 sum {found}, and {published.title} was published with "
            f"{md5}: it was damaged on the way, or is another file. Download {published.archive} "
            "again, or read it as it is with --unchecked."
        )


def _class_names(meta: dict[str, Any], published: Published, where: str) -> tuple[str, ...]:
    names = meta.get(published.names)
    if not isinstance(names, list) or len(names) != published.classes:
        raise DataError(
            f"{where}: expected {published.names} with {published.classes} names of classes, found "
            f"{len(names) if isinstance(names, list) else 'none'}. Download "
            f"{published.archive} again."
        )
    return tuple(n.decode("latin1") if isinstance(n, bytes) else str(n) for n in names)


def _batch(data: bytes, published: Published, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels [n, 32, 32, 3] and the labels [n] of one file."""
    batch = read_pickle(data, where)
    pixels, labels = batch.get("data"), batch.get(published.label)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (3 * SIDE * SIDE,)
        or not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(type(one) is int and 0 <= one < published.classes for one in labels)
    ):
        raise DataError(
            f"{where}: expected data of n x {3 * SIDE * SIDE} bytes, and {published.label} with n "
            f"numbers of 0 to {published.classes - 1}. Download {published.archive} again."
        )
    planes = pixels.reshape(-1, 3, SIDE, SIDE)
    return planes.transpose(0, 2, 3, 1), np.array(labels, np.int32)
