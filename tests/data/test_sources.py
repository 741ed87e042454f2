"""Sources of shards: images that are encoded again or kept, and trees that are refused."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from flatcal_dist.data import (
    DataError,
    image_folder,
    load_index,
    prepare_shards,
)
from flatcal_dist.data.making.sharding import Encoding
from tests.support.photographs import AWKWARD, awkward_image, write_photographs


def test_images_are_encoded_again(tree, tmp_path):
    for kind in ("cmyk", "exif", "gray", "png", "damaged", "bomb"):
        (tree / "n02123045" / f"{kind}.JPEG").write_bytes(awkward_image(kind))
    source = image_folder(tree)
    written = prepare_shards(
        source, tmp_path / "edge", "train", shards=2, encoding=Encoding(max_edge=300)
    )
    assert written.copied == ["n02123045/bomb.JPEG", "n02123045/damaged.JPEG"]
    index = load_index(written.shards)
    kept = 0
    for i in range(len(index)):
        key, stored = index.key(i), index.read(i)
        original = next(tree.rglob(f"{key}.JPEG")).read_bytes()
        if key in ("damaged", "bomb"):
            assert stored == original
            continue
        before, after = (Image.open(io.BytesIO(data)) for data in (original, stored))
        if max(before.size) <= 300:
            kept += 1
            assert stored == original
            continue
        assert max(after.size) == 300
        assert abs(after.width / after.height - before.width / before.height) < 0.02
        assert after.format == "JPEG"
        assert after.mode == ("L" if key == "gray" else "RGB")
        assert not after.getexif()
        small = before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC)
        difference = np.asarray(small, float) - np.asarray(after.convert("RGB"), float)
        # JPEG at quality 90 costs a few levels; another image would be some 50 away.
        assert np.abs(difference).mean() < 6
    assert 0 < kept < len(index) - 2
    again = load_index(
        prepare_shards(
            source, tmp_path / "q", "train", shards=2, encoding=Encoding(quality=40)
        ).shards
    )
    assert [again.key(i) for i in range(len(again))] == [index.key(i) for i in range(len(index))]
    for i in range(len(again)):
        if (key := again.key(i)) not in ("damaged", "bomb"):
            original = Image.open(next(tree.rglob(f"{key}.JPEG")))
            stored = Image.open(io.BytesIO(again.read(i)))
            assert (stored.format, stored.size) == ("JPEG", original.size)
            # Pillow's table for quality 40: the standard's (50) times 50 / 40.
            assert stored.quantization[0][0] == 20
    with pytest.raises(DataError, match="max_edge is a number of pixels"):
        Encoding(max_edge=0)
    with pytest.raises(DataError, match="quality is one of JPEG's"):
        Encoding(quality=100)


def test_awkward_files_are_kept_as_they_are(tmp_path):
    kinds = [kind for kind in AWKWARD if kind != "empty"]
    tree = write_photographs(tmp_path / "t", classes=3, images_per_class=1, awkward=kinds)
    index = load_index(prepare_shards(image_folder(tree), tmp_path / "o", "train", shards=2).shards)
    stored = {index.key(i): index.read(i) for i in range(len(index))}
    for kind in kinds:
        (key,) = (key for key in stored if key.endswith(f"_{kind}"))
        assert stored[key] == awkward_image(kind)


def test_trees_that_are_refused(tree, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            image_folder(tree)

    folder = tree / "n02123045"
    for name in ("a.JPEG", "b.png"):
        (folder / name).touch()
    refused(r"2 images have 0 bytes: \S+a\.JPEG, \S+b\.png")
    (folder / "b.png").unlink()
    (folder / "a.JPEG").write_bytes(b"x")
    (folder / "a.png").write_bytes(b"x")
    refused(r"n02123045/a\.JPEG and n02123045/a\.png would both have the key")
    (folder / "a.png").rename(folder / "a.tiff")
    refused(r"a\.tiff is not an image that can be sharded")
    (folder / "a.tiff").rename(folder / "a\nb.png")
    refused("cannot be a key")
    (folder / "a\nb.png").unlink()
    (tree / "n99999999").mkdir()
    refused("n99999999 holds no images")
    (tree / "n99999999").rmdir()
    (folder / "gone.JPEG").symlink_to(tmp_path / "nowhere")
    refused(r"gone\.JPEG cannot be read")
    (folder / "gone.JPEG").unlink()
    image_folder(tree)
    shutil.rmtree(tree)
    refused("is not a directory")
    tree.mkdir()
    refused("holds no folders")


def test_keys_have_no_dots_and_are_unique(tree):
    a, b = (tree / name for name in ("n02123045", "n03792782"))
    (a / "x.1.JPEG").write_bytes(b"one")
    assert b"x_1" in image_folder(tree).key.tolist()
    (b / "x_1.JPEG").write_bytes(b"two")
    keys = image_folder(tree).key.tolist()
    assert {b"n02123045_x_1", b"n03792782_x_1"} < set(keys)
