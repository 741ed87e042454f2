"""Data sets to evaluate on: ImageNet's validation images, its variants, or any others.

    find("data/val", classes=1000)                    [Variant(name="val", kind="imagenet", ...)]
    find("imagenet_r=data/imagenet-r", classes=1000)  [Variant(name="imagenet_r", ...)]
    find("imagenet_c=data/imagenet-c", classes=1000)  75 of them, a subset each
    open_variant(variant, classes=1000)               DataSet: index, labels, ReaL labels

A data set is an ImageFolder tree or indexed shards, written PATH or NAME=PATH. Its kind says how
folders and labels become classes of the network. It is recognised where the data tell it, and a
NAME that is a kind demands it:

    imagenet                1,000 folders named by WordNet id; shards with labels 0..999
    imagenet_v2             folders 0, 1, ..., 999, which are class numbers (sorted as text they
                            would not be: modestyachts/ImageNetV2, issue 10)
    imagenet_subset         some of the folders of `imagenet` or `imagenet_v2`; all classes of the
                            network compete. Never recognised: a tree may lack folders by mistake
    imagenet_a, imagenet_r  200 of the WordNet ids; the network chooses among these 200 classes
                            (Hendrycks et al., CVPR 2021 and ICCV 2021)
    imagenet_sketch         1,000 WordNet ids, files named sketch_0 and so on
    imagenet_c              CORRUPTION/SEVERITY/WNID/FILE as published, also below blur/, noise/ ...
    imagenet_c_generated    corruptions applied by us to clean images; never recognised
    plain                   anything else: a folder per class in the order of names, plain numbers
                            being the labels themselves; shards with labels of the network's classes

A network of another number of classes has only the kinds plain, imagenet_c, imagenet_c_generated.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.identity import data_identity
from flatcal_dist.data.images import corruptions
from flatcal_dist.data.images.corruptions import Corrupted
from flatcal_dist.data.making.image_folder import class_folders
from flatcal_dist.data.sets import imagenet
from flatcal_dist.data.sets.tree import TreeIndex, open_tree
from flatcal_dist.data.shards.access import Access, is_remote
from flatcal_dist.data.shards.index import Index, load_index
from flatcal_dist.data.shards.listing import class_names
from flatcal_dist.data.shards.samples import is_system_file
from flatcal_dist.data.shards.writing import expand
from flatcal_dist.urls import shown

MASKED = ("imagenet_a", "imagenet_r")
SUBSET = "imagenet_subset"
CLEAN = ("plain", "imagenet", SUBSET)
SAME_FORM = ("imagenet", "imagenet_v2", "imagenet_sketch")  # the data may not tell them apart
KINDS = (
    "imagenet", "imagenet_v2", *MASKED, "imagenet_sketch", SUBSET, "imagenet_c",
    "imagenet_c_generated", "plain",
)  # fmt: skip


def local_shards(path: str, classes: int) -> Index:
    """The index of shards on a file system. Raises DataError."""
    return load_index(expand(path, "validation"), classes)


@dataclass(frozen=True)
class Variant:
    """A data set by name and place, or a subset of ImageNet-C; not read yet.

    path: a tree, or shards by directory or pattern. kind: one of KINDS. base: of the clean images
    that a generated corruption is applied to, their kind.
    """

    name: str
    kind: str
    path: str
    corruption: str | None = None
    severity: int | None = None
    base: str | None = None

    @property
    def shifted(self) -> bool:
        """Whether its images differ in kind from those that networks are trained on."""
        return self.kind not in CLEAN

    @property
    def generated(self) -> bool:
        return self.base is not None

    def __str__(self) -> str:
        subset = [self.corruption, str(self.severity)] if self.corruption else []
        return "/".join([self.name, *subset])


@dataclass(frozen=True)
class DataSet:
    """Images of one variant, ready to be evaluated on.

    label [n] int64: positions in `classes`, which lists the network's classes that compete, None
    for all. real: ReaL labels per image, or None. cropped: the images are the crops to be seen
    (ImageNet-C), only resized to the network's size.
    """

    variant: Variant
    index: Any  # Index, TreeIndex or Corrupted
    label: np.ndarray
    classes: tuple[int, ...] | None = None
    real: list[list[int]] | None = None

    @property
    def cropped(self) -> bool:
        return self.variant.corruption is not None

    @property
    def identity(self) -> str:
        """Of the images by name, label and size: the same for a tree and for any shards of it."""
        index, more = self.index, ""
        if isinstance(index, Corrupted):
            index, more = index.clean, f"{index.corruption} {index.severity}"
        label = self.label if self.classes is None else np.array(self.classes)[self.label]
        return data_identity(index.keys(), label, index.size, more)

    @property
    def class_names(self) -> list[str] | None:
        """Names of all of the network's classes, where they are ImageNet's; else None."""
        known = (*SAME_FORM, *MASKED, SUBSET)
        return list(imagenet.class_names()) if self.variant.kind in known else None


def of_index(index: Index, path: str, classes: int, real_file: Path | None = None) -> DataSet:
    """The validation shards of a run. Images under ImageNet's original names get ReaL labels."""
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


