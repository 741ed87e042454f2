"""Samples, loaders and ways to reach shards that the tests of the data share."""

import io
from typing import Any

import numpy as np
from PIL import Image

from flatcal_dist.data import BatchPlan, Decoding, Index, Sample, Workers, training_loader
from flatcal_dist.data.images.decode import MAX_PIXELS
from flatcal_dist.data.images.transforms import Training
from flatcal_dist.data.loading.delivery import Batches
from flatcal_dist.data.shards.access import Access

QUICK = Access(stall_timeout=60, retries=3, backoff=0.01)  # a busy machine is no bad connection
ALERT = Access(stall_timeout=1, retries=3, backoff=0.01)  # where silence is meant
EVEN, PATTERN = 8, "e-train-{0000..0011}.tar"  # 12 shards of 8: they divide among 1, 2, 3, 4, 6, 12


def png(seed: int, height: int = 12, width: int = 10) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def make_samples(n: int, prefix: str = "s") -> list[Sample]:
    return [Sample(f"{prefix}{i:03d}", png(i), "png", i % 7, f"{i}.png") for i in range(n)]


def train_on(
    index: Index, transform: Training, *, workers: int = 0, pin_memory: bool = False,
    context: str | None = None, channels: int = 3, max_pixels: int = MAX_PIXELS, **plan: Any,
) -> Batches:  # fmt: skip
    """Return a training loader with the plan that the other arguments describe."""
    return training_loader(
        index,
        BatchPlan(**plan),
        transform,
        Decoding(channels, max_pixels=max_pixels),
        Workers(workers, pin_memory=pin_memory, context=context),
    )
