"""ImageFolder trees (one folder for each class) that are read where they lie, for evaluation.

Training needs shards, because a file system is slow at opening a million files in random order.
Evaluation reads each image once, in order, so it needs no copy.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.image_folder import image_folder, warn_of_left_out
from flatcal_dist.data.shards.regular import open_regular


@dataclass(frozen=True)
class TreeIndex:
    """The images of a tree, sorted by folder and name."""

    root: Path
    folders: tuple[str, ...]  # the names of the classes
    label: np.ndarray  # [n] i4: the number of the folder, which need not be a class of the network
    names: np.ndarray  # [n] S: FOLDER/FILE
    keys_: np.ndarray  # [n] S: as in the shards made of this tree
    size: np.ndarray  # [n] i8: bytes
    identity: str  # SHA-256 over names and sizes

    def __len__(self) -> int:
        return len(self.names)

    def read(self, sample: int) -> bytes:
        """Return the encoded image. Raises DataError if it cannot be read or its size changed."""
        path = self.root / os.fsdecode(self.names[sample])
        try:
            with open_regular(path) as file:
                data = file.read(int(self.size[sample]) + 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        if len(data) != self.size[sample]:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, but had {self.size[sample]} when the "
                "evaluation began: the data set changes. Wait until it is complete, then evaluate "
                "again."
            )
        return data

    def announce(self, samples: Iterable[int]) -> None:
        """Do nothing, because the system reads ahead in a file by itself."""

    def name(self, sample: int) -> str:
        return str(self.root / os.fsdecode(self.names[sample]))

    def key(self, sample: int) -> str:
        return str(self.keys_[sample], "utf-8")

    def keys(self) -> list[str]:
        return [str(key, "utf-8") for key in self.keys_]


def open_tree(root: Path) -> TreeIndex:
    """Return the images ROOT/CLASS/*. Raises DataError where `image_folder` does."""
    found = image_folder(root)
    warn_of_left_out(found.left_out)
    digest = hashlib.sha256()
    for name, size in zip(found.name.tolist(), found.size.tolist(), strict=True):
        digest.update(name + f"\0{size}\0".encode())
    return TreeIndex(
        root=Path(root),
        folders=found.classes,
        label=found.label,
        names=found.name,
        keys_=found.key,
        size=found.size,
        identity=digest.hexdigest(),
    )