def _real(index: Index | TreeIndex, file: Path | None) -> list[list[int]] | None:
    keys = index.keys()
    if file is None and not imagenet.has_original_names(keys):
        return None
    return imagenet.real_labels(keys, file)


def find(
    text: str,
    classes: int,
    chosen_corruptions: Sequence[str] | None = None,
    severities: Sequence[int] | None = None,
    open_shards: Callable[[str, int], Index] = local_shards,
) -> list[Variant]:
    """The data set that PATH or NAME=PATH means; of ImageNet-C one Variant per subset.

    classes: of the network. chosen_corruptions and severities narrow ImageNet-C, published or
    generated. open_shards(path, classes) gives the index of shards. Raises DataError for a path
    that is not there, or data that are not of the kind named, or of none that fits the network.
    """
    name, path = _split(text)
    kind = name if name in KINDS and name != "plain" else None
    if kind == "imagenet_c_generated":
        corruptions.require_package()
        base = recognise(path, classes, None, open_shards)
        if base == "imagenet_c":
            raise DataError(f"{path} is corrupted already: name clean images for {kind}")
        names, levels = corruptions.choose(chosen_corruptions, severities)
        return [Variant(kind, kind, path, c, s, base) for c in names for s in levels]
    if kind and kind != "imagenet_c" and classes != imagenet.CLASSES:
        raise DataError(f"{kind} needs a network of ImageNet's 1,000 classes, not of {classes}")
    found = recognise(path, classes, kind, open_shards)
    if kind and kind != found:
        raise DataError(f"{path} was named {kind}, but holds {found} data")
    name = name or (found if found != "plain" else _stem(path))
    if found != "imagenet_c":
        return [Variant(name, found, path)]
    return _published(name, path, chosen_corruptions, severities)


def _split(text: str) -> tuple[str | None, str]:
    """NAME=PATH, or PATH alone."""
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
    """The PATH of PATH or NAME=PATH."""
    return _split(text)[1]


def _stem(path: str) -> str:
    path = shown(path)
    last = Path(path).name if is_tree(path) or Path(path).is_dir() else Path(path).parent.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", last).strip("_.-") or "data"


def is_tree(path: str) -> bool:
    """Whether a path is a directory without shards."""
    root = Path(path).expanduser()
    return root.is_dir() and not (root / "_info.json").exists() and not any(root.glob("*.tar"))


def recognise(
    path: str, classes: int, named: str | None, open_shards: Callable[[str, int], Index]
) -> str:
    """The kind of the data at `path`; `named` decides where the data leave it open."""
    if not is_tree(path):
        index = open_shards(path, classes)
        if named != SUBSET:
            _check_recorded(index, classes)
        labels = np.unique(index.label)
        return _kind_of_labels(path, labels, classes, named)
    root = Path(path).expanduser()
    folders = class_folders(root)
    if named == SUBSET and folders:
        _numbers_of(tuple(folders), root)
        return named
    if _corruption_folders(root):
        return "imagenet_c"
    if not folders:
        raise DataError(
            f"{root} holds neither shards (*.tar) nor a folder of images per class. ImageNet's "
            "validation images in one heap become shards from the official archive: flatcal shard."
        )
    return _kind_of_folders(root, folders, classes, named)


def _kind_of_folders(root: Path, folders: list[str], classes: int, named: str | None) -> str:
    numbers = all(name.isascii() and name.isdigit() for name in folders)
    if numbers or classes != imagenet.CLASSES or not _wnids(folders):
        _check_count(root, folders, classes)
        return "imagenet_v2" if numbers and classes == imagenet.CLASSES else "plain"
    present = set(imagenet.numbers_of(folders, root).tolist())
    for kind in MASKED:
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


def _numbers_of(folders: Sequence[str], root: Path) -> np.ndarray:
    """The numbers of some of ImageNet's classes, by WordNet ids or numbers as folders' names."""
    if not all(name.isascii() and name.isdigit() for name in folders):
        return imagenet.numbers_of(folders, root)
    numbers = np.array([min(int(name), imagenet.CLASSES) for name in folders], np.int64)
    if numbers.max() >= imagenet.CLASSES or len(set(numbers.tolist())) < len(folders):
        raise DataError(
            f"{root}: folders that are plain numbers are class numbers, expected different ones of "
            f"0 to {imagenet.CLASSES - 1}"
        )
    return numbers


def _wnids(folders: Sequence[str]) -> bool:
    return any(re.fullmatch(r"n\d{8}", name) for name in folders)


