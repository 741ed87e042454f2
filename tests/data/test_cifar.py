import hashlib
import io
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from flatcal_dist.cli import main
from flatcal_dist.data import DataError, expand, load_index
from flatcal_dist.data.making.cifar import cifar
from flatcal_dist.data.making.pickles import read_pickle
from tests.data.published import FOLDERS, cifar_archive, cifar_files, pickled_by_python2

THEIRS = {10: CIFAR10, 100: CIFAR100}


def laid_out(files, classes, root):
    """The files as torchvision keeps them."""
    folder = root / FOLDERS[classes]
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def by_torchvision(files, classes, root, train, monkeypatch):
    """What torchvision reads, which takes only files with the sums that it knows."""
    kind = THEIRS[classes]
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    for listed in ("train_list", "test_list"):
        names = [name for name, _ in getattr(kind, listed)]
        monkeypatch.setattr(kind, listed, [[name, sums[name]] for name in names])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": sums[kind.meta["filename"]]})
    return kind(root, train=train)


@pytest.mark.parametrize("form", ["archive", "folder", "root"])
@pytest.mark.parametrize("classes", [10, 100])
def test_shards_hold_what_torchvision_reads(classes, form, tmp_path, monkeypatch):
    files = cifar_files(classes)
    folder = laid_out(files, classes, tmp_path)
    archive = cifar_archive(tmp_path / f"cifar-{classes}-python.tar.gz", files, classes)
    named = {"archive": [str(archive)], "folder": [str(folder)], "root": [f"cifar{classes}"]}[form]
    if form == "root":
        named += ["--root", str(tmp_path)]
    for split in ("train", "validation"):
        out = str(tmp_path / "out")
        words = ["shard", named[0], out, *named[1:], "--split", split, "--workers", "1"]
        main([*words, "--shards", "2", "--unchecked"])
        index = load_index(expand(out, split), classes)
        theirs = by_torchvision(files, classes, tmp_path, split == "train", monkeypatch)
        assert (
            len(index) == len(theirs) == {"train": 60 // (1 + 4 * (classes == 100))}.get(split, 12)
        )
        assert index.shards[0].name == f"cifar{classes}-{split}-0000.tar"
        for i in range(len(index)):
            number = int(index.key(i).rpartition("_")[2])
            image = Image.open(io.BytesIO(index.read(i)))
            assert image.format == "PNG"
            assert np.array_equal(image, theirs.data[number])
            assert index.label[i] == theirs.targets[number]
        assert cifar(folder, split, checked=False).classes == tuple(theirs.classes)


def test_files_that_are_not_the_published_ones_are_named(tmp_path):
    files = cifar_files(10)
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", files, 10)
    found = hashlib.md5(files["batches.meta"]).hexdigest()
    with pytest.raises(DataError, match=f"batches.meta has the MD5 sum {found}, .*--unchecked"):
        cifar(archive, "train")
    with pytest.raises(SystemExit, match="published with 5ff9c542aee3614f3951f8cda6e48888"):
        main(["shard", str(archive), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_an_interrupted_download_says_so(share, tmp_path):
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files(10), 10)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match=r"is cut short or damaged .* download it again"):
        cifar(archive, "validation", checked=False)


def test_a_missing_file_is_named(tmp_path):
    files = cifar_files(10)
    del files["data_batch_4"]
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz", files, 10)
    with pytest.raises(DataError, match=r"holds no cifar-10-batches-py/data_batch_4"):
        cifar(archive, "train", checked=False)
    folder = laid_out(files, 10, tmp_path)
    with pytest.raises(DataError, match=r"data_batch_4 cannot be read \(No such file"):
        cifar(folder, "train", checked=False)
    assert len(cifar(folder, "validation", checked=False)) == 12
    with pytest.raises(DataError, match=r"neither cifar-100-python.tar.gz nor its folder"):
        cifar(tmp_path, "train", "cifar100")
    with pytest.raises(SystemExit, match="cifar10 needs --root"):
        main(["shard", "cifar10", str(tmp_path / "out")])


def test_what_is_no_archive_of_cifar_is_refused(tmp_path):
    page = tmp_path / "cifar-10-python.tar.gz"
    page.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(DataError, match=r"is cut short or damaged \(not a gzip file"):
        cifar(page, "train")
    other = cifar_archive(tmp_path / "x.tgz", {"a": b"1"}, 10)
    with pytest.raises(DataError, match=r"holds no cifar-10-batches-py/batches.meta"):
        cifar(other, "train", checked=False)
    os.mkfifo(tmp_path / "cifar-100-python.tar.gz")
    with pytest.raises(DataError, match="is a FIFO, expected a regular file"):
        cifar(tmp_path / "cifar-100-python.tar.gz", "train")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
        ("test_batch", {"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        ("test_batch", {"data": np.zeros((2, 3071), np.uint8), "labels": [1, 2]}),
        ("test_batch", {"data": np.zeros((2, 3072), np.int16), "labels": [1, 2]}),
        ("test_batch", {"labels": [1, 2]}),
        ("batches.meta", {"label_names": ["one"]}),
    ],
)
def test_batches_of_another_form_are_refused(name, changed, tmp_path):
    files = cifar_files(10) | {name: pickled_by_python2(changed)}
    folder = laid_out(files, 10, tmp_path)
    with pytest.raises(DataError, match=f"{name}: expected "):
        cifar(folder, "validation", checked=False)


class Evil:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (Evil(os.system, ("touch /tmp/hacked",)), "posix.system"),
        (Evil(eval, ("1",)), "builtin.*.eval"),
        (Evil(getattr, (str, "join")), "builtin.*.getattr"),
        (Evil(np.load, ("x", None, True)), "numpy.load"),
        (np.array([{"a": 1}], object), "an array of 'O8'"),
        (np.float64(1.0), "multiarray.scalar"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_more_is_refused_by_name(value, asked, protocol, tmp_path):
    data = pickle.dumps({"data": value, "labels": [1]}, protocol)
    with pytest.raises(DataError, match=f"asks for .*{asked}"):
        read_pickle(data, "x")


def test_functions_of_the_reader_cannot_be_changed_by_a_pickle():
    attempt = b"\x80\x02cnumpy\ndtype\n}U\x05_makeK\x01sb."
    with pytest.raises(DataError, match="a change of a function"):
        read_pickle(attempt, "x")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["u1", "<i8", ">i4", "<f4", "f8", "?"])
def test_arrays_of_python_2_and_3_are_read(kind, order):
    values = np.asarray(np.arange(12).reshape(3, 4) % 7, kind, order=order)
    for protocol in (2, 3, 4):
        found = read_pickle(pickle.dumps({"a": values}, protocol), "x")["a"]
        assert np.array_equal(found, values)
    if order == "C" and kind == "u1":
        assert np.array_equal(read_pickle(pickled_by_python2({"a": values}), "x")["a"], values)


def test_damaged_pickles_are_errors_of_data():
    whole = pickled_by_python2({"data": np.zeros((2, 9), np.uint8), "labels": [1, 2]})
    refused = 0
    for place in range(len(whole)):
        for data in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :],
        ):
            try:
                read_pickle(data, "x")
            except DataError:
                refused += 1
    assert refused > len(whole)
    with pytest.raises(DataError, match="holds a list, expected names with values"):
        read_pickle(pickle.dumps([1]), "x")


