"""Images in two sets, told by their bytes."""

import warnings

import numpy as np
import pytest

from flatcal_dist.data import DataError
from flatcal_dist.evaluation import evaluated_images
from flatcal_dist.evaluation.evaluated_images import refuse_seen

WHY = "of the other set: evaluate others"


class Set:
    """Images of 8 bytes, or with `sizes` of as many, that hold their number."""

    def __init__(self, numbers, labels=None, sizes=None):
        sizes = [8] * len(numbers) if sizes is None else sizes
        self.images = [str(n).encode().rjust(s, b"0") for n, s in zip(numbers, sizes, strict=True)]
        self.size = np.array(sizes)
        self.label = np.zeros(len(numbers), int) if labels is None else np.array(labels)
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def read(self, sample):
        self.reads += 1
        return self.images[sample]

    def key(self, sample):
        return f"key of {self.images[sample].decode()}"


def test_sets_without_a_common_image_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refuse_seen(Set(range(300)), Set(range(300, 400)), WHY)
        refuse_seen(Set(range(300)), Set([]), WHY)


@pytest.mark.parametrize(("shared", "others"), [(3, 300), (1, 100), (3, 900)])
def test_a_few_common_images_are_told(shared, others):
    """One in a hundred of the smaller set: published data sets have some."""
    first = 300 - shared
    message = f"{shared} of the 300 evaluated images, first key of 00000{first}, are of the other"
    with pytest.warns(RuntimeWarning, match=f"{message} set$"):
        refuse_seen(Set(range(300)), Set(range(first, first + others)), WHY)


@pytest.mark.parametrize(("shared", "others"), [(4, 300), (2, 100), (300, 900), (1, 1)])
def test_more_are_refused(shared, others):
    first = 300 - shared
    with pytest.raises(DataError, match=rf"^{shared} of the 300 .*, are {WHY}$"):
        refuse_seen(Set(range(300)), Set(range(first, first + others)), WHY)


def test_only_images_of_equal_size_are_read_and_in_large_sets_of_equal_label(monkeypatch):
    one = Set(range(50), labels=[0] * 25 + [1] * 25)
    other = Set(range(50), labels=[0] * 25 + [2] * 25, sizes=[8] * 40 + [9] * 10)
    with pytest.raises(DataError, match=r"^40 of the 50"):
        refuse_seen(one, other, WHY)
    assert other.reads == 40
    monkeypatch.setattr(evaluated_images, "WHOLE", 99)
    one.reads = other.reads = 0
    with pytest.raises(DataError, match=r"^25 of the 50"):
        refuse_seen(one, other, WHY)
    assert (one.reads, other.reads) == (25, 25)
