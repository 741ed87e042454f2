"""The official archives in miniature: tars in a tar, and labels by way of the development kit."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from scipy.io import savemat
from torchvision.datasets import imagenet

from flatcal_dist.cli import main
from flatcal_dist.data import DataError, expand, image_folder, load_index, prepare_shards
from flatcal_dist.data.making.archives import GROUND_TRUTH, ilsvrc_archive
from tests.support.photographs import CLASSES, encoded, photograph, write_photographs

WNIDS = list(CLASSES)[:4]
# ILSVRC2012_ID of each of these, as unordered as in the real kit, whose ID 1 is a dog in the
# middle of the wnids. Two more synsets are inner nodes of the hierarchy, no classes.
IDS = dict(zip(WNIDS, [3, 1, 4, 2], strict=True))
TRUTH = [2, 2, 1, 3, 4, 1, 3, 4, 2, 3, 1]  # IDs of the validation images 1, 2, ...


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_bytes(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members.items():
            add(tar, name, data)
    return file.getvalue()


@pytest.fixture
def train(tmp_path: Path) -> tuple[Path, Path]:
    """The train archive of a tree, with its classes and images out of order; and the tree."""
    tree = write_photographs(tmp_path / "tree", classes=4, images_per_class=3)
    classes = {}
    for folder in sorted(tree.iterdir(), reverse=True):
        images = {path.name: path.read_bytes() for path in sorted(folder.iterdir())[::-1]}
        classes[f"{folder.name}.tar"] = tar_bytes(images)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(classes))
    return tmp_path / "ILSVRC2012_img_train.tar", tree


def meta_mat(ids: dict[str, int]) -> bytes:
    """`synsets` as the kit's meta.mat has it: a MATLAB struct array, inner nodes at the end."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children",
             "wordnet_height", "num_train_images")  # fmt: skip
    rows = [
        (number, wnid, "words", "gloss", 0, np.zeros(0), 0, 1300)
        for wnid, number in sorted(ids.items(), key=lambda item: item[1])
    ]
    rows += [(1001, "n00001740", "entity", "", 2, np.array([1, 2]), 9, 0)]
    rows += [(1002, "n00001930", "thing", "", 2, np.array([3, 4]), 8, 0)]
    synsets = np.array(rows, [(name, object) for name in names]).reshape(-1, 1)
    file = io.BytesIO()
    savemat(file, {"synsets": synsets})
    return file.getvalue()


def val_images() -> dict[str, bytes]:
    wnid_of = {number: wnid for wnid, number in IDS.items()}
    return {
        f"ILSVRC2012_val_{i:08d}.JPEG": encoded(
            photograph(WNIDS.index(wnid_of[number]), i, seed=1)[0]
        )
        for i, number in enumerate(TRUTH, 1)
    }


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    """The validation archive; the development kit lies beside it as published, a .tar.gz."""
    images = val_images()
    shuffled = dict(sorted(images.items(), key=lambda item: item[0][-6:]))  # any order
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(shuffled))
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"text")
        truth = "".join(f"{number}\n" for number in TRUTH)
        add(tar, f"ILSVRC2012_devkit_t12/data/{GROUND_TRUTH}", truth.encode())
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta_mat(IDS))
    return tmp_path / "ILSVRC2012_img_val.tar"


def test_train_archive_gives_the_shards_of_the_tree(train, tmp_path):
    archive, tree = train
    for workers in ("1", "2"):
        out = str(tmp_path / workers)
        main(
            ["shard", str(archive), out, "--split", "train", "--shards", "3", "--workers", workers]
        )
    from_tree = prepare_shards(image_folder(tree), tmp_path / "tree_out", "train", shards=3)
    for shard in from_tree.shards:
        for workers in ("1", "2"):
            assert (tmp_path / workers / shard.name).read_bytes() == shard.read_bytes()
    index = load_index(from_tree.shards)
    for i in range(len(index)):
        assert WNIDS[index.label[i]] == index.key(i)[:9]


def test_validation_labels_are_sorted_wnids(validation, tmp_path):
    """By hand: ID 2 is the fourth wnid, label 3; ID 1 the second, 1; ID 3 the first; ID 4 third."""
    main(
        ["shard", str(validation), str(tmp_path / "out"), "--split", "validation", "--shards", "2"]
    )
    label = {1: 1, 2: 3, 3: 0, 4: 2}
    images, seen = val_images(), []
    shards = expand(tmp_path / "out", "validation")
    assert shards[0].name == "imagenet1k-validation-0000.tar"
    for sample in webdataset.WebDataset([str(path) for path in shards], shardshuffle=False):
        number = int(sample["__key__"].removeprefix("ILSVRC2012_val_"))
        seen.append(number)
        assert int(sample["cls"]) == label[TRUTH[number - 1]]
        name = f"{sample['__key__']}.JPEG"  # ReaL labels go by this number, ImageNet-C by the name
        wnid = WNIDS[int(sample["cls"])]
        assert IDS[wnid] == TRUTH[number - 1]
        about = {"label": int(sample["cls"]), "filename": name, "class": wnid}
        assert json.loads(sample["json"]) == about
        assert sample["jpg"] == images[name]
    assert sorted(seen) == list(range(1, len(TRUTH) + 1))


