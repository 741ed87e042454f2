import importlib
import io
import pickle
import resource
import tracemalloc

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from flatcal_dist.data import BadImage, DataError, describe_decoder
from flatcal_dist.data.images.decode import MAX_PIXELS, choose_decoder, decode
from tests.support.photographs import awkward_image, photograph
from tests.support.samples import png

module = importlib.import_module("flatcal_dist.data.images.decode")
DECODERS = ("simplejpeg", "torchvision", "pil")


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
    dark = decode(encoded(Image.fromarray(values[:, :2])), 1, "x")
    assert dark[0, 0].tolist() == [0, 0], "16 bits stay 16 bits where all of them are small"


def test_thirty_two_bits_of_eight_are_eight():
    shown = np.array([[0, 1, 128, 255]], np.int32)
    image = decode(encoded(Image.fromarray(shown), "tiff"), 3, "x")
    assert (image == torch.tensor([0, 1, 128, 255], dtype=torch.uint8)).all()
    assert image.shape == (3, 1, 4)


def test_values_without_a_known_range_are_refused():
    """0 to 1 would come out black, and more than 16 bits as noise."""
    shown = np.array([[0, 256, 65535]], np.int32)
    assert decode(encoded(Image.fromarray(shown), "tiff"), 1, "x")[0, 0].tolist() == [0, 1, 255]
    for values in (shown / np.float32(65535), shown * 256, shown - 1, shown.astype(np.float32)):
        with pytest.raises(BadImage, match="brightness is read from 0 to 255 or 65535 only"):
            decode(encoded(Image.fromarray(values), "tiff"), 3, "x")


def test_exif_orientation_is_left_alone(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture, "jpeg", exif=exif), 3, "x").shape == (3, 24, 32)


def pillow(data: bytes, mode: str = "RGB") -> torch.Tensor:
    """The reference: Pillow, as timm uses it."""
    pixels = np.array(Image.open(io.BytesIO(data)).convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "options",
    [
        {"quality": 92},
        {"quality": 70, "progressive": True},
        {"quality": 85, "subsampling": 0},
        {"quality": 85, "subsampling": 1, "optimize": True},
        {"quality": 90, "keep_rgb": True},
    ],
)
def test_decoders_agree_with_pillow_on_photographs(decoder, options):
    """To two levels: they may be built on other versions of libjpeg. Here they are equal."""
    for label in range(4):
        image, _ = photograph(label)
        for mode, channels in (("RGB", 3), ("L", 1)):
            if mode == "L" and "keep_rgb" in options:
                continue
            data = encoded(image.convert(mode), "jpeg", **options)
            for wanted, target in ((3, "RGB"), (1, "L")):
                ours = decode(data, wanted, "x", decoder)
                assert ours.dtype == torch.uint8
                difference = (ours.int() - pillow(data, target).int()).abs()
                assert difference.max() <= 2, (mode, channels, wanted)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["cmyk", "png", "exif", "gray"])
def test_awkward_but_good_images(decoder, kind):
    data = awkward_image(kind)
    difference = decode(data, 3, "x", decoder).int() - pillow(data).int()
    assert difference.abs().max() <= (0 if kind in ("cmyk", "png") else 2)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", "truncated"),
        ("damaged", "no known format"),
        ("empty", "its 0 bytes"),
        ("megapixels", "has 10000 x 10000 pixels, more than data.max_pixels=89,478,485"),
        ("bomb", "DecompressionBombError"),
    ],
)
def test_awkward_and_bad_images(decoder, kind, reason):
    with pytest.raises(BadImage, match=r"^s\.tar: image 'k' ") as error:
        decode(awkward_image(kind), 3, "s.tar: image 'k'", decoder)
    assert reason in error.value.reason
    assert pickle.loads(pickle.dumps(error.value)).reason == error.value.reason


@pytest.mark.parametrize("decoder", DECODERS)
def test_megapixels_take_no_memory(decoder):
    """Refused by the header alone: 100 megapixels would be 300 MB."""
    data = awkward_image("megapixels")
    decode(encoded(photograph(0)[0], "jpeg"), 3, "x", decoder)
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage):
        decode(data, 3, "x", decoder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_the_strict_decoder_refuses_is_pillows(decoder):
    """Stray bytes before the end: libjpeg warns, Pillow decodes, as it does for timm."""
    whole = encoded(photograph(1)[0], "jpeg", quality=90)
    stray = whole[:-2] + b"\x00\x01\x02\x03" + whole[-2:]
    assert (decode(stray, 3, "x", decoder).int() - pillow(stray).int()).abs().max() <= 2


def test_formats_that_start_other_programs_are_not_tried():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(BadImage, match="no known format"):
        decode(postscript, 3, "x")


def test_auto_takes_what_is_there(monkeypatch):
    assert choose_decoder("auto") == "simplejpeg"
    assert describe_decoder().startswith("simplejpeg 1.")
    assert describe_decoder("pil") == f"pil {PIL.__version__}"
    monkeypatch.setattr(module, "simplejpeg", None)
    assert choose_decoder("auto") == "torchvision"
    assert decode(encoded(photograph(0)[0], "jpeg"), 3, "x").shape[0] == 3
    with pytest.raises(DataError, match=r"data\.decoder=simplejpeg: .* not installed"):
        choose_decoder("simplejpeg")
    monkeypatch.setattr(module, "decode_jpeg", None)
    assert choose_decoder("auto") == "pil"


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


def test_the_default_limit_is_where_pillow_warns():
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
