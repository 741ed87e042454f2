import io

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image

from flatcal_dist.data import DataError
from flatcal_dist.data.decode import DECODER, decode


def encoded(image: Image.Image, form: str = "png", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


@pytest.fixture
def picture() -> Image.Image:
    rows, columns = np.mgrid[0:24, 0:32]
    pixels = np.stack([rows * 10, columns * 7, (rows + columns) * 4], -1).astype(np.uint8)
    return Image.fromarray(pixels)


def test_pixels_are_exact(picture):
    image = decode(encoded(picture), 3, "x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 24, 32)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture))
    gray = decode(encoded(picture.convert("L")), 1, "x")
    assert np.array_equal(gray[0].numpy(), np.asarray(picture.convert("L")))
    assert torch.equal(decode(encoded(picture.convert("L")), 3, "x"), gray.expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted(picture, mode, channels):
    converted = picture.convert(mode)
    data = encoded(converted, "jpeg" if mode == "CMYK" else "png")
    image = decode(data, channels, "x")
    assert image.shape == (channels, 24, 32)
    target = "RGB" if channels == 3 else "L"
    reference = np.asarray(converted.convert(target), np.int64).reshape(24, 32, channels)
    difference = np.abs(image.permute(1, 2, 0).numpy().astype(np.int64) - reference)
    assert difference.mean() < (8 if mode == "CMYK" else 1e-9)


def test_palette_with_transparency_and_jpeg_and_webp(picture):
    palette = encoded(picture.convert("P"), transparency=b"\x00" * 10)
    assert decode(palette, 3, "x").shape == (3, 24, 32)
    for form in ("jpeg", "webp"):
        error = decode(encoded(picture, form, quality=95), 3, "x").permute(1, 2, 0).numpy()
        assert np.abs(error.astype(int) - np.asarray(picture)).mean() < 5


def test_sixteen_bits_keep_their_upper_eight():
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(values)), 1, "x")
    assert image[0, 0].tolist() == [0, 0, 1, 128, 255]


def test_exif_orientation_is_left_alone(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture, "jpeg", exif=exif), 3, "x").shape == (3, 24, 32)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_damaged_images_are_refused(picture, form):
    data = encoded(picture, form)
    for cut in (0, 1, 10, len(data) // 2):
        with pytest.raises(DataError, match=r"s\.tar: image 'k' cannot be decoded"):
            decode(data[:cut], 3, "s.tar: image 'k'")
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(b"<html>404</html>", 3, "x")


def test_damaged_png_chunk_is_refused():
    data = bytearray(png(0))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(bytes(data), 3, "x")


def test_decompression_bomb_is_refused(monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="DecompressionBomb"):
        decode(encoded(picture), 3, "x")


def test_decoder_has_a_name():
    assert DECODER.startswith("pil ")
