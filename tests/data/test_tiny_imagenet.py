import io
import zipfile

import numpy as np
import pytest

from flatcal_dist.cli import main
from flatcal_dist.data import DataError, expand, load_index
from flatcal_dist.data.making.tiny_imagenet import MD5, tiny_imagenet
from tests.data.published import WNIDS, jpeg, tiny_imagenet_archive, tiny_imagenet_files


@pytest.fixture
def files():
    return tiny_imagenet_files()


@pytest.fixture
def archive(files, tmp_path):
    return tiny_imagenet_archive(tmp_path / "tiny-imagenet-200.zip", files)


@pytest.mark.parametrize("unpacked", [False, True])
def test_shards_hold_the_published_bytes_under_sorted_classes(archive, unpacked, tmp_path):
    source = archive
    if unpacked:
        zipfile.ZipFile(archive).extractall(tmp_path)
        source = tmp_path / "tiny-imagenet-200"
    for split in ("train", "validation"):
        out = str(tmp_path / "out")
        words = ["shard", str(source), out, "--split", split, "--workers", "1", "--shards", "2"]
        main([*words, "--unchecked"])
        index = load_index(expand(out, split), classes=3)
        assert index.shards[0].name == f"tiny_imagenet-{split}-0000.tar"
        expected = {}
        for k, wnid in enumerate(WNIDS):
            label = sorted(WNIDS).index(wnid)
            if split == "train":
                expected |= {f"{wnid}_{i}": (jpeg(100 * k + i), label) for i in range(12)}
            else:
                expected |= {f"val_{i}": (jpeg(1000 + i), label) for i in range(k, 11, 3)}
        found = {
            index.key(i): (bytes(index.read(i)), int(index.label[i])) for i in range(len(index))
        }
        assert found == expected
    assert tiny_imagenet(source, "train", checked=False).classes == tuple(sorted(WNIDS))


def test_the_zip_and_its_folder_give_the_same_samples_in_the_same_order(archive, tmp_path):
    zipfile.ZipFile(archive).extractall(tmp_path)
    for split in ("train", "validation"):
        one, two = (
            tiny_imagenet(path, split, checked=False)
            for path in (archive, tmp_path / "tiny-imagenet-200")
        )
        assert np.array_equal(one.name, two.name)
        assert list(one.images()) == list(two.images())
        assert one.bytes() == two.bytes()


def test_an_interrupted_download_says_so(archive):
    data = archive.read_bytes()
    for share in (0.01, 0.5, 0.999):
        archive.write_bytes(data[: int(share * len(data))])
        with pytest.raises(DataError, match="has the MD5 sum .* published with " + MD5):
            tiny_imagenet(archive, "train")
        with pytest.raises(DataError, match=r"is cut short, damaged or no zip .* again"):
            tiny_imagenet(archive, "train", checked=False)


def test_flipped_bits_are_noticed_while_sharding(archive, files):
    data = archive.read_bytes()
    image = files[f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"]  # stored, not compressed
    place = data.index(image) + len(image) // 2
    archive.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    source = tiny_imagenet(archive, "train", checked=False)
    with pytest.raises(DataError, match=f"{WNIDS[0]}_0.JPEG is damaged"):
        list(source.images())
    archive.write_bytes(data)
    with pytest.raises(DataError, match="changed after sharding began"):
        list(source.images())


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("train", {"wnids.txt": None}, "holds no wnids.txt, so it is not Tiny-ImageNet"),
        ("validation", {"val/val_annotations.txt": None}, "val_annotations.txt is missing"),
        ("validation", {"val/images/val_3.JPEG": None}, "val_3.JPEG is in val/images or in val/"),
        ("validation", {"val/images/val_99.JPEG": b"x"}, "val_99.JPEG is in val/images or in val"),
        ("train", {"wnids.txt": WNIDS[0].encode()}, f"the class {WNIDS[2]} is not in wnids.txt"),
        ("train", {"wnids.txt": "\n".join([*WNIDS, "n09"]).encode()}, "the class n09 of wnids.txt"),
        ("train", {f"train/{WNIDS[1]}/images/{WNIDS[1]}_1.JPEG": b""}, "1 images have 0 bytes"),
    ],
)
def test_what_is_missing_or_odd_is_named(split, change, message, files, tmp_path):
    changed = {name: data for name, data in (files | change).items() if data is not None}
    archive = tiny_imagenet_archive(tmp_path / "x.zip", changed)
    with pytest.raises(DataError, match=message):
        tiny_imagenet(archive, split, checked=False)


def test_what_is_no_zip_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(DataError, match="damaged or no zip"):
        tiny_imagenet(tmp_path / "x.zip", "train", checked=False)
    with pytest.raises(DataError, match="no such archive"):
        tiny_imagenet(tmp_path / "y.zip", "train")
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as other:
        other.writestr("a.txt", "a")
    (tmp_path / "z.zip").write_bytes(data.getvalue())
    with pytest.raises(SystemExit, match=r"holds no wnids.txt"):
        main(["shard", str(tmp_path / "z.zip"), str(tmp_path / "out"), "--unchecked"])


def test_files_of_macs_and_a_mark_of_the_byte_order_are_left_out(files, tmp_path):
    clean = tiny_imagenet_archive(tmp_path / "clean.zip", files)
    image = next(name for name in files if name.startswith("train/"))
    folder, _, name = image.rpartition("/")
    odd = files | {
        f"{folder}/._{name}": b"\0\5\x16\7",
        "val/images/._val_0.JPEG": b"\0\5\x16\7",
        "wnids.txt": b"\xef\xbb\xbf" + files["wnids.txt"],
    }
    strange = tiny_imagenet_archive(tmp_path / "strange.zip", odd)
    with zipfile.ZipFile(strange) as packed:
        packed.extractall(tmp_path / "unpacked")
    for split in ("train", "validation"):
        expected = tiny_imagenet(clean, split, checked=False)
        for path in (strange, tmp_path / "unpacked/tiny-imagenet-200"):
            found = tiny_imagenet(path, split, checked=False)
            assert found.name.tolist() == expected.name.tolist()
            assert found.label.tolist() == expected.label.tolist()
            assert found.classes == expected.classes


def test_two_classes_for_one_image_are_refused(files, tmp_path):
    lines = files["val/val_annotations.txt"]
    first = lines.split(b"\t")[0]
    twice = lines + first + b"\t" + WNIDS[0].encode() + b"\t0\t0\t1\t1\n"
    twice += first + b"\t" + WNIDS[1].encode() + b"\t0\t0\t1\t1\n"
    odd = tiny_imagenet_archive(tmp_path / "odd.zip", files | {"val/val_annotations.txt": twice})
    with pytest.raises(DataError, match=f"has two classes for {first.decode()}"):
        tiny_imagenet(odd, "validation", checked=False)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_of_the_folder_asks_for_the_whole(part, archive, tmp_path):
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "unpacked")
    words = ["shard", str(tmp_path / "unpacked/tiny-imagenet-200" / part), str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="is a part of Tiny-ImageNet: name the folder above it"):
        main([*words, "--split", "validation"])
