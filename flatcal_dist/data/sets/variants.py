"""Data sets to evaluate on: ImageNet's validation images, its variants, or any others.

    find("data/val", classes=1000)                    [Variant(name="val", kind="imagenet", ...)]
    find("imagenet_r=data/imagenet-r", classes=1000)  [Variant(name="imagenet_r", ...)]
    find("imagenet_c=data/imagenet-c", classes=1000)  75 variants, one for each subset
    open_variant(variant, classes=1000)               DataSet: index, labels, ReaL labels

A data set is an ImageFolder tree or indexed shards, written PATH or NAME=PATH. Its kind (kinds.py)
is recognised where the data tell it. A NAME that is a kind demands this kind.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.images import corruptions
from flatcal_dist.data.images.corruptions import Corrupted, corrupted_jpeg
from flatcal_dist.data.images.small_corruptions import SMALL, corrupted_png
from flatcal_dist.data.sets import imagenet
from flatcal_dist.data.sets.arrays import ArrayIndex, corruption_arrays, open_arrays
from flatcal_dist.data.sets.class_labels import (
    labels_of_folders,
    names_of_labels,
    numbers_of_folders,
    recorded_numbers,
)
from flatcal_dist.data.sets.kinds import (
    CLEAN,
    GENERATED,
    KINDS,
    SAME_FORM,
    SUBSET,
    OpenShards,
    corruption_folders,
    is_tree,
    recognise,
)
from flatcal_dist.data.sets.tree import open_tree
from flatcal_dist.data.shards.access import is_remote
from flatcal_dist.data.shards.index import Index, load_index
from flatcal_dist.data.shards.writing import expand
from flatcal_dist.image_identity import data_identity
from flatcal_dist.urls import shown


def local_shards(path: str, classes: int) -> Index:
    """Return the index of shards on a file system. Raises DataError."""
    return load_index(expand(path, "validation"), classes)


@dataclass(frozen=True)
class Variant:
    """A data set, or a subset of ImageNet-C or CIFAR-C, that has not been read yet."""

    name: str
    kind: str  # one of KINDS
    path: str  # a tree, or shards by directory or pattern
    corruption: str | None = None
    severity: int | None = None
    base: str | None = None  # the kind of the clean images that a corruption is applied to

    @property
    def shifted(self) -> bool:
        """Whether the images are of another kind than those that networks are trained on."""
        return self.kind not in CLEAN

    @property
    def generated(self) -> bool:
        """Whether this program applies the corruption."""
        return self.base is not None

    def __str__(self) -> str:
        subset = [self.corruption, str(self.severity)] if self.corruption else []
        return "/".join([self.name, *subset])


@dataclass(frozen=True)
class DataSet:
    """The images of one variant, ready for evaluation."""

    variant: Variant
    index: ImageIndex
    label: np.ndarray  # [n] int64: positions in `classes`
    classes: tuple[int, ...] | None = None  # the classes of the network that compete; None for all
    real: list[list[int]] | None = None  # the ReaL labels of each image, where there are any
    people: np.ndarray | None = None  # [n, K] float64: the shares of people who give each answer

    @property
    def cropped(self) -> bool:
        """Whether the images are cropped already (corrupted images) and are resized only."""
        return self.variant.corruption is not None

    @property
    def identity(self) -> str:
        """The identity of the images by name, label and size.

        A tree and any shards of it have the same identity.
        """
        index, more = self.index, ""
        if isinstance(index, Corrupted | ArrayIndex):
            more = f"{index.corruption} {index.severity}"
        label = self.label if self.classes is None else np.array(self.classes)[self.label]
        return data_identity(index.keys(), label, index.size, more)

    @property
    def class_names(self) -> list[str] | None:
        """The names of all classes of the network, if ImageNet or the data tell them."""
        if self.variant.kind in (*SAME_FORM, *imagenet.MASKED, SUBSET):
            return list(imagenet.class_names())
        return names_of_labels(self.index) if self.variant.kind == "plain" else None


def of_index(index: Index, path: str, classes: int, real_file: Path | None = None) -> DataSet:
    """Return the validation shards of a run as a data set.

    Images under ImageNet's original names get ReaL labels.

    Args:
        index: The index of the shards.
        path: What names the shards.
        classes: The number of classes of the network.
        real_file: A file of ReaL labels, which has to fit, instead of those that timm ships.

    Raises:
        DataError: The ReaL labels do not fit the images.
    """
    label = index.label.astype(np.int64)
    if classes != imagenet.CLASSES:
        _refuse_real(real_file, path)
    real = _real(index, real_file) if classes == imagenet.CLASSES else None
    kind = "plain" if real is None else "imagenet"
    return DataSet(Variant("validation", kind, path), index, label, real=real)


def _refuse_real(file: Path | None, what: str) -> None:
    if file is not None:
        raise DataError(
            f"{file}: ReaL labels belong to ImageNet's validation images, not to {what}"
        )


def _real(index: ImageIndex, file: Path | None) -> list[list[int]] | None:
    keys = index.keys()
    if file is None and not imagenet.has_original_names(keys):
        return None
    return imagenet.real_labels(keys, file)


def find(
    text: str,
    classes: int,
    chosen_corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    open_shards: OpenShards = local_shards,
) -> list[Variant]:
    """Return the data set that PATH or NAME=PATH means.

    Args:
        text: PATH or NAME=PATH.
        classes: The number of classes of the network.
        chosen_corruptions: The corruptions of ImageNet-C or CIFAR-C, published or generated, to be
            used; None uses the usual ones.
        severities: The severities of ImageNet-C to be used; None uses all.
        open_shards: It opens shards.

    Returns:
        One variant. For ImageNet-C and CIFAR-C one variant for each subset.

    Raises:
        DataError: The path is not there, or the data are of another kind than the name says, or of
            no kind that fits the network.
    """
    name, path = _split(text)
    kind = name if name in KINDS and name != "plain" else None
    if kind in GENERATED:
        there = SMALL if kind == "cifar_c_generated" else corruptions.COMMON + corruptions.EXTRA
        if there is not SMALL:
            corruptions.require_package()
        base = recognise(path, classes, None, open_shards)
        if base in ("imagenet_c", "cifar_c"):
            raise DataError(f"{path} is corrupted already: name clean images for {kind}")
        names, levels = corruptions.choose(chosen_corruptions, severities, there)
        return [Variant(kind, kind, path, c, s, base) for c in names for s in levels]
    if kind and kind not in ("imagenet_c", "cifar_c") and classes != imagenet.CLASSES:
        raise DataError(f"{kind} needs a network of ImageNet's 1,000 classes, not of {classes}")
    found = recognise(path, classes, kind, open_shards)
    if kind and kind != found:
        raise DataError(f"{path} was named {kind}, but holds {found} data")
    name = name or (found if found != "plain" else _stem(path))
    if found == "cifar_c":
        found_here = list(corruption_arrays(Path(path).expanduser()))
        names, levels = corruptions.choose(chosen_corruptions or _usual(found_here), severities)
        if missing := [one for one in names if one not in found_here]:
            raise DataError(f"{path} has no {missing[0]}.npy, only {', '.join(found_here)}")
        return [Variant(name, found, path, c, s) for c in names for s in levels]
    if found != "imagenet_c":
        return [Variant(name, found, path)]
    return _published(name, path, chosen_corruptions, severities)


def _usual(there: Sequence[str]) -> list[str]:
    """Return the common corruptions that are there; the others if none of these is."""
    return [name for name in there if name in corruptions.COMMON] or list(there)


def _split(text: str) -> tuple[str | None, str]:
    """Return the name, or None, and the path of NAME=PATH or PATH."""
    name, equals, path = text.partition("=")
    if is_remote(text) or not equals or "/" in name or Path(text).expanduser().exists():
        return None, text
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or not path:
        raise DataError(
            f"{text!r} is no data set: expected PATH, or NAME=PATH with a name of letters, digits, "
            "_ . and -"
        )
    return name, path


def path_of(text: str) -> str:
    """Return the PATH of PATH or NAME=PATH."""
    return _split(text)[1]


def is_alone(text: str) -> bool:
    """Tell whether a text names generated corruptions, without the path of clean images."""
    return text in GENERATED and not Path(text).exists()


def _stem(path: str) -> str:
    path = shown(path)
    last = Path(path).name if is_tree(path) or Path(path).is_dir() else Path(path).parent.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", last).strip("_.-") or "data"


def _published(
    name: str, path: str, chosen: Sequence[str] | None, severities: Sequence[int] | None
) -> list[Variant]:
    there = corruption_folders(Path(path).expanduser())
    names, levels = corruptions.choose(chosen or list(there), severities)
    found = []
    for corruption in names:
        if corruption not in there:
            raise DataError(f"{path} has no folder {corruption}, only {', '.join(there)}")
        for level in levels:
            subset = there[corruption] / str(level)
            if not subset.is_dir():
                raise DataError(
                    f"{subset} is missing: ImageNet-C has severities 1 to 5 of every corruption. "
                    "Unpack it again, or choose those that are there with --severities"
                )
            found.append(Variant(name, "imagenet_c", str(subset), corruption, level))
    return found


def open_variant(
    variant: Variant,
    classes: int,
    real_file: Path | None = None,
    open_shards: OpenShards = local_shards,
) -> DataSet:
    """Find the images of a variant and give them labels.

    ImageNet's validation images under their original names also get ReaL labels.

    Args:
        variant: What to open.
        classes: The number of classes of the network.
        real_file: A file of ReaL labels, which has to fit, instead of those that timm ships.
        open_shards: It opens shards.

    Raises:
        DataError: The images are not there, or do not fit the network.
    """
    index, label = _index_and_label(variant, classes, open_shards)
    kind = variant.base or variant.kind
    space = None
    if kind in imagenet.MASKED:
        space = imagenet.subset(kind)
        if set(np.unique(label).tolist()) == set(space):
            label = np.searchsorted(space, label)
    real = None
    if kind in ("imagenet", SUBSET) and variant.corruption is None:
        real = _real(index, real_file)
    else:
        _refuse_real(real_file, str(variant))
    if variant.generated and variant.corruption is not None and variant.severity is not None:
        corrupted = corrupted_png if variant.kind == "cifar_c_generated" else corrupted_jpeg
        keys = tuple(index.keys())
        index = Corrupted(index, keys, variant.corruption, variant.severity, corrupted)
    return DataSet(variant, index, label.astype(np.int64), space, real)


def _index_and_label(
    variant: Variant, classes: int, open_shards: OpenShards
) -> tuple[ImageIndex, np.ndarray]:
    """Return the images, before a corruption here, and the class of the network of each of them."""
    if variant.kind == "cifar_c" and variant.corruption and variant.severity:
        root = Path(variant.path).expanduser()
        arrays = open_arrays(root, variant.corruption, variant.severity, classes)
        return arrays, arrays.label
    if is_tree(variant.path):
        tree = open_tree(Path(variant.path).expanduser())
        if variant.kind == SUBSET:
            return tree, numbers_of_folders(tree.folders, tree.root)[tree.label]
        masked = (variant.base or variant.kind) in imagenet.MASKED
        return tree, labels_of_folders(tree, classes, masked)[tree.label]
    shards = open_shards(variant.path, classes)
    if variant.kind == SUBSET:
        return shards, recorded_numbers(shards)
    return shards, shards.label.astype(np.int64)
