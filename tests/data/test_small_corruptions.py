"""Corruptions of small images: each against its definition, for gray and coloured images."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import correlate

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.images.corruptions import COMMON, EXTRA
from flatcal_dist.data.images.small_corruptions import SMALL, corrupt, corrupted_png
from flatcal_dist.data.sets.variants import find, open_variant
from tests.support.photographs import photograph

NOISES = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"}


def random() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.asarray(photograph(0)[0].resize((32, 32)))


def stored(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    png = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(png, "png")
    return png.getvalue()


def test_the_names_are_those_of_the_published_corruptions():
    assert set(SMALL) < set(COMMON + EXTRA)
    assert [name for name in SMALL if name in COMMON] == [c for c in COMMON if c in SMALL]


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (20, 33, 3), (1, 5, 1), (1, 1, 3)])
@pytest.mark.parametrize("corruption", SMALL)
def test_form_and_type_stay_and_images_get_worse(corruption, shape):
    image = np.asarray(random().integers(0, 256, shape), np.uint8)
    changes = []
    for severity in (1, 5):
        damaged = corrupt(image, corruption, severity, random())
        assert damaged.shape == shape
        assert damaged.dtype == np.uint8
        changes.append(np.abs(damaged.astype(int) - image).mean())
    if min(shape[:2]) >= 8:
        assert changes[0] < changes[1]


def test_noise_has_the_moments_that_its_definition_gives():
    """On 300,000 gray values of 0.5 a mean has a standard error of 0.001 of its deviation."""
    gray = np.full((317, 317, 3), 128, np.uint8)
    x = 128 / 255
    for name, severity, sd in (
        ("gaussian_noise", 3, 0.08),
        ("shot_noise", 5, (x / 50) ** 0.5),
        ("speckle_noise", 4, x * 0.16),
    ):
        noise = corrupt(gray, name, severity, random()) / 255 - x
        assert noise.mean() == pytest.approx(-0.5 / 255, abs=6e-4), name  # fractions are cut off
        assert noise.std() == pytest.approx(sd, rel=0.01), name
    hit = corrupt(gray, "impulse_noise", 5, random())
    assert (hit == 0).mean() == pytest.approx(0.035, abs=0.001)
    assert (hit == 255).mean() == pytest.approx(0.035, abs=0.001)
    assert ((hit != 0) & (hit != 255) & (hit != 128)).sum() == 0


def test_contrast_and_brightness_by_hand():
    image = np.array([[[0, 0, 0], [200, 100, 50]], [[255, 255, 255], [100, 100, 100]]], np.uint8)
    mean = image.mean((0, 1)) / 255
    expected = ((image / 255 - mean) * 0.5 + mean) * 255
    np.testing.assert_array_equal(corrupt(image, "contrast", 2, random()), expected.astype(int))
    brighter = corrupt(image, "brightness", 2, random()).astype(int)
    assert brighter[0, 0].tolist() == [25, 25, 25], "black becomes gray"
    assert brighter[0, 1] == pytest.approx([225, 112, 56], abs=1), "hue and saturation stay"
    assert brighter[1, 0].tolist() == [255, 255, 255]


def test_blurs_against_other_code(pixels):
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    expected = [correlate(pixels[:, :, c] / 255, kernel, mode="nearest") for c in range(3)]
    blurred = corrupt(pixels, "gaussian_blur", 5, random())  # sigma 1
    assert np.abs(blurred - np.stack(expected, 2) * 255).max() <= 1.01
    point = np.zeros((17, 17, 1), np.uint8)
    point[8, 8] = 255
    spread = corrupt(point, "defocus_blur", 5, random())[:, :, 0]  # a disk of radius 1.5
    assert spread[7:10, 7:10].tolist() == [[28] * 3] * 3, "nine equal parts, nearly without edges"
    cross = corrupt(point, "defocus_blur", 4, random())[7:10, 7:10, 0]  # a disk of radius 1
    assert cross.tolist() == [[0, 50, 0], [50, 50, 50], [0, 50, 0]]
    flat = np.full((12, 12, 3), 77, np.uint8)
    for name in ("zoom_blur", "defocus_blur", "gaussian_blur"):
        assert np.abs(corrupt(flat, name, 5, random()).astype(int) - 77).max() <= 1, name


def test_pixels_and_jpeg_against_pillow(pixels):
    image = Image.fromarray(pixels)
    box = Image.Resampling.BOX
    expected = image.resize((20, 20), box).resize((32, 32), box)
    np.testing.assert_array_equal(corrupt(pixels, "pixelate", 5, random()), np.asarray(expected))
    jpeg = io.BytesIO()
    image.save(jpeg, "jpeg", quality=58)
    expected = np.asarray(Image.open(jpeg))
    np.testing.assert_array_equal(corrupt(pixels, "jpeg_compression", 3, random()), expected)


@pytest.mark.parametrize("corruption", SMALL)
def test_random_numbers_depend_on_image_corruption_and_severity_alone(pixels, corruption):
    png = stored(pixels)
    first = corrupted_png(png, "x", corruption, 3, "a")
    np.random.seed(3)
    assert corrupted_png(png, "x", corruption, 3, "a") == first
    assert (corrupted_png(png, "x", corruption, 3, "b") != first) == (corruption in NOISES)
    assert corrupted_png(png, "x", corruption, 4, "a") != first


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_gray_images_stay_gray(pixels, mode):
    gray = Image.fromarray(np.asarray(Image.fromarray(pixels).convert("L")))
    if mode == "I;16":
        gray = Image.fromarray(np.asarray(gray, np.uint16) * 257)
    png = io.BytesIO()
    (gray if mode == "I;16" else gray.convert(mode)).save(png, "png")
    assert (
        Image.open(io.BytesIO(corrupted_png(png.getvalue(), "x", "shot_noise", 5, "a"))).mode == "L"
    )
    colour = corrupted_png(stored(pixels), "x", "shot_noise", 5, "a")
    assert Image.open(io.BytesIO(colour)).mode == "RGB"


def test_the_index_and_what_is_refused(digits_shards):
    found = find(f"cifar_c_generated={digits_shards}", 10, None, [1, 5])
    assert len(found) == 9 * 2
    assert all(variant.generated and variant.shifted for variant in found)
    index = open_variant(found[1], 10).index
    clean = index.clean
    expected = corrupted_png(clean.read(3), "x", "gaussian_noise", 5, clean.key(3))
    assert index.read(3) == expected
    assert Image.open(io.BytesIO(expected)).mode == "L"
    assert index.identity != open_variant(found[0], 10).index.identity
    assert len(find(f"cifar_c_generated={digits_shards}", 10, ["extra"], [1])) == 2
    with pytest.raises(DataError, match="'snow' cannot be made of small images; expected common"):
        find(f"cifar_c_generated={digits_shards}", 10, ["snow"])
