"""The classes of ImageNet and its ReaL labels, read from the lists that timm ships."""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError

CLASSES = 1000
MASKED = ("imagenet_a", "imagenet_r")  # kinds with images of 200 of the classes
REAL_IMAGES = 50_000
VALIDATION_NAME = re.compile(r"(?:^|_)ILSVRC2012_val_(\d{8})$")


def _timm(name: str) -> str:
    return (files("timm.data") / "_info" / name).read_text(encoding="utf-8")


@cache
def wnids() -> tuple[str, ...]:
    """Return the WordNet ids of the 1,000 classes, in the order of their numbers."""
    return tuple(_timm("imagenet_synsets.txt").split())


@cache
def class_names() -> tuple[str, ...]:
    """Return a name for each of the 1,000 classes, which is its first lemma in WordNet."""
    lemmas = dict(line.split("\t") for line in _timm("imagenet_synset_to_lemma.txt").splitlines())
    return tuple(lemmas[wnid].split(",")[0] for wnid in wnids())


@cache
def subset(kind: str) -> tuple[int, ...]:
    """Return the numbers of the 200 classes that "imagenet_a" or "imagenet_r" has images of."""
    return tuple(map(int, _timm(f"{kind}_indices.txt").split()))


def real_labels(keys: Sequence[str], file: Path | None = None) -> list[list[int]]:
    """Return the ReaL labels of validation images; an image has none, one or several.

    An image is known by its original name, ILSVRC2012_val_00000001 and so on. Its key is this name
    or ends in it. `file` is `real.json` as published (a list by image number), or an object from
    file names to labels. By default the labels are those that timm ships. Source: Beyer et al.,
    Are we done with ImageNet? (arXiv 2006.07159).

    Raises DataError if a key does not end in such a name, if the file lacks an image, or if the
    file has another form.
    """
    table = _read_real(file)
    labels = []
    for key in keys:
        name = VALIDATION_NAME.search(key)
        if name is None:
            raise DataError(
                f"ReaL labels go by the original names of ImageNet's validation images, and the "
                f"key {key!r} does not end in one (ILSVRC2012_val_ and 8 digits). Shard the "
                "validation images under their own names."
            )
        if int(name[1]) not in table:
            raise DataError(f"{file or 'real.json'} has no entry for {key}: another data set?")
        labels.append(table[int(name[1])])
    return labels


def _read_real(file: Path | None) -> dict[int, list[int]]:
    """Return labels by image number, which counts from 1."""
    try:
        stored = json.loads(file.read_text() if file else _timm("imagenet_real_labels.json"))
    except (OSError, ValueError) as error:
        raise DataError(f"the ReaL labels {file} cannot be read: {error}") from None
    table: dict[int, list[int]] = {}
    if isinstance(stored, list):
        table = dict(enumerate(stored, start=1))
    elif isinstance(stored, dict):
        for name, labels in stored.items():
            if (number := VALIDATION_NAME.search(Path(name).stem)) is not None:
                table[int(number[1])] = labels
    good = all(
        isinstance(labels, list)
        and all(type(label) is int and 0 <= label < CLASSES for label in labels)
        for labels in table.values()
    )
    if not table or not good or len(table) < len(stored):
        raise DataError(
            f"the ReaL labels {file} do not have the published form: a list of {REAL_IMAGES:,} "
            f"lists of classes 0..{CLASSES - 1}, or an object from ILSVRC2012_val_00000001.JPEG "
            "and so on to such lists"
        )
    return table


def has_original_names(keys: Sequence[str]) -> bool:
    """Tell whether all keys are, or end in, the original names of validation images."""
    return all(VALIDATION_NAME.search(key) for key in keys)


def numbers_of(names: Sequence[str], root: Path) -> np.ndarray:
    """Return the classes [n] of folders in `root`. Raises DataError for an unknown folder."""
    known = {wnid: number for number, wnid in enumerate(wnids())}
    strange = [name for name in names if name not in known]
    if strange:
        raise DataError(
            f"{root}: {len(strange)} folders are no classes of ImageNet-1K: "
            f"{', '.join(strange[:3])}{', ...' * (len(strange) > 3)}. "
            f"Expected WordNet ids such as {wnids()[0]}."
        )
    return np.array([known[name] for name in names], np.int64)