def test_torchvision_reads_the_same_classes(validation, monkeypatch):
    """Its parser of the same kit, as a witness for IDs, wnids and truth."""
    root = validation.parent
    kit = root / "ILSVRC2012_devkit_t12.tar.gz"
    sums = {"devkit": (kit.name, hashlib.md5(kit.read_bytes()).hexdigest())}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", sums)
    imagenet.parse_devkit_archive(str(root), str(kit))
    _, wnids = torch.load(root / "meta.bin", weights_only=True)
    source = ilsvrc_archive(validation, "validation")
    assert [source.classes[label] for label in source.label] == wnids


@pytest.mark.parametrize("where", ["beside", "data", "devkit", "named"])
def test_kit_is_found_unpacked(validation, tmp_path, where):
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    expected = ilsvrc_archive(validation, "validation").label.tolist()
    with tarfile.open(kit) as tar:
        files = {m.name.rpartition("/")[2]: tar.extractfile(m).read() for m in tar}
    kit.unlink()
    folder = {
        "beside": tmp_path,
        "data": tmp_path / "data",
        "devkit": tmp_path / "ILSVRC2012_devkit_t12" / "data",
        "named": tmp_path / "elsewhere",
    }[where]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (GROUND_TRUTH, "meta.mat"):
        (folder / name).write_bytes(files[name])
    named = folder if where == "named" else None
    assert ilsvrc_archive(validation, "validation", named).label.tolist() == expected


def test_archives_that_are_refused(train, validation, tmp_path):
    def refused(path: Path, split: str, message: str, devkit: Path | None = None) -> None:
        with pytest.raises(DataError, match=message):
            ilsvrc_archive(path, split, devkit)

    refused(train[0], "validation", "holds the train images, not those of --split validation")
    refused(validation, "train", "holds the validation images, not those of --split train")
    refused(tmp_path / "none.tar", "train", r"none\.tar: no such archive")
    other = tmp_path / "other.tar"
    other.write_bytes(tar_bytes({"a.jpg": b"x"}))
    refused(other, "train", "neither ILSVRC2012_img_train.*its first member is 'a.jpg'")
    other.write_bytes(tar_bytes({}))
    refused(other, "train", "it holds nothing")
    other.write_bytes(b"\x1f\x8b not a tar" * 100)
    refused(other, "train", "cannot be read as an uncompressed tar")
    other.write_bytes(tar_bytes({"n01440764.tar": tar_bytes({})}))
    refused(other, "train", r"the class n01440764\.tar is empty")
    other.write_bytes(tar_bytes({"n01440764.tar": tar_bytes({"a.JPEG": b"x", "b.JPEG": b""})}))
    refused(other, "train", r"1 images have 0 bytes: \S+ n01440764/b\.JPEG")
    other.write_bytes(tar_bytes({"n01440764.tar": tar_bytes({"a.JPEG": b"x"})[:700]}))
    refused(other, "train", r"class archive at byte 512, is cut short")
    one = tar_bytes({"a.JPEG": b"x"})
    other.write_bytes(tar_bytes({"n01440764.tar": one, "again/n01440764.tar": one}))
    refused(other, "train", "holds a class twice")

    refused(validation, "validation", f"holds no {GROUND_TRUTH}", train[1])
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / GROUND_TRUTH).write_text("1\n" * (len(TRUTH) + 1))
    refused(validation, "validation", r"holds no meta\.mat", kit)
    (kit / "meta.mat").write_bytes(meta_mat(IDS))
    refused(validation, "validation", "holds 11 images.*ground truth has 12 lines", kit)
    (kit / GROUND_TRUTH).write_text("1001\n" * len(TRUTH))
    refused(validation, "validation", "names class 1001, which meta.mat does not know", kit)
    (kit / GROUND_TRUTH).write_text("one\n" * len(TRUTH))
    refused(validation, "validation", "must hold a number a line", kit)
    (kit / "meta.mat").write_bytes(b"no MATLAB file" * 20)
    (kit / GROUND_TRUTH).write_text("1\n" * len(TRUTH))
    refused(validation, "validation", r"meta\.mat in \S+ is not that of", kit)


def test_every_truncation_of_the_train_archive_is_refused(train, tmp_path):
    whole = train[0].read_bytes()
    cut = tmp_path / "cut.tar"
    end = len(whole.rstrip(b"\0"))
    for length in np.linspace(1, end, 60, dtype=int):
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar"):
            ilsvrc_archive(cut, "train")


def test_archive_that_changes_after_planning(train, tmp_path):
    archive, _ = train
    source = ilsvrc_archive(archive, "train")
    data = archive.read_bytes()
    archive.write_bytes(data + bytes(512))
    with pytest.raises(DataError, match="changed after sharding began"):
        prepare_shards(source, tmp_path / "out", "train", shards=2)
    assert not list((tmp_path / "out").glob("imagenet1k-*.tar"))
