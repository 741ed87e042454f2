"""The kinds of data sets, and how a kind is recognised.

The kind says how folders and labels become classes of the network:

    imagenet                1,000 folders named by WordNet id; shards with labels 0..999
    imagenet_v2             folders 0, 1, ..., 999, which are numbers of classes (as texts they
                            would be sorted differently: modestyachts/ImageNetV2, issue 10)
    imagenet_subset         some of the folders of `imagenet` or `imagenet_v2`; all classes of the
                            network compete. It is never recognised, because a tree may lack folders
                            by mistake
    imagenet_a, imagenet_r  200 of the WordNet ids; the network chooses among these 200 classes
                            (Hendrycks et al., CVPR 2021 and ICCV 2021)
    imagenet_sketch         1,000 WordNet ids, and files named sketch_0 and so on
    imagenet_c              CORRUPTION/SEVERITY/WNID/FILE as published, also below blur/, noise/ ...
    cifar_c                 CORRUPTION.npy and labels.npy, as CIFAR-10-C and -100-C are published
    imagenet_c_generated    corruptions that this program applies to clean images, cut as ImageNet-C
    cifar_c_generated       the same at the size that the images have. Both are never recognised
    plain                   anything else: a folder for each class in the order of names, where
                            plain numbers are the labels; shards with labels of the network

A network with another number of classes than ImageNet has only the kinds plain, imagenet_c, cifar_c
and the generated ones.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.images import corruptions
from flatcal_dist.data.making.image_folder import class_folders
from flatcal_dist.data.sets import imagenet
from flatcal_dist.data.sets.arrays import has_arrays
from flatcal_dist.data.sets.class_labels import (
    are_numbers,
    check_count,
    check_recorded,
    have_wnids,
    numbers_of_folders,
)
from flatcal_dist.data.shards.index import Index
from flatcal_dist.data.shards.samples import is_system_file

SUBSET = "imagenet_subset"
CLEAN = ("plain", "imagenet", SUBSET)
SAME_FORM = ("imagenet", "imagenet_v2", "imagenet_sketch")  # the data may not tell them apart
KINDS = (
    "imagenet", "imagenet_v2", *imagenet.MASKED, "imagenet_sketch", SUBSET, "imagenet_c",
    "imagenet_c_generated", "cifar_c", "cifar_c_generated", "plain",
)  # fmt: skip
GENERATED = ("imagenet_c_generated", "cifar_c_generated")
OpenShards = Callable[[str, int], Index]  # (path, classes) -> the index of shards


def is_tree(path: str) -> bool:
    """Tell whether a path is a directory without shards."""
    root = Path(path).expanduser()
    return root.is_dir() and not (root / "_info.json").exists() and not any(root.glob("*.tar"))


def recognise(path: str, classes: int, named: str | None, open_shards: OpenShards) -> str:
    """Return the kind of the data at a path.

    Args:
        path: A tree, or shards by directory or pattern.
        classes: The number of classes of the network.
        named: The kind that the user has named. It decides where the data do not.
        open_shards: It opens shards.

    Raises:
        DataError: The data are not there, or are of no kind that fits the network.
    """
    if not is_tree(path):
        index = open_shards(path, classes)
        if named != SUBSET:
            check_recorded(index, classes)
        labels = np.unique(index.label)
        return _kind_of_labels(path, labels, classes, named)
    root = Path(path).expanduser()
    if has_arrays(root):
        return "cifar_c"
    if named == "cifar_c":
        raise DataError(
            f"{root} is not CIFAR-10-C or CIFAR-100-C as they are unpacked: expected labels.npy "
            "and an array for each corruption, such as gaussian_noise.npy"
        )
    folders = class_folders(root)
    if named == SUBSET and folders:
        numbers_of_folders(folders, root)
        return SUBSET
    if corruption_folders(root):
        return "imagenet_c"
    if not folders:
        raise DataError(
            f"{root} holds neither shards (*.tar) nor a folder of images per class. ImageNet's "
            "validation images in one heap become shards from the official archive: flatcal shard."
        )
    return _kind_of_folders(root, folders, classes, named)


def _kind_of_folders(root: Path, folders: list[str], classes: int, named: str | None) -> str:
    numbers = are_numbers(folders)
    if numbers or classes != imagenet.CLASSES or not have_wnids(folders):
        check_count(root, folders, classes)
        return "imagenet_v2" if numbers and classes == imagenet.CLASSES else "plain"
    present = set(imagenet.numbers_of(folders, root).tolist())
    for kind in imagenet.MASKED:
        if present == set(imagenet.subset(kind)):
            return kind
    if len(present) != imagenet.CLASSES:
        raise DataError(
            f"{root} holds {len(present)} of ImageNet's 1,000 classes, and they are neither those "
            "of ImageNet-A nor of ImageNet-R (200 each): unpack it again if it should be whole, or "
            f"write {SUBSET}={root} to evaluate on the classes that are there"
        )
    if named in SAME_FORM:
        return named
    names = [path.name for path in (root / folders[0]).iterdir()]
    files = [name for name in names if not name.startswith(".") and not is_system_file(name)]
    return "imagenet_sketch" if files and files[0].startswith("sketch_") else "imagenet"


def _kind_of_labels(path: str, labels: np.ndarray, classes: int, named: str | None) -> str:
    """Return the kind of shards with these labels, which lie in 0..classes-1."""
    if classes != imagenet.CLASSES:
        return "plain"
    if named == SUBSET:
        return SUBSET
    present = set(labels.tolist())
    for kind in imagenet.MASKED:
        if present == set(imagenet.subset(kind)):
            return kind
    if present == set(range(200)) and named in imagenet.MASKED:
        return named
    if max(present) < 200 and named is None:
        raise DataError(
            f"{path}: its labels end at {max(present)}, as in a set of 200 classes that were "
            f"numbered by themselves. Say what it is: imagenet_a={path} or imagenet_r={path} for "
            f"those, imagenet={path} if the labels are ImageNet's own numbers"
        )
    return named if named in (*SAME_FORM, SUBSET) else "imagenet"


def corruption_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each corruption of ImageNet-C, at the top of a tree or in a group."""
    known = corruptions.COMMON + corruptions.EXTRA
    places = [root, *(root / name for name in class_folders(root)[:16])]
    found: dict[str, Path] = {}
    for place in places:
        for name in known:
            if any((place / name / str(level)).is_dir() for level in corruptions.SEVERITIES):
                found.setdefault(name, place / name)
    return {name: found[name] for name in known if name in found}
