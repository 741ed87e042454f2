"""CIFAR-10H: files of people's answers, as published and damaged, and other images."""

import numpy as np
import pytest

from flatcal_dist.data import DataError
from flatcal_dist.data.sets.people import read_people

KEYS = ["train/cifar10_validation_00002", "cifar10_validation_00000"]
COUNTS = np.array([[50, 0, 1], [3, 40, 8], [17, 17, 17]])


def test_shares_and_counts_are_read_in_the_order_of_the_keys(tmp_path) -> None:
    shares = COUNTS / COUNTS.sum(axis=1, keepdims=True)
    for name, stored in (
        ("counts", COUNTS),
        ("probs", shares),
        ("single", shares.astype(np.float32)),
    ):
        np.save(tmp_path / f"{name}.npy", stored)
        found = read_people(tmp_path / f"{name}.npy", KEYS, 3)
        assert found.dtype == np.float64
        assert found == pytest.approx(shares[[2, 0]], abs=1e-7), name
        assert found.sum(axis=1) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("key", ["cifar10_validation_00003", "0001", "cifar10_train_00001"])
def test_other_images_are_refused(tmp_path, key: str) -> None:
    np.save(tmp_path / "counts.npy", COUNTS)
    with pytest.raises(DataError, match=f"the image '{key}' is none of them"):
        read_people(tmp_path / "counts.npy", [KEYS[0], key], 3)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (COUNTS[:, :2], r"an array \[3, 2\] of int64; expected shares or counts"),
        (COUNTS[0], r"an array \[3\]"),
        (COUNTS.astype(str), "of <U"),
        (COUNTS - 1, "row 0 has negative"),
        (COUNTS * [[1], [0], [1]], "row 1 has negative or no numbers"),
        (COUNTS * np.nan, "row 0 has negative or no numbers"),
        (np.array([{}, 1], dtype=object), "is no whole array"),
    ],
)
def test_arrays_of_another_form(tmp_path, stored: np.ndarray, message: str) -> None:
    np.save(tmp_path / "file.npy", stored)
    with pytest.raises(DataError, match=message):
        read_people(tmp_path / "file.npy", KEYS, 3)


def test_files_that_are_no_array(tmp_path) -> None:
    np.savez(tmp_path / "several.npz", COUNTS)
    (tmp_path / "text.npy").write_text("airplane,automobile\n")
    np.save(tmp_path / "cut.npy", COUNTS)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-7])
    for name, message in (
        ("several.npz", "holds several arrays"),
        ("text.npy", "is no whole array"),
        ("cut.npy", "is no whole array"),
        ("missing.npy", "is not there"),
    ):
        with pytest.raises(DataError, match=message):
            read_people(tmp_path / name, KEYS, 3)
