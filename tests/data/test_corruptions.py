"""Corruptions applied on the fly: seeded per image, the published way, the same everywhere."""

import io
import pickle

import imagecorruptions
import numpy as np
import pytest
from PIL import Image

from flatcal_dist.data.images.corruptions import COMMON, EXTRA, choose, corrupted_jpeg
from flatcal_dist.data.sets.variants import find, open_variant
from tests.support.photographs import photograph, write_photographs


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return photograph(0)[0]


@pytest.fixture(scope="module")
def png(image) -> bytes:
    stored = io.BytesIO()
    image.save(stored, "png")
    return stored.getvalue()


def published_crop(image: Image.Image) -> np.ndarray:
    """Shorter side 256, centre 224, with Pillow alone."""
    shorter = min(image.size)
    wide, high = (int(side * 256 / shorter) for side in image.size)
    left, top = round((wide - 224) / 2), round((high - 224) / 2)
    resized = image.resize((wide, high), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + 224, top + 224)))


def test_the_names_are_the_packages():
    assert list(COMMON) == imagecorruptions.get_corruption_names("common")
    assert list(EXTRA) == imagecorruptions.get_corruption_names("validation")
    assert choose(["all"], None)[0] == COMMON + EXTRA


# glass_blur compiles for seconds; the others' sources of randomness are all here
@pytest.mark.parametrize(
    "corruption",
    ["gaussian_noise", "impulse_noise", "frost", "elastic_transform", "motion_blur", "spatter"],
)
def test_random_numbers_depend_on_image_corruption_and_severity_alone(png, corruption):
    first = corrupted_jpeg(png, "x", corruption, 3, "a")
    np.random.seed(7)
    np.random.random(5)
    state = np.random.get_state()[1].copy()
    again = corrupted_jpeg(png, "x", corruption, 3, "a")
    assert first == again
    assert np.array_equal(np.random.get_state()[1], state), "the process's own stream is as it was"
    assert corrupted_jpeg(png, "x", corruption, 3, "b") != first
    assert corrupted_jpeg(png, "x", corruption, 4, "a") != first


@pytest.mark.exhaustive
@pytest.mark.parametrize("corruption", COMMON + EXTRA)
def test_every_corruption_is_repeatable_and_grows(image, png, corruption):
    clean = published_crop(image)
    distances = []
    for severity in (1, 5):
        jpeg = corrupted_jpeg(png, "x", corruption, severity, "a")
        assert jpeg == corrupted_jpeg(png, "x", corruption, severity, "a")
        damaged = np.asarray(Image.open(io.BytesIO(jpeg)))
        distances.append(np.abs(damaged.astype(float) - clean).mean())
    assert 0 < distances[0] < distances[1]


def test_the_image_is_the_published_crop_stored_as_jpeg(image, png):
    jpeg = corrupted_jpeg(png, "x", "pixelate", 2, "a")  # without randomness
    crop = published_crop(image)
    expected = io.BytesIO()
    damaged = imagecorruptions.corrupt(crop, 2, "pixelate")
    Image.fromarray(damaged).save(expected, "jpeg", quality=85, optimize=True)
    assert jpeg == expected.getvalue()


def test_an_index_of_corrupted_images(tmp_path):
    tree = write_photographs(tmp_path / "t", classes=2, images_per_class=2)
    (variant,) = find(f"imagenet_c_generated={tree}", 2, ["gaussian_noise"], [1])
    index = open_variant(variant, 2).index
    clean = index.clean
    assert len(index) == len(clean) == 5
    assert index.keys() == clean.keys()
    for sample in (0, 4):
        data = clean.read(sample)
        expected = corrupted_jpeg(data, "x", "gaussian_noise", 1, clean.key(sample))
        assert index.read(sample) == expected
    copied = pickle.loads(pickle.dumps(index))  # as a worker gets it
    assert copied.read(4) == index.read(4)
    other = open_variant(find(f"imagenet_c_generated={tree}", 2, ["fog"], [1])[0], 2).index
    assert len({index.identity, clean.identity, other.identity}) == 3
