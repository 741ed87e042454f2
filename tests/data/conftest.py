"""Shards of random images and of photographs, written once; tars made by hand to be refused."""

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flatcal_dist.data import Index, image_folder, load_index, prepare_shards, write_shards
from tests.support.photographs import write_photographs
from tests.support.samples import EVEN, make_samples
from tests.support.web import Web, serving


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


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 shards of 8 samples: see PATTERN. Leave them as they are."""
    directory = tmp_path_factory.mktemp("even")
    write_shards(make_samples(96), directory, "e-train", split="train", samples_per_shard=EVEN)
    return directory


@pytest.fixture
def web(even: Path) -> Iterator[Web]:
    """A web server with the shards of `even`."""
    with serving(even) as served:
        yield served


@pytest.fixture
def own_web(tmp_path: Path) -> Iterator[Web]:
    """A web server with what the test writes into tmp_path."""
    with serving(tmp_path) as served:
        yield served


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """22 small photographs in two classes, to be changed."""
    return write_photographs(tmp_path / "tree", classes=2, images_per_class=10)
