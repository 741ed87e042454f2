"""CIFAR-N: labels of CIFAR's training images by people, with their real mistakes.

CIFAR-10_human.pt and CIFAR-100_human.pt are dictionaries of arrays, one label for each of the
50,000 training images in their order, as torch.save wrote them: `clean_label`, and `worse_label`,
`aggre_label`, `random_label1`, `random_label2` and `random_label3` (CIFAR-10) or `noisy_label`
(CIFAR-100). Source: Wei et al., Learning with Noisy Labels Revisited (ICLR 2022),
https://github.com/UCSC-REAL/cifar-10-100n.
"""

import io
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.pickles import read_pickle
from flatcal_dist.data.making.sources import Source
from flatcal_dist.data.shards.regular import read_regular

LARGEST = 1 << 26  # bytes; the published files have less than 4 MB
S = TypeVar("S", bound=Source)


def with_human_labels(source: S, file: Path, name: str | None) -> S:
    """Return a source with other labels. The shards keep the old one as `clean_label`.

    Args:
        source: The training images of CIFAR, in their published order.
        file: CIFAR-10_human.pt or CIFAR-100_human.pt.
        name: Which labels of the file, such as worse_label. It may be None if there is one choice.

    Raises:
        DataError: The file is damaged or has another form, has no labels of this name, or is about
            other images.
    """
    labels = _arrays(file)
    choices = [one for one in labels if one != "clean_label"]
    if name is None and len(choices) == 1:
        name = choices[0]
    if not choices:
        raise DataError(f"{file} holds no labels but clean_label. Download it again.")
    if name not in labels:
        asked = "" if name is None else f", and not {name}"
        raise DataError(
            f"{file} has the labels {', '.join(choices)}{asked}: choose with --labels-name, such "
            f"as --labels-name {choices[0]}."
        )
    for one in {name, "clean_label"} & {*labels}:
        if len(labels[one]) != len(source):
            raise DataError(
                f"{file}: {one} has {len(labels[one])} labels, and there are {len(source)} images: "
                "they belong to the training images of CIFAR, --split train."
            )
    clean, chosen = labels.get("clean_label"), labels[name]
    if clean is not None and (different := int((clean != source.label).sum())):
        raise DataError(
            f"{file}: clean_label differs from the labels of {different} images: the file belongs "
            "to other images, or to images in another order."
        )
    if chosen.min(initial=0) < 0 or chosen.max(initial=0) >= len(source.classes):
        raise DataError(f"{file}: {name} has labels outside 0..{len(source.classes) - 1}.")
    return replace(
        source,
        kind=f"{source.kind}, {name} of {file.name}",
        label=chosen.astype(np.int32),
        clean=source.label,
    )


def _arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the lists of labels in a file of torch.save, in either of its two formats."""
    try:
        data = read_regular(file, LARGEST)
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                inside = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
                if inside is None or archive.getinfo(inside).file_size > LARGEST:
                    raise DataError(f"{file} is no file of torch.save. Download it again.")
                stored = read_pickle(archive.read(inside), str(file))
        elif data.startswith(b"PK"):
            raise DataError(f"{file} is cut short. Download it again.")
        else:  # before torch 1.6: a number, a version and sizes of types stand before the value
            stored = read_pickle(data, str(file), place=3)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{file} cannot be read ({error}). Download it again.") from None
    found = {
        key: value
        for key, value in stored.items()
        if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu"
    }
    if not found:
        raise DataError(f"{file} holds no lists of labels, expected worse_label or the like.")
    return found
