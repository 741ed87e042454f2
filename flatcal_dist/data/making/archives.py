"""The official ILSVRC2012 archives as a source of shards. They are read without unpacking.

ILSVRC2012_img_train.tar holds one tar for each class, nXXXXXXXX.tar. ILSVRC2012_img_val.tar holds
ILSVRC2012_val_00000001.JPEG to _00050000.JPEG without labels. In the development kit, line k of
ILSVRC2012_validation_ground_truth.txt is the ILSVRC2012_ID of validation image k, and meta.mat says
which WordNet id (wnid) that is. These IDs are NOT the labels: as in timm and torchvision, labels
count the wnids in their sorted order.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.image_folder import IMAGENET_SHARDS, refuse_empty
from flatcal_dist.data.making.parallel import in_parallel
from flatcal_dist.data.making.sources import Members, unique_keys
from flatcal_dist.data.shards.members import DIRECTORY, FILE, Seekable, TarDamage, members
from flatcal_dist.data.shards.regular import open_regular
from flatcal_dist.data.shards.samples import is_system_file

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
Member = tuple[str, int, int]  # name, first byte in the file, bytes


def ilsvrc_archive(tar: Path, split: str, devkit: Path | None = None, workers: int = 1) -> Members:
    """Return the images of ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar.

    Args:
        tar: The archive.
        split: "train" or "validation", which has to fit the archive.
        devkit: The development kit, which the validation images need: its .tar.gz, or a directory
            with meta.mat and the ground truth (also in data/). By default it lies beside the tar.
        workers: The number of processes that read the archive.

    Raises:
        DataError: The tar is neither of the two, is not the one of the split or is cut short, the
            development kit is missing or does not fit, or an image has 0 bytes.
    """
    tar = Path(tar)
    members = list(_members(tar, 0, None))
    if members and all(re.fullmatch(r"(.*/)?n\d{8}\.tar", name) for name, _, _ in members):
        found, read = "train", _train
    elif members and all(re.fullmatch(r"(.*/)?ILSVRC2012_val_\d{8}\.JPEG", m[0]) for m in members):
        found, read = "validation", _validation
    else:
        holds = f"its first member is {members[0][0]!r}" if members else "it holds nothing"
        raise DataError(
            f"{tar} is neither ILSVRC2012_img_train.tar (one nXXXXXXXX.tar per class) nor "
            f"ILSVRC2012_img_val.tar (ILSVRC2012_val_XXXXXXXX.JPEG): {holds}. Unpack other "
            "archives into one folder per class and shard that."
        )
    if found != split:
        raise DataError(f"{tar} holds the {found} images, not those of --split {split}.")
    return read(tar, members, devkit, workers)


def _train(tar: Path, members: list[Member], devkit: Path | None, workers: int) -> Members:
    members.sort(key=lambda member: _stem(member[0]))
    wnids = [_stem(name) for name, _, _ in members]
    if len(set(wnids)) < len(wnids):
        raise DataError(f"{tar} holds a class twice. Download it again.")
    tasks = [(tar, start, start + size) for _, start, size in members]
    parts = dict(in_parallel(_class_members, tasks, workers))
    images, labels = [], []
    for label, wnid in enumerate(wnids):
        if not parts[label]:
            raise DataError(f"{tar}: the class {wnid}.tar is empty. Download it again.")
        for name, start, size in parts[label]:
            images.append((f"{wnid}/{name.rpartition('/')[2]}", start, size))
        labels += [label] * len(parts[label])
    return _source(tar, "ILSVRC2012 train archive", wnids, images, labels)


def _class_members(tar: Path, start: int, stop: int) -> list[Member]:
    return sorted(_members(tar, start, stop))


def _validation(tar: Path, members: list[Member], devkit: Path | None, workers: int) -> Members:
    members = sorted((name.rpartition("/")[2], start, size) for name, start, size in members)
    truth, wnid_of = _read_devkit(devkit, tar.parent)
    numbers = [int(name.removesuffix(".JPEG")[-8:]) for name, _, _ in members]
    if numbers != list(range(1, len(truth) + 1)):
        raise DataError(
            f"{tar} holds {len(numbers)} images, numbers {numbers[0]} to {numbers[-1]}, but the "
            f"ground truth has {len(truth)} lines, one for each of 1 to {len(truth)}. One of the "
            "two is not whole, or belongs to another year."
        )
    wnids = sorted(wnid_of.values())
    label_of = {number: wnids.index(wnid) for number, wnid in wnid_of.items()}
    if unknown := sorted(set(truth) - set(label_of)):
        raise DataError(f"{GROUND_TRUTH} names class {unknown[0]}, which meta.mat does not know.")
    labels = [label_of[number] for number in truth]
    return _source(tar, "ILSVRC2012 validation archive", wnids, members, labels)


def _source(
    tar: Path, kind: str, wnids: list[str], images: list[Member], labels: list[int]
) -> Members:
    names, offsets, sizes = zip(*images, strict=True)
    refuse_empty([f"{tar}: {name}" for name, size in zip(names, sizes, strict=True) if not size])
    about = tar.stat()
    return Members(
        kind=kind,
        prefix="imagenet1k",
        shards=IMAGENET_SHARDS,
        classes=tuple(wnids),
        label=np.array(labels, np.int32),
        key=unique_keys(names),
        name=np.array([os.fsencode(name) for name in names]),
        tar=tar,
        tar_size=about.st_size,
        tar_time=about.st_mtime_ns,
        offset=np.array(offsets, np.int64),
        size=np.array(sizes, np.int64),
    )


def _members(path: Path, start: int, stop: int | None) -> Iterator[Member]:
    """Yield the files in the tar that lies between two bytes of `path` (None for its end)."""
    where = f"{path}" if stop is None else f"{path}, class archive at byte {start},"
    try:
        with open_regular(path) as file:
            for member in members(Seekable(file, start, stop)):
                if is_system_file(member.name) or member.kind == DIRECTORY:
                    continue  # the official archives hold neither
                if member.kind != FILE:
                    raise DataError(
                        f"{where} holds {member.name!r}, a {member.kind}; the official archive "
                        "holds files only. Download it again."
                    )
                yield member.name.removeprefix("./"), member.start, member.size
    except FileNotFoundError:
        raise DataError(f"{path}: no such archive. Check the path.") from None
    except TarDamage as damage:
        if "unexpected end" in str(damage) or damage.kind != "unreadable":
            raise DataError(
                f"{where} is cut short or damaged: {damage}. Download it again."
            ) from None
        raise DataError(
            f"{where} cannot be read as an uncompressed tar ({damage}). Download it again, or "
            "decompress it."
        ) from None
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror or error}).") from error


def _read_devkit(devkit: Path | None, beside: Path) -> tuple[list[int], dict[int, str]]:
    """Return the ILSVRC2012_ID of every validation image, and the wnid of every such ID."""
    found = devkit or next(
        (p for p in (beside / f"{DEVKIT}.tar.gz", beside / DEVKIT) if p.exists()), beside
    )
    truth, meta = _read_from(Path(found), GROUND_TRUTH), _read_from(Path(found), "meta.mat")
    try:
        numbers = [int(line) for line in truth.decode("ascii").split()]
    except ValueError as error:
        raise DataError(f"{GROUND_TRUTH} in {found} must hold a number a line: {error}.") from error
    return numbers, _wnids(meta, found)


def _wnids(meta: bytes, found: Path) -> dict[int, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if row["num_children"] == 0]  # others are groups
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except Exception as error:  # loadmat raises nearly anything on a damaged file
        raise DataError(
            f"meta.mat in {found} is not that of {DEVKIT}: {type(error).__name__}: {error}."
        ) from error
    if not leaves or len({*wnids.values()}) != len(leaves):
        raise DataError(f"meta.mat in {found} has no classes, or the same class twice.")
    return wnids


def _read_from(devkit: Path, name: str) -> bytes:
    """Read a file of the development kit, which may be a tar or a directory."""
    if devkit.is_dir():
        for folder in (devkit, devkit / "data", devkit / DEVKIT / "data"):
            if (folder / name).is_file():
                return (folder / name).read_bytes()
    elif devkit.is_file():
        try:
            with tarfile.open(devkit) as tar:
                for member in tar:
                    if member.name.rpartition("/")[2] != name or not member.isreg():
                        continue
                    if (file := tar.extractfile(member)) is not None:
                        return file.read()
        except (OSError, EOFError, tarfile.TarError) as error:
            raise DataError(f"{devkit} cannot be read as a tar ({error}).") from error
    raise DataError(
        f"{devkit} holds no {name}, without which the validation images have no labels. Put "
        f"{DEVKIT}.tar.gz beside the archive, or name it with --devkit."
    )


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".tar")
