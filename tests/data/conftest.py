"""Shards of random images and of photographs, written once; tars made by hand to be refused."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flatcal_dist.data import (
    BatchPlan,
    Decoding,
    Index,
    Sample,
    Workers,
    image_folder,
    load_index,
    prepare_shards,
    training_loader,
    write_shards,
)
from flatcal_dist.data.images.decode import MAX_PIXELS
from flatcal_dist.data.images.transforms import Training
from flatcal_dist.data.loading.delivery import Batches
from tests.support.photographs import write_photographs


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


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """50 samples in shards of 12, 12, 12, 12 and 2; sample i is the image of seed i."""
    directory = tmp_path_factory.mktemp("shards")
    return write_shards(make_samples(50), directory, "x-train", split="train", samples_per_shard=12)


@pytest.fixture(scope="session")
def index(shards: list[Path]) -> Index:
    return load_index(shards, classes=7)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder tree of 89 photographs in 10 classes (photographs.py). Leave it as it is."""
    return write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="session")
def photograph_shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """These as five shards, imagenet1k-train-{0000..0004}.tar. Leave them as they are, too."""
    source, directory = image_folder(photographs), tmp_path_factory.mktemp("wds")
    return prepare_shards(source, directory, "train", shards=5).shards


@pytest.fixture
def tar(tmp_path: Path) -> Callable[..., Path]:
    """Write a tar of (name, bytes) members, as a stranger would."""

    def write(
        *members: tuple[str, bytes],
        name: str = "t.tar",
        mode: str = "w",
        format: int = tarfile.PAX_FORMAT,
    ) -> Path:
        path = tmp_path / name
        with tarfile.open(path, mode, format=format) as file:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return path

    return write