def _check_recorded(index: Index, classes: int) -> None:
    """The classes that labels count, where `flatcal shard` left a list, must be the network's."""
    for plan, names in class_names([str(shard) for shard in index.shards], Access()).items():
        if all(name.isascii() and name.isdigit() for name in names):
            continue  # class numbers
        if classes == imagenet.CLASSES and _wnids(names):
            present = tuple(imagenet.numbers_of(names, Path(plan)).tolist())
            if present in (tuple(range(classes)), *map(imagenet.subset, MASKED)):
                continue
        elif len(names) == classes:
            continue
        raise DataError(
            f"{plan} lists {len(names)} classes ({names[0]}, ...), which the labels of these "
            f"shards count, and the network has {classes} classes: expected the same ones. Shard "
            "the complete data again."
        )


def _recorded_numbers(index: Index, label: np.ndarray) -> np.ndarray:
    """Labels as ImageNet's numbers, where `flatcal shard` left a list of what they count."""
    recorded = list(class_names([str(shard) for shard in index.shards], Access()).items())
    if not recorded or not _wnids(recorded[0][1]):
        return label
    (plan, names), *others = recorded
    if any(other != names for _, other in others) or label.max(initial=0) >= len(names):
        raise DataError(f"{plan}: the lists of classes beside these shards do not fit their labels")
    return imagenet.numbers_of(names, Path(plan))[label]


def _check_count(root: Path, folders: list[str], classes: int) -> None:
    if len(folders) != classes:
        raise DataError(
            f"{root} holds {len(folders)} class folders ({folders[0]}, ...), and the network has "
            f"{classes} classes: expected one folder for each"
        )


def _kind_of_labels(path: str, labels: np.ndarray, classes: int, named: str | None) -> str:
    """Of shards; `load_index` has checked that labels lie in 0..classes-1."""
    if classes != imagenet.CLASSES:
        return "plain"
    if named == SUBSET:
        return named
    present = set(labels.tolist())
    for kind in MASKED:
        if present == set(imagenet.subset(kind)):
            return kind
    if present == set(range(200)) and named in MASKED:
        return named
    if max(present) < 200 and named is None:
        raise DataError(
            f"{path}: its labels end at {max(present)}, as in a set of 200 classes that were "
            f"numbered by themselves. Say what it is: imagenet_a={path} or imagenet_r={path} for "
            f"those, imagenet={path} if the labels are ImageNet's own numbers"
        )
    return named if named in (*SAME_FORM, SUBSET) else "imagenet"


def _corruption_folders(root: Path) -> dict[str, Path]:
    """The folder of each corruption in the published layout, at the top or in groups."""
    known = corruptions.COMMON + corruptions.EXTRA
    places = [root, *(root / name for name in class_folders(root)[:16])]
    found: dict[str, Path] = {}
    for place in places:
        for name in known:
            if any((place / name / str(level)).is_dir() for level in corruptions.SEVERITIES):
                found.setdefault(name, place / name)
    return {name: found[name] for name in known if name in found}


def _published(
    name: str, path: str, chosen: Sequence[str] | None, severities: Sequence[int] | None
) -> list[Variant]:
    there = _corruption_folders(Path(path).expanduser())
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
    open_shards: Callable[[str, int], Index] = local_shards,
) -> DataSet:
    """Find the images of a variant and give them labels. Raises DataError.

    ReaL labels come with ImageNet's validation images under their original names; a file given for
    them is used instead of timm's, and then has to fit.
    """
    if is_tree(variant.path):
        index = open_tree(Path(variant.path).expanduser())
        masked = (variant.base or variant.kind) in MASKED
        if variant.kind == SUBSET:
            label = _numbers_of(index.folders, index.root)[index.label]
        else:
            label = _labels_of_folders(index, classes, masked)[index.label]
    else:
        index = open_shards(variant.path, classes)
        label = index.label.astype(np.int64)
        if variant.kind == SUBSET:
            label = _recorded_numbers(index, label)
    kind = variant.base or variant.kind
    space = None
    if kind in MASKED:
        space = imagenet.subset(kind)
        if set(np.unique(label).tolist()) == set(space):
            label = np.searchsorted(space, label)
    real = None
    if kind in ("imagenet", SUBSET) and variant.corruption is None:
        real = _real(index, real_file)
    else:
        _refuse_real(real_file, str(variant))
    if variant.generated:
        keys = tuple(index.keys())
        index = Corrupted(index, keys, variant.corruption, variant.severity)
    return DataSet(variant, index, label.astype(np.int64), space, real)


def _labels_of_folders(index: TreeIndex, classes: int, masked: bool) -> np.ndarray:
    """The network's class of each folder, [folders] int64."""
    folders = index.folders
    if all(name.isascii() and name.isdigit() for name in folders):
        labels = np.array([int(name) for name in folders], np.int64)
        if sorted(labels.tolist()) != list(range(classes)):
            raise DataError(
                f"{index.root}: folders that are plain numbers are class numbers, expected 0 to "
                f"{classes - 1}, found {labels.min()} to {labels.max()} in {len(folders)} folders"
            )
        return labels
    if classes == imagenet.CLASSES and _wnids(folders):
        labels = imagenet.numbers_of(folders, index.root)
        if not masked:
            _check_count(index.root, list(folders), classes)
        return labels
    _check_count(index.root, list(folders), classes)
    return np.arange(classes)
