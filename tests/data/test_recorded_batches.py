"""The batches of one run, compared bit for bit with hashes that were recorded once.

A change of a hash means that a run would not resume as it began: its order, or what its batches
hold, has changed. Pixels are computed and cut by integers alone, so that the hashes hold on every
machine and with every version of torch.
"""

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatcal_dist.data import (
    BatchPlan,
    DataError,
    Decoding,
    Position,
    Sample,
    Workers,
    load_index,
    training_loader,
    write_shards,
)
from flatcal_dist.data.loading.streaming import streaming_loader
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.listing import open_stream


def sample(number: int) -> Sample:
    """The pixel at byte i of image `number` is (31 i + 7 number) mod 251."""
    pixels = ((31 * np.arange(12 * 10 * 3) + 7 * number) % 251).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels.reshape(12, 10, 3)).save(data, "png")
    image = b"no image" if number == 17 else data.getvalue()  # one substitute
    return Sample(f"s{number:03d}", image, "png", number % 7, f"{number}.png")


class Cut:
    """A crop whose place and brightness follow from the seed."""

    def __call__(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        top, left = seed % 5, seed // 5 % 3
        return image[:, top : top + 8, left : left + 8] ^ (seed >> 32 & 255)


def digest(batches: Iterable) -> str:
    """SHA-256 over all that the batches hold."""
    found = hashlib.sha256()
    for batch in batches:
        about = (batch.epoch, batch.step, batch.last, batch.images.shape, batch.images.stride())
        found.update(repr(about).encode())
        for tensor in (batch.images, batch.labels, batch.samples):
            found.update(f"{tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
        found.update(repr([(r.sample, r.by, r.epoch, r.step) for r in batch.replaced]).encode())
    return found.hexdigest()


@pytest.fixture(scope="module")
def recorded_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("recorded")
    samples = map(sample, range(50))
    return write_shards(samples, directory, "x-train", split="train", samples_per_shard=12)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("rank", "same_class", "expected"),
    [
        (0, False, "cd241f948e825174918d3c04721d75c0211c572c959a3a8c374afdc4010c8c93"),
        (1, False, "20ab7abc254a1f5b87a1c3f976c4b1ff28e294396caed4468c811a1b76a1cbb3"),
        (1, True, "14d087d3ca2f92686f1ba8b3d609575cde6a32f9e7e63e895b39d2573a844723"),
    ],
)
def test_indexed(recorded_shards, workers, rank, same_class, expected):
    plan = BatchPlan(
        seed=3, global_batch_size=14, micro_batch_size=3, epochs=3, start=Position(1, 1),
        rank=rank, world_size=2, window=20, same_class=same_class,
    )  # fmt: skip
    index = load_index(recorded_shards, classes=7)
    loader = training_loader(index, plan, Cut(), Decoding(3), Workers(workers))
    assert len(loader) == 15
    assert digest(loader) == expected


@pytest.mark.parametrize(
    ("rank", "workers", "expected"),
    [
        (0, 0, "af6e1ae7ad1b67e1566d7f3e0a226773938d3d852c266f10e1b9d287eeb61d0e"),
        (1, 0, "97593cf1df3f4e9bc3b7865868444eb212026157c07400567326143e4aab0aa9"),
        (1, 2, "e00d2af92cbf417b4c733e165fb8da7c80582c6c2ee11f5aa2959187a62d8a51"),
    ],
)
def test_streamed(recorded_shards, rank, workers, expected):
    plan = BatchPlan(
        seed=3, global_batch_size=14, micro_batch_size=3, epochs=3, max_steps=8,
        start=Position(0, 2), rank=rank, world_size=2,
    )  # fmt: skip
    stream = open_stream(str(recorded_shards[0].parent), "train", 7, Access())
    loader = streaming_loader(stream, plan, Cut(), Decoding(3), Workers(workers), buffer=10)
    assert len(loader) == 18
    assert digest(loader) == expected


def test_a_stream_cannot_pair_classes(recorded_shards):
    stream = open_stream(str(recorded_shards[0].parent), "train", 7, Access())
    plan = BatchPlan(seed=3, global_batch_size=14, micro_batch_size=3, epochs=3, same_class=True)
    with pytest.raises(DataError, match=r"cannot pair images.* Set data\.reader=indexed"):
        streaming_loader(stream, plan, Cut(), Decoding(3))
