"""The class of a network that each folder or label of a data set stands for."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.sets import imagenet
from flatcal_dist.data.sets.tree import TreeIndex
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.index import Index
from flatcal_dist.data.shards.listing import class_names


def are_numbers(folders: Sequence[str]) -> bool:
    """Tell whether all folders are named by plain numbers, which are numbers of classes."""
    return all(name.isascii() and name.isdigit() for name in folders)


def have_wnids(folders: Sequence[str]) -> bool:
    """Tell whether a folder is named by a WordNet id."""
    return any(re.fullmatch(r"n\d{8}", name) for name in folders)


def numbers_of_folders(folders: Sequence[str], root: Path) -> np.ndarray:
    """Return the numbers [folders] of ImageNet's classes that folders in `root` are named by.

    The names are WordNet ids or numbers. Raises DataError for any other name.
    """
    if not are_numbers(folders):
        return imagenet.numbers_of(folders, root)
    numbers = np.array([min(int(name), imagenet.CLASSES) for name in folders], np.int64)
    if numbers.max() >= imagenet.CLASSES or len(set(numbers.tolist())) < len(folders):
        raise DataError(
            f"{root}: folders that are plain numbers are class numbers, expected different ones of "
            f"0 to {imagenet.CLASSES - 1}"
        )
    return numbers


def check_count(root: Path, folders: Sequence[str], classes: int) -> None:
    """Check that there is one folder for each class.

    Args:
        root: The directory of the folders.
        folders: Their names.
        classes: The number of classes.

    Raises:
        DataError: There are more or fewer folders.
    """
    if len(folders) != classes:
        raise DataError(
            f"{root} holds {len(folders)} class folders ({folders[0]}, ...), and the network has "
            f"{classes} classes: expected one folder for each"
        )


def labels_of_folders(index: TreeIndex, classes: int, masked: bool) -> np.ndarray:
    """Return the class of the network that each folder holds, int64 [folders].

    Args:
        index: The images of the folders.
        classes: The number of classes of the network.
        masked: Whether the folders are only a part of ImageNet's classes.

    Raises:
        DataError: The folders are not the classes of the network.
    """
    folders = index.folders
    if are_numbers(folders):
        labels = np.array([int(name) for name in folders], np.int64)
        if sorted(labels.tolist()) != list(range(classes)):
            raise DataError(
                f"{index.root}: folders that are plain numbers are class numbers, expected 0 to "
                f"{classes - 1}, found {labels.min()} to {labels.max()} in {len(folders)} folders"
            )
        return labels
    if classes == imagenet.CLASSES and have_wnids(folders):
        labels = imagenet.numbers_of(folders, index.root)
        if not masked:
            check_count(index.root, folders, classes)
        return labels
    check_count(index.root, folders, classes)
    return np.arange(classes)


def recorded_numbers(index: Index) -> np.ndarray:
    """Return the labels of shards as numbers of ImageNet's classes, int64 [n].

    The list that `flatcal shard` left beside the shards tells which classes the labels count.
    Without a list, the labels are returned as they are. Raises DataError if the list does not fit
    the labels.
    """
    label = index.label.astype(np.int64)
    recorded = list(class_names([str(shard) for shard in index.shards], Access()).items())
    if not recorded or not have_wnids(recorded[0][1]):
        return label
    (plan, names), *others = recorded
    if any(other != names for _, other in others) or label.max(initial=0) >= len(names):
        raise DataError(f"{plan}: the lists of classes beside these shards do not fit their labels")
    return imagenet.numbers_of(names, Path(plan))[label]


def names_of_labels(index: ImageIndex) -> list[str] | None:
    """Return the names of the classes in the order of their labels, if the data tell them.

    Names that are plain numbers say no more than the labels. Names of shards stand in the list that
    `flatcal shard` left beside them.
    """
    if isinstance(index, TreeIndex):
        found = [list(index.folders)]
    elif isinstance(index, Index):
        found = list(class_names([str(shard) for shard in index.shards], Access()).values())
    else:
        return None
    if not found or any(names != found[0] for names in found) or are_numbers(found[0]):
        return None
    return found[0] if index.label.max(initial=0) < len(found[0]) else None


def check_recorded(index: Index, classes: int) -> None:
    """Raise DataError if labels of shards count other classes than those of the network.

    `flatcal shard` leaves a list of the classes beside the shards. Without it nothing is checked.
    """
    for plan, names in class_names([str(shard) for shard in index.shards], Access()).items():
        if are_numbers(names):
            continue  # numbers of classes
        if classes == imagenet.CLASSES and have_wnids(names):
            present = tuple(imagenet.numbers_of(names, Path(plan)).tolist())
            if present in (tuple(range(classes)), *map(imagenet.subset, imagenet.MASKED)):
                continue
        elif len(names) == classes:
            continue
        raise DataError(
            f"{plan} lists {len(names)} classes ({names[0]}, ...), which the labels of these "
            f"shards count, and the network has {classes} classes: expected the same ones. Shard "
            "the complete data again."
        )
