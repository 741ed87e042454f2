"""ImageFolder trees (one folder for each class) as sources of shards."""

import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.sources import Files, unique_keys
from flatcal_dist.data.shards.regular import KINDS
from flatcal_dist.data.shards.samples import IMAGES, is_system_file, is_text

IMAGENET_SHARDS = {"train": 1024, "validation": 64}  # about 140 and 100 MB each
IMAGENET_IMAGES = 1_281_167, 50_000  # train, validation (Russakovsky et al. 2015, table 2)
WORDNET_ID = re.compile(r"n\d{8}")


def image_folder(root: Path) -> Files:
    """Return the images ROOT/CLASS/*.

    Labels count the folders in the order of their names, as in timm and torchvision. If the names
    of all folders are plain numbers, labels count them as numbers: the folders of ImageNet-V2, 0 to
    999, are numbers of classes, and the order of texts (0, 1, 10, 100, ...) would change them.

    Hidden files, files that operating systems add (Thumbs.db), and files beside the class folders
    are left out. `left_out` of the result names them.

    Raises DataError for:

    - a tree without class folders, a folder without images, and folders inside class folders;
    - a file that is empty, is neither JPEG, PNG nor WebP, or is not regular (FIFOs, links that lead
      nowhere);
    - names that are not UTF-8, and two images that differ only in their extensions.
    """
    root = Path(root)
    left_out: list[str] = []
    classes = class_folders(root, left_out)
    if all(name.isascii() and name.isdigit() for name in classes):
        classes.sort(key=int)
    if not classes:
        raise DataError(f"{root} holds no folders; expected one folder of images per class.")
    _refuse_other_levels(root, classes)
    names, sizes, times, labels = [], [], [], []
    for label, folder in enumerate(classes):
        for entry, about in _images(root / folder, left_out):
            names.append(f"{folder}/{entry.name}")
            sizes.append(about.st_size)
            times.append(about.st_mtime_ns)
            labels.append(label)
    refuse_empty([f"{root}/{name}" for name, size in zip(names, sizes, strict=True) if size == 0])
    return Files(
        kind="image folder",
        prefix="imagenet1k" if all(WORDNET_ID.fullmatch(name) for name in classes) else "images",
        shards=IMAGENET_SHARDS if _is_imagenet(classes, len(names)) else None,
        classes=tuple(classes),
        label=np.array(labels, np.int32),
        key=unique_keys(names, f"{root}: "),
        name=np.array([os.fsencode(name) for name in names]),
        left_out=tuple(left_out),
        root=root,
        size=np.array(sizes, np.int64),
        time=np.array(times, np.int64),
    )


def class_folders(root: Path, left_out: list[str] | None = None) -> list[str]:
    """Return the names of the folders in `root`, sorted.

    Hidden folders and folders of operating systems are left out. `left_out` gets the paths of
    everything that is left out. Raises DataError if `root` cannot be read, or if the name of a
    folder is not UTF-8 or holds control characters.
    """
    names = []
    for entry in _entries(root):
        if entry.name.startswith(".") or is_system_file(entry.name) or not _is_folder(entry):
            (left_out if left_out is not None else []).append(os.fspath(entry.path))
        elif not is_text(entry.name) or not entry.name.isprintable():
            raise DataError(
                f"{root}: the name of the class folder {entry.name!a} is not UTF-8, or has control "
                "characters, which reports and shards cannot hold. Rename it."
            )
        else:
            names.append(entry.name)
    return names


def warn_of_left_out(left_out: tuple[str, ...]) -> None:
    """Print on standard error which files of a tree are not used, on one rank of a job."""
    if not left_out or os.environ.get("RANK", "0") != "0":
        return
    system = sum(is_system_file(os.path.basename(path)) for path in left_out)  # noqa: PTH119
    shown = ", ".join(ascii(path)[1:-1] for path in left_out[:5]) + ", ..." * (len(left_out) > 5)
    print(
        f"warning: {len(left_out)} files or folders are no images of a class and were left out: "
        f"{shown} ({system} of them were added by macOS or Windows)",
        file=sys.stderr,
    )


def refuse_empty(names: list[str]) -> None:
    """Raise DataError if there are any names; they are the names of images of 0 bytes."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise DataError(
            f"{len(names)} images have 0 bytes: {', '.join(names[:5])}{more}. They are no images: "
            "fetch them again or remove them."
        )


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{folder} is not a directory; expected one folder of images per class."
        ) from None
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}).") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        raise DataError(
            f"{entry.path} cannot be read ({error.strerror}). Mend the link, or take it away."
        ) from error


def _images(folder: Path, left_out: list[str]) -> Iterator[tuple[os.DirEntry, os.stat_result]]:
    found = 0
    for entry in _entries(folder):
        if entry.name.startswith(".") or is_system_file(entry.name):
            left_out.append(entry.path)
            continue
        found += 1
        if _is_folder(entry):
            raise DataError(
                f"{entry.path} is a folder inside a class folder, so its images would be lost: "
                "images have to lie in the folder of their class itself. Move them there, or name "
                "the directory whose folders are the classes."
            )
        if entry.name.rpartition(".")[2].lower() not in IMAGES:
            raise DataError(
                f"{entry.path} is not an image that can be sharded ({', '.join(IMAGES)}). Convert "
                "it or move it out of the class folder."
            )
        yield entry, _regular(entry)
    if not found:
        raise DataError(f"{folder} holds no images. Fill it, or remove it: it counts as a class.")


def _regular(entry: os.DirEntry) -> os.stat_result:
    try:
        about = entry.stat()
    except OSError as error:
        raise DataError(f"{entry.path} cannot be read ({error.strerror}).") from error
    if not stat.S_ISREG(about.st_mode):
        what = KINDS.get(stat.S_IFMT(about.st_mode), "something else")
        raise DataError(f"{entry.path} is {what}, expected an image. Take it away.")
    return about


def _refuse_other_levels(root: Path, classes: list[str]) -> None:
    """Raise DataError for a directory above the class folders, which looks like a few classes."""
    for name in classes:
        inside = [entry for entry in _entries(root / name) if not is_system_file(entry.name)]
        if not inside or not all(map(_is_folder, inside)):
            return
    raise DataError(
        f"{root} holds folders ({', '.join(classes[:3])}{', ...' * (len(classes) > 3)}) that hold "
        f"folders themselves, and no images: it lies above the classes. Name one of them, such as "
        f"{root / classes[0]}."
    )


def _is_imagenet(classes: list[str], images: int) -> bool:
    """Tell whether this is a split of ImageNet-1K, of which a few images may be missing."""
    if len(classes) != 1000 or not any(0.99 * n <= images <= n for n in IMAGENET_IMAGES):
        return False
    from flatcal_dist.data.sets.imagenet import wnids  # loads timm

    return tuple(classes) == wnids()
