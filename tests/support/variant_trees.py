"""Trees like those of ImageNet's variants, one small crop of a photograph per class."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo

from tests.support.photographs import encoded, photograph

WNIDS = ImageNetInfo().label_names()


@lru_cache
def _photograph(label: int) -> Image.Image:
    return photograph(label)[0]


def small_image(number: int) -> bytes:
    """A JPEG of 24 x 20 pixels, another one for each number."""
    whole = _photograph(number % 10)
    left = 7 * number % (whole.width - 24)
    top = 3 * number % (whole.height - 20)
    return encoded(whole.crop((left, top, left + 24, top + 20)), quality=92)


def write_tree(root: Path, folders: Sequence[str], file: str = "{number}.JPEG") -> Path:
    """ROOT/FOLDER/FILE with one image per folder; numbers count from 1."""
    for number, folder in enumerate(folders, start=1):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / file.format(number=number)).write_bytes(small_image(number))
    return root