@pytest.mark.parametrize("classes", [10, 100])
def test_the_directory_that_holds_them_will_do(classes, tmp_path):
    """Such as torchvision's `root`, which must not be taken for a tree of one folder a class."""
    laid_out(cifar_files(classes), classes, tmp_path / "data")
    main(["shard", str(tmp_path / "data"), str(tmp_path / "out"), "--unchecked", "--shards", "1"])
    index = load_index(sorted((tmp_path / "out").glob("*.tar")), classes)
    assert len(index) == (60 if classes == 10 else 12)


def test_a_directory_of_several_sets_asks_which(tmp_path):
    root = tmp_path / "data"
    laid_out(cifar_files(10), 10, root)
    cifar_archive(root / "cifar-100-python.tar.gz", cifar_files(100), 100)
    (root / ".hidden").mkdir()
    several = f"{root}/cifar-10-batches-py and {root}/cifar-100-python.tar.gz: name one of them"
    with pytest.raises(SystemExit, match=re.escape(f"{root} holds {several}")):
        main(["shard", str(root), str(tmp_path / "out"), "--unchecked"])


def test_a_directory_with_other_folders_asks_which(tmp_path):
    """They may be classes of the user's own, beside an archive that was left there."""
    root = tmp_path / "data"
    (root / "cat").mkdir(parents=True)
    cifar_archive(root / "cifar-10-python.tar.gz", cifar_files(10), 10)
    with pytest.raises(SystemExit, match=r"holds .*/cifar-10-python.tar.gz and .*/cat: name one"):
        main(["shard", str(root), str(tmp_path / "out"), "--unchecked"])
