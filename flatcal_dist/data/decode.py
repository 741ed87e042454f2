"""Encoded images to tensors.

Pillow decodes, as in timm's and torchvision's recipes, and as there the EXIF orientation is left
alone and transparency is dropped. `DECODER` names the decoder for the record of a run: decoders
differ by a level or two per pixel.
"""

import io
import warnings

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from flatcal_dist.data.errors import DataError

DECODER = f"pil {PIL.__version__}"


def decode(data: bytes, channels: int, name: str) -> Tensor:
    """One image as uint8 [channels, H, W], channels 1 (gray) or 3 (RGB), whatever it was stored as.

    `name` is what errors call the image. Raises DataError if the bytes are no whole image.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            # Palettes with transparency and large but allowed images: nothing to be done.
            warnings.simplefilter("ignore")
            if image.mode.startswith("I"):  # 16-bit gray: `convert` would clip it at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            pixels = np.array(image.convert(mode))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file raises nearly anything in Pillow
        unknown = isinstance(error, PIL.UnidentifiedImageError)  # whose text names an object
        what = "no known format" if unknown else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{name} cannot be decoded as an image ({what}): its "
            f"{len(data)} bytes are damaged, cut short, or of an unknown format. Replace the image "
            "and write its shard again, or leave the sample out."
        ) from error
    # Pillow's memory is [H, W, C]; the view keeps it, which resizing likes best.
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
