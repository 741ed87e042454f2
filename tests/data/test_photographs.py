"""The test photographs are what their docstring says: other tests rely on it."""

import io

import pytest
from PIL import Image

from tests.support.photographs import AWKWARD, CLASSES, awkward_image, write_photographs


def test_tree_is_varied_and_reproducible(tmp_path, photographs):
    again = write_photographs(tmp_path)
    files = sorted(path.relative_to(again) for path in again.rglob("*.JPEG"))
    assert len(files) == 8 * 10 + 3 + 2 * 3  # classes 1, 4, 7 have one more, 2, 5, 8 two more
    assert {path.parts[0] for path in files} == set(CLASSES)
    assert list(CLASSES) == sorted(CLASSES)
    images = [(again / path).read_bytes() for path in files]
    assert images == [(photographs / path).read_bytes() for path in files]
    assert len(set(images)) == len(images)
    sizes = {Image.open(io.BytesIO(image)).size for image in images}
    assert len(sizes) > 80
    other = write_photographs(tmp_path / "validation", seed=1)
    assert not {p.name for p in files} & {p.name for p in other.rglob("*.JPEG")}


@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_images(kind, monkeypatch):
    data = awkward_image(kind)
    if kind in ("empty", "damaged"):
        with pytest.raises(OSError, match="cannot identify"):
            Image.open(io.BytesIO(data))
        return
    if kind == "bomb":
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(data))
        assert len(data) < 200_000
        return
    if kind == "megapixels":
        with pytest.warns(Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data))
        assert image.width * image.height == 100_000_000
        return
    image = Image.open(io.BytesIO(data))
    assert image.format == ("PNG" if kind == "png" else "JPEG")
    assert image.mode == {"cmyk": "CMYK", "gray": "L"}.get(kind, "RGB")
    assert image.getexif().get(0x0112) == (6 if kind == "exif" else None)
    if kind == "truncated":
        with pytest.raises(OSError, match="truncated"):
            image.load()


def test_shards_of_photographs(photographs, photograph_shards):
    from flatcal_dist.data import load_index

    index = load_index(photograph_shards, classes=10)
    stored = {p.stem: p.read_bytes() for p in photographs.rglob("*.JPEG")}
    assert {index.key(i): index.read(i) for i in range(len(index))} == stored
    keys = index.keys()
    assert [list(CLASSES)[label] for label in index.label] == [key[:9] for key in keys]
