"""The identity of evaluated images, which decides which evaluations may be compared."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def data_identity(
    ids: Sequence[str], labels: ArrayLike, sizes: ArrayLike | None = None, more: str = ""
) -> str:
    """Return a SHA-256 of the images that does not depend on their order and their files.

    Args:
        ids: The names of the images, [N].
        labels: Their classes, numbered as the network numbers them, int [N].
        sizes: Their bytes as encoded, int [N], where they are known.
        more: What was done to all of them, such as a corruption.
    """
    names = np.asarray(ids, dtype=np.str_)
    order = np.argsort(names, kind="stable")
    digest = hashlib.sha256(more.encode())
    digest.update("\0".join(names[order].tolist()).encode())
    for column in (labels, sizes):
        if column is not None:
            digest.update(b"\0" + np.asarray(column, dtype="<i8")[order].tobytes())
    return digest.hexdigest()
