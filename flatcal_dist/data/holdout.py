"""Training images that are kept apart, so that temperatures can be fitted on them.

The choice is stratified: each class gives the same share of its images, up to one image. A random
choice of 10 % of CIFAR-100 would leave 30 to 70 images in a class. Which images of a class are
chosen follows from their keys and the seed. So the choice is the same for any shards of a data set,
and on any number of ranks.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from flatcal_dist.data.errors import DataError


def held_out(keys: Sequence[str], labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Return which images are kept apart, bool [n].

    In each class the images with the smallest hashes are chosen. Their number is the share of the
    class, rounded down. One image more comes from the classes that lost most by rounding, so that
    the total is the share of all images.

    Args:
        keys: The keys of the images [n].
        labels: Their classes, int [n].
        fraction: The share of the images.
        seed: The seed. Another seed makes another choice.

    Raises:
        DataError: No image would be chosen, or none would be left.
    """
    total = round(fraction * len(keys))
    if not 0 < total < len(keys):
        raise DataError(
            f"data.holdout={fraction} of {len(keys)} training images is {total} images: some have "
            "to be kept apart, and some have to be left. Choose another share."
        )
    _, of_class, images = np.unique(labels, return_inverse=True, return_counts=True)
    shares = images * (total / len(keys))
    count = np.floor(shares).astype(np.int64)
    lost = np.argsort(count - shares, kind="stable")  # the largest rest first
    count[lost[: total - count.sum()]] += 1
    hashes = np.array([_hash(key, seed) for key in keys], np.uint64)
    order = np.lexsort((hashes, of_class))
    starts = np.cumsum(images) - images
    place = np.empty(len(keys), np.int64)
    place[order] = np.arange(len(keys)) - np.repeat(starts, images)
    return place < count[of_class]


def _hash(key: str, seed: int) -> int:
    digest = hashlib.sha256(f"holdout:{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
