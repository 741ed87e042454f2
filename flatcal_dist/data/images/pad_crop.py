"""Pad, crop and mirror, as small images are augmented.

Zeros are added on all four sides, a part of the old size is cut out at random, and a half of these
parts is mirrored (He et al., CVPR 2016, section 4.2). All of this is integer arithmetic. So the
same pixels result for one image and for whole batches, on the CPU and on a GPU.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as padded

from flatcal_dist.data.order import mixed

STREAM = np.uint64(0x6A09E667F3BCC909)  # so that other draws from the same seed are independent


@dataclass(frozen=True)
class PadCrop:
    """What is drawn for images, and how it is applied.

    Attributes:
        padding: The number of pixels that are added on each side.
        flip: The probability that an image is mirrored.
    """

    padding: int = 4
    flip: float = 0.5

    def draw(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the first row and column of the part and whether it is mirrored, for each seed.

        Args:
            seeds: The seeds of the samples, [n] uint64 (see `order.sample_seeds`).
        """
        first = mixed(seeds ^ STREAM)
        second = mixed(first)
        places, half = np.uint64(2 * self.padding + 1), np.uint64(32)
        rows = ((first >> half) * places) >> half
        columns = ((first & np.uint64(2**32 - 1)) * places) >> half
        mirrored = (second >> np.uint64(11)) < np.uint64(round(self.flip * 2**53))
        return rows.astype(np.int64), columns.astype(np.int64), mirrored

    def one(self, image: Tensor, seed: int) -> Tensor:
        """Return the part of one image [C, H, W], in the same size."""
        rows, columns, mirrored = self.draw(np.array([seed], np.uint64))
        height, width = image.shape[1:]
        row, column = int(rows[0]), int(columns[0])
        whole = padded(image, [self.padding] * 4)
        part = whole[:, row : row + height, column : column + width]
        return part.flip(2) if mirrored[0] else part

    def batch(self, images: Tensor, seeds: np.ndarray) -> Tensor:
        """Return the parts of images [n, H, W, C], in the same size and on the same device."""
        rows, columns, mirrored = self.draw(seeds)
        n, height, width, channels = images.shape
        across = np.arange(width)
        across = np.where(mirrored[:, None], across[::-1], across) + columns[:, None]  # [n, W]
        down = np.arange(height) + rows[:, None]  # [n, H]
        wide = width + 2 * self.padding
        number = (np.arange(n) * (height + 2 * self.padding))[:, None] + down  # of a row, [n, H]
        whole = padded(images, [0, 0, *[self.padding] * 4])
        places = torch.from_numpy(number[:, :, None] * wide + across[:, None, :])
        pixels = whole.view(-1, channels).index_select(0, places.view(-1).to(images.device))
        return pixels.view(n, height, width, channels)
