"""CIFAR-10H: what about fifty people said about each test image of CIFAR-10.

cifar10h-probs.npy holds shares and cifar10h-counts.npy numbers of people, each [10000, 10], for the
test images of CIFAR-10 in their published order. Source: Peterson et al., Human Uncertainty Makes
Classification More Robust (ICCV 2019), https://github.com/jcpeterson/cifar-10h.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError

TEST_IMAGE = re.compile(r"cifar10_validation_(\d{5})$")


def read_people(file: Path, keys: Sequence[str], classes: int) -> np.ndarray:
    """Return the shares of people who give each answer, float64 [n, K].

    Args:
        file: An array [M, K] of shares or counts, of the test images in their published order.
        keys: The keys of the images. They end in cifar10_validation_00000 and so on. So
            `flatcal shard` calls the test images of CIFAR's archive.
        classes: The number of classes K.

    Raises:
        DataError: The file is damaged or has another form, or keys are other images.
    """
    answers = _answers(file, classes)
    found = [TEST_IMAGE.search(key) for key in keys]
    for key, name in zip(keys, found, strict=True):
        if name is None or int(name[1]) >= len(answers):
            raise DataError(
                f"{file} has the answers of people for {len(answers):,} images in the order of "
                f"CIFAR-10's test images, and the image {key!r} is none of them "
                f"(cifar10_validation_00000 to {len(answers) - 1:05d}). Evaluate shards that "
                "`flatcal shard --split validation` makes from CIFAR-10's archive."
            )
    return answers[[int(name[1]) for name in found if name]]


def _answers(file: Path, classes: int) -> np.ndarray:
    try:
        stored = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{file} is not there (--people).") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    except (ValueError, EOFError):  # numpy's words advise to load what may run programs
        raise DataError(f"{file} is no whole array of NumPy (.npy). Download it again.") from None
    form = f"expected shares or counts of people [images, {classes}], such as cifar10h-probs.npy"
    if not isinstance(stored, np.ndarray):
        raise DataError(f"{file} holds several arrays (.npz); {form}.")
    if stored.ndim != 2 or stored.shape[1] != classes or stored.dtype.kind not in "fiu":
        raise DataError(f"{file} is an array {list(stored.shape)} of {stored.dtype}; {form}.")
    answers = stored.astype(np.float64)
    total = answers.sum(axis=1, keepdims=True)
    bad = ~(np.isfinite(answers).all(axis=1) & (answers >= 0).all(axis=1) & (total[:, 0] > 0))
    if bad.any():
        raise DataError(
            f"{file}: row {int(bad.argmax())} has negative or no numbers of people; {form}."
        )
    return answers / total
