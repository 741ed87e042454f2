"""An ImageFolder tree (one folder a class) as a source of shards."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.samples import IMAGES
from flatcal_dist.data.sources import Files, unique_keys

IMAGENET_SHARDS = {"train": 1024, "validation": 64}  # about 140 and 100 MB each


def image_folder(root: Path) -> Files:
    """The images ROOT/CLASS/*; labels count the folders by name, as timm and torchvision do.

    Folders that are all plain numbers count in their own order: those of ImageNet-V2, 0 to 999, are
    class numbers, of which torchvision's order of texts (0, 1, 10, 100, ...) makes others.

    Raises DataError for a tree without class folders, a folder without images, empty files, a
    file that is neither JPEG, PNG nor WebP, and two images that differ only in their extension.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; expected one folder of images per class.")
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    classes = [name for name in classes if not name.startswith(".")]
    if all(name.isascii() and name.isdigit() for name in classes):
        classes.sort(key=int)
    if not classes:
        raise DataError(f"{root} holds no folders; expected one folder of images per class.")
    names, sizes, times, labels = [], [], [], []
    for label, folder in enumerate(classes):
        for entry in _images(root / folder):
            try:
                about = entry.stat()
            except OSError as error:
                raise DataError(f"{entry.path} cannot be read ({error.strerror}).") from error
            names.append(f"{folder}/{entry.name}")
            sizes.append(about.st_size)
            times.append(about.st_mtime_ns)
            labels.append(label)
    refuse_empty([f"{root}/{name}" for name, size in zip(names, sizes, strict=True) if size == 0])
    return Files(
        kind="image folder",
        prefix="imagenet1k",
        shards=IMAGENET_SHARDS,
        classes=tuple(classes),
        label=np.array(labels, np.int32),
        key=unique_keys(names),
        name=np.array([os.fsencode(name) for name in names]),
        root=root,
        size=np.array(sizes, np.int64),
        time=np.array(times, np.int64),
    )


def refuse_empty(names: list[str]) -> None:
    """Raise DataError if there are names of images of 0 bytes."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise DataError(
            f"{len(names)} images have 0 bytes: {', '.join(names[:5])}{more}. They are no images: "
            "fetch them again or remove them."
        )


def _images(folder: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}).") from error
    images = [entry for entry in found if not entry.name.startswith(".")]
    if not images:
        raise DataError(f"{folder} holds no images. Fill it, or remove it: it counts as a class.")
    for entry in images:
        if entry.name.rpartition(".")[2].lower() not in IMAGES or entry.is_dir():
            raise DataError(
                f"{entry.path} is not an image that can be sharded ({', '.join(IMAGES)}). Convert "
                "it or move it out of the class folder."
            )
        yield entry
