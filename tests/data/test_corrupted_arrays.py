"""CIFAR-10-C and CIFAR-100-C in the published form: arrays of all severities, and labels."""

import numpy as np
import pytest

from flatcal_dist.calibration.records.records import Records
from flatcal_dist.calibration.shift.groups import ALEXNET_ERROR, mean_corruption_error
from flatcal_dist.data import DataError
from flatcal_dist.data.images.corruptions import COMMON
from flatcal_dist.data.images.decode import decode
from flatcal_dist.data.making.cifar import cifar
from flatcal_dist.data.sets.variants import find, open_variant
from flatcal_dist.evaluation.reporting import _refuse_other_labels
from tests.data.published import cifar_files

IMAGES = 12


@pytest.fixture
def root(tmp_path):
    """The labels are those of the small test batch of `published`."""
    directory, random = tmp_path / "CIFAR-10-C", np.random.default_rng(0)
    directory.mkdir()
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, data in cifar_files(10, IMAGES).items():
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
    clean = cifar(tmp_path, "validation", "cifar10", checked=False)
    np.save(directory / "labels.npy", np.tile(clean.label.astype(np.int64), 5))
    for name in ("fog", "gaussian_noise", "saturate"):
        pixels = random.integers(0, 256, (5 * IMAGES, 32, 32, 3), dtype=np.uint8)
        np.save(directory / f"{name}.npy", pixels)
    return directory


def test_each_corruption_and_severity_is_its_part_of_the_array(root, tmp_path):
    found = find(str(root), 10)
    assert [str(v) for v in found] == [
        f"cifar_c/{name}/{level}" for name in ("gaussian_noise", "fog") for level in range(1, 6)
    ]
    clean = cifar(tmp_path, "validation", "cifar10", checked=False)
    identities = set()
    for variant in found:
        assert variant.shifted
        data = open_variant(variant, 10)
        array = np.load(root / f"{variant.corruption}.npy")
        start = IMAGES * (variant.severity - 1)
        for i in range(IMAGES):
            image = decode(data.index.read(i), 3, "x").permute(1, 2, 0).numpy()
            assert np.array_equal(image, array[start + i])
        assert data.label.tolist() == clean.label.tolist()
        assert data.index.keys() == [key.decode() for key in clean.key]
        assert data.cropped
        identities |= {data.identity, data.index.identity}
    assert len(identities) == 20


def test_corruptions_and_severities_are_chosen(root):
    chosen = find(f"c={root}", 10, ["saturate"], [5])
    assert [str(v) for v in chosen] == ["c/saturate/5"]
    with pytest.raises(DataError, match=r"has no snow.npy, only gaussian_noise, fog, saturate"):
        find(f"cifar_c={root}", 10, ["snow"])
    with pytest.raises(DataError, match="holds cifar_c data"):
        find(f"imagenet_c={root}", 10)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("fog", np.zeros((60, 32, 32), np.uint8), "expected uint8 of shape"),
        ("fog", np.zeros((60, 32, 32, 3), np.float32), "expected uint8 of shape"),
        ("fog", np.zeros((55, 32, 32, 3), np.uint8), "55 images and labels.npy 60 labels"),
        ("labels", np.zeros(60), "holds no list of whole numbers"),
        ("labels", np.full(60, 10), "labels from 10 to 10, and the network has 10 classes"),
    ],
)
def test_arrays_of_another_form_are_refused(root, name, array, message):
    np.save(root / f"{name}.npy", array)
    with pytest.raises(DataError, match=message):
        open_variant(find(str(root), 10, ["fog"], [1])[0], 10)


def test_an_interrupted_download_and_a_pickle_are_refused(root):
    file = root / "fog.npy"
    data = file.read_bytes()
    for content in (data[:1000], data[:50], b""):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"fog.npy cannot be read as an array .* again"):
            open_variant(find(str(root), 10, ["fog"], [1])[0], 10)
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"fog.npy cannot be read as an array"):
        open_variant(find(str(root), 10, ["fog"], [1])[0], 10)


def test_no_error_relative_to_alexnet_on_imagenet():
    rows = [
        {"corruption": c, "severity": s, "before": {"accuracy": 0.5}, "generated": False}
        for c in COMMON
        for s in range(1, 6)
    ]
    assert set(COMMON) == set(ALEXNET_ERROR)
    assert mean_corruption_error([row | {"kind": "imagenet_c"} for row in rows]) is not None
    assert mean_corruption_error([row | {"kind": "cifar_c"} for row in rows]) is None


def test_a_folder_that_is_named_so_and_is_not_says_what_is_expected(root):
    (root / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"expected labels\.npy and an array for each corruption"):
        find(f"cifar_c={root}", 10)


def test_labels_of_other_images_are_refused(root):
    """The images have the names of the clean ones, whose labels are known."""
    logits = np.random.default_rng(0).normal(size=(IMAGES, 10))
    (variant, *_) = find(f"cifar_c={root}", 10)
    data = open_variant(variant, 10)
    _refuse_other_labels(data, Records.from_logits(data.index.keys(), data.label, logits))
    _refuse_other_labels(data, Records.from_logits(["other"], [0], logits[:1]))
    turned = Records.from_logits(data.index.keys(), (data.label + 1) % 10, logits)
    with pytest.raises(DataError, match=rf"for {IMAGES} of {IMAGES} of them: it is of other"):
        _refuse_other_labels(data, turned)
