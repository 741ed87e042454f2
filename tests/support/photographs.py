"""A small ImageNet-like set of real photographs: an ImageFolder tree made without a download.

Every class is one photograph that scikit-learn or scikit-image ships, every image a crop of it:
varied sizes around ImageNet's 500 x 375, varied JPEG quality, names like ImageNet's. The same
arguments give the same bytes (with one version of Pillow).

    write_photographs(root)                        # ROOT/n02123045/n02123045_12.JPEG, ...
    write_photographs(root, awkward=("cmyk", "truncated"))   # and ROOT/n.../n..._cmyk.JPEG, ...
    awkward_image("empty")                         # the bytes of one awkward file

In conftest.py: the fixture `photographs` is such a tree, `photograph_shards` its shards.
"""

import importlib.util
import io
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

# By name, so in the order of labels; ImageNet's nearest synset where there is one.
CLASSES = {
    "n02123045": ("skimage", "data/chelsea.png"),
    "n03792782": ("skimage", "data/motorcycle_left.png"),
    "n03877845": ("sklearn", "datasets/images/china.jpg"),
    "n04008634": ("skimage", "data/rocket.jpg"),
    "n05311054": ("skimage", "data/retina.jpg"),
    "n06003682": ("skimage", "data/ihc.png"),
    "n07920052": ("skimage", "data/coffee.png"),
    "n09247410": ("skimage", "data/hubble_deep_field.jpg"),
    "n09818022": ("skimage", "data/astronaut.png"),
    "n11669921": ("sklearn", "datasets/images/flower.jpg"),
}

AWKWARD = (
    "cmyk",  # four channels: 22 of ImageNet's training images are said to have them
    "png",  # a PNG under a JPEG's name: ImageNet has one
    "exif",  # an orientation tag that says: turn by 90 degrees
    "gray",  # one channel
    "truncated",  # a JPEG cut in the middle: decodes in part, or not at all
    "damaged",  # a JPEG whose header is overwritten: never decodes
    "empty",  # 0 bytes
    "megapixels",  # a JPEG of 10,000 x 10,000 pixels, 100 megapixels, in some 600 kB
    "bomb",  # a PNG of 30,000 x 30,000 pixels in some 110 kB: Pillow refuses it
)


def write_photographs(
    root: Path,
    *,
    classes: int = 10,
    images_per_class: int = 8,
    seed: int = 0,
    awkward: Sequence[str] = (),
) -> Path:
    """Write the tree into `root` (made if need be) and return it.

    Class number c has `images_per_class` + c % 3 images, all different; another `seed` gives other
    crops under other names (a validation split). The kinds of AWKWARD named in `awkward` are
    added one file each, named CLASS_KIND.JPEG, to the classes in turn.
    """
    for label, name in enumerate(list(CLASSES)[:classes]):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(images_per_class + label % 3):
            image, quality = photograph(label, number, seed)
            file = folder / f"{name}_{seed * 1000 + number}.JPEG"
            file.write_bytes(encoded(image, "jpeg", quality=quality))
    for number, kind in enumerate(awkward):
        name = list(CLASSES)[number % classes]
        (root / name / f"{name}_{kind}.JPEG").write_bytes(awkward_image(kind))
    return root


def photograph(label: int, number: int = 0, seed: int = 0) -> tuple[Image.Image, int]:
    """An RGB crop of the photograph of class `label`, and the JPEG quality to store it in."""
    whole = _source(*list(CLASSES.values())[label])
    random = np.random.default_rng([seed, label, number])
    width = int(random.integers(160, min(501, whole.width)))
    height = int(random.integers(140, min(401, whole.height)))
    left = int(random.integers(0, whole.width - width + 1))
    top = int(random.integers(0, whole.height - height + 1))
    image = whole.crop((left, top, left + width, top + height))
    return image, int(random.choice([70, 85, 92, 96]))


def encoded(image: Image.Image, form: str = "jpeg", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


@lru_cache
def awkward_image(kind: str, orientation: int = 6) -> bytes:
    """The bytes of one awkward file of the kinds in AWKWARD."""
    image, _ = photograph(0, number=999)
    jpeg = encoded(image)
    if kind == "cmyk":
        return encoded(image.convert("CMYK"))
    if kind == "png":
        return encoded(image, "png")
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = orientation
        return encoded(image, exif=exif)
    if kind == "gray":
        return encoded(image.convert("L"))
    if kind == "truncated":
        return jpeg[: len(jpeg) // 2]
    if kind == "damaged":
        return b"\0" * 64 + jpeg[64:]
    if kind == "empty":
        return b""
    if kind == "megapixels":
        return encoded(Image.new("L", (10_000, 10_000), 128))
    if kind == "bomb":
        return _black_png(30_000)
    raise ValueError(f"no awkward image {kind!r}; expected one of {', '.join(AWKWARD)}")


def _black_png(side: int) -> bytes:
    """A square PNG of one bit per pixel, made without its pixels ever being in memory."""
    packer = zlib.compressobj()
    row = bytes(1 + -(-side // 8))  # a filter byte, then the pixels
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@lru_cache
def _source(package: str, path: str) -> Image.Image:
    # Found without importing the package, which takes a second.
    file = Path(importlib.util.find_spec(package).origin).parent / path
    with Image.open(file) as image:
        return image.convert("RGB")
