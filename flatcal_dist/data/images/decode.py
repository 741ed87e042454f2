"""Decoding of images into tensors.

The fastest decoder that is installed and decodes as libjpeg does by default decodes JPEGs. Pillow
decodes everything else, and what that decoder refuses. As in the recipes of timm and torchvision,
the EXIF orientation is not applied and transparency is dropped. Decoders that are built on other
libraries may differ by a level or two per pixel, so the decoder belongs to the identity of a run.
"""

import io
import warnings
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from flatcal_dist.data.errors import BadImage, DataError

try:
    import simplejpeg
except ImportError:  # no wheel for this machine
    simplejpeg = None
try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision has announced to leave it to torchcodec
    decode_jpeg = None

# Formats that shards hold, and formats that web sites store under the name of a JPEG. Pillow would
# also try formats that start other programs, such as PostScript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB of RGB
JPEG = b"\xff\xd8"


@dataclass(frozen=True)
class Decoding:
    """How encoded images become tensors; the fields are parameters of `decode`."""

    channels: int  # 1 (gray) or 3 (RGB)
    decoder: str = "auto"
    max_pixels: int = MAX_PIXELS


def choose_decoder(wanted: str = "auto") -> str:
    """Return the decoder of JPEGs that "auto", "simplejpeg", "torchvision" or "pil" stands for.

    Raises DataError for a decoder that is not installed.
    """
    there = {"simplejpeg": simplejpeg, "torchvision": decode_jpeg, "pil": PIL}
    if wanted == "auto":
        return next(name for name, found in there.items() if found is not None)
    if there[wanted] is None:
        raise DataError(
            f"data.decoder={wanted}: the package {wanted} is not installed here, or decodes no "
            "images any more; install it, or set data.decoder=auto"
        )
    return wanted


def describe_decoder(wanted: str = "auto") -> str:
    """Return the decoder and its version, such as "simplejpeg 1.9.0", for the record of a run."""
    decoder = choose_decoder(wanted)
    package = {"pil": "pillow"}.get(decoder, decoder)
    return f"{decoder} {metadata.version(package)}"


def decode(
    data: bytes | memoryview,
    channels: int,
    name: str,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Decode one image as uint8 [channels, H, W], whatever it was stored as.

    Args:
        data: The encoded image.
        channels: 1 (gray) or 3 (RGB).
        name: What errors call the image.
        decoder: See `choose_decoder`.
        max_pixels: The most pixels that the image may have, checked before it takes memory.

    Raises:
        BadImage: The bytes are no whole image, or the image is too large.
    """
    decoder = choose_decoder(decoder)
    pixels = None
    if decoder != "pil" and data[:2] == JPEG:
        fast = _by_simplejpeg if decoder == "simplejpeg" else _by_torchvision
        pixels = fast(data, channels, name, max_pixels)
    return _by_pillow(data, channels, name, max_pixels) if pixels is None else pixels


def _by_simplejpeg(
    data: bytes | memoryview, channels: int, name: str, max_pixels: int
) -> Tensor | None:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width, name, max_pixels)
        if not _is_plain(space, channels):
            return None
        # Strict: what libjpeg only warns of is left to Pillow.
        pixels = simplejpeg.decode_jpeg(
            data, "RGB" if channels == 3 else "GRAY", fastdct=False, fastupsample=False, strict=True
        )
    except BadImage:
        raise
    except ValueError:
        return None
    # The memory is [H, W, C], as in Pillow. The view keeps it so, which is fastest to resize.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _by_torchvision(
    data: bytes | memoryview, channels: int, name: str, max_pixels: int
) -> Tensor | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                space = {"L": "Gray", "RGB": "RGB"}.get(image.mode, image.mode)
                _check_size(image.height, image.width, name, max_pixels)
        if not _is_plain(space, channels):
            return None
        mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
    except (BadImage, MemoryError):
        raise
    except Exception:  # a damaged file raises nearly anything, as below
        return None


def _is_plain(space: str, channels: int) -> bool:
    """Tell whether decoders agree. They do not on CMYK, nor on gray made from colours."""
    return space == "Gray" or (channels == 3 and space in ("YCbCr", "RGB"))


def _by_pillow(data: bytes | memoryview, channels: int, name: str, max_pixels: int) -> Tensor:
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        # Pillow warns about palettes with transparency and about large images, which are allowed.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as stored:
                _check_size(stored.height, stored.width, name, max_pixels)
                image: Image.Image = stored
                if image.mode.startswith(("I", "F")):  # `convert` would clip these at 255
                    image = _of_sixteen_bits(image, name)
                pixels = np.array(image.convert(mode))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a damaged file raises nearly anything in Pillow
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # whose text names an object
        what = "no known format" if unknown else f"{type(error).__name__}: {error}"
        raise BadImage(
            name,
            f"cannot be decoded as an image ({what}): its {len(data)} bytes are damaged, cut "
            "short, or of an unknown format",
        ) from error
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _of_sixteen_bits(image: Image.Image, name: str) -> Image.Image:
    """Return the upper 8 bits of 16. 32 bits that hold no more than 255 are taken for 8.

    Raises BadImage for other values, because nothing tells which of them is white.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise BadImage(
            name,
            f"holds values of type {values.dtype} from {values.min():g} to {values.max():g}, and "
            "brightness is read from 0 to 255 or 65535 only",
        )
    if image.mode == "I" and values.max() <= 255:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray((values >> 8).astype(np.uint8))


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(
            name, f"has {width} x {height} pixels, more than data.max_pixels={max_pixels:,}"
        )
