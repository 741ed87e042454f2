"""From sources to shards: what is written, the same however it is written, and resumed."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data import create_dataset

from flatcal_dist.cli import main
from flatcal_dist.data import (
    DataError,
    expand,
    image_folder,
    load_index,
    prepare_shards,
    write_shards,
)
from flatcal_dist.data.making import plans, sharding
from flatcal_dist.data.making.sharding import Encoding
from tests.support.photographs import CLASSES, write_photographs
from tests.support.samples import make_samples


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_names_members_and_labels_are_imagenets(photographs, photograph_shards):
    assert [p.name for p in photograph_shards] == [
        f"imagenet1k-train-{i:04d}.tar" for i in range(5)
    ]
    index = load_index(photograph_shards, classes=10)
    assert sorted(index.lengths.tolist()) == [17, 18, 18, 18, 18]
    stream = webdataset.WebDataset([str(p) for p in photograph_shards], shardshuffle=False)
    for i, sample in enumerate(stream):
        assert {k for k in sample if k[0] != "_"} == {"jpg", "cls", "json"}
        about = json.loads(sample["json"])
        label, name = int(sample["cls"]), about["filename"]
        assert about == {"label": label, "class": list(CLASSES)[label], "filename": name}
        assert name == f"{about['class']}/{sample['__key__']}.JPEG"
        assert sample["jpg"] == (photographs / name).read_bytes() == index.read(i)
        assert (sample["__key__"], label) == (index.key(i), index.label[i])
    assert i + 1 == len(index) == 89
    # Shuffled: a shard of the first images only would hold two classes.
    assert all(len(set(index.label[index.shard == s])) > 5 for s in range(5))


def test_timm_reads_the_same_images_and_labels(photographs, photograph_shards):
    """Also against timm's own ImageFolder: the labels of the two agree image by image."""
    folder = create_dataset("", root=str(photographs))
    labels = [label for _, label in folder.reader.samples]
    truth = dict(zip(folder.filenames(basename=True), labels, strict=True))
    directory = photograph_shards[0].parent
    dataset = create_dataset("wds/imagenet1k", root=str(directory), split="train")
    assert len(dataset) == 89
    read = [(image, label) for image, label in dataset]
    index = load_index(photograph_shards)
    assert len(read) == 89
    for i, (image, label) in enumerate(read):
        assert label == index.label[i] == truth[f"{index.key(i)}.JPEG"]
        assert np.array_equal(image, Image.open(io.BytesIO(index.read(i))).convert("RGB"))
    reader = create_dataset("wds/imagenet1k", root=str(directory), split="train").reader
    assert reader.filenames(basename=True) == [f"{index.key(i)}.JPEG" for i in range(89)]


def test_shards_of_others_are_indexed(photographs, tmp_path, capsys):
    """webdataset's ShardWriter as timm's and open_clip's users run it: keys with folders, .jpeg."""
    source = image_folder(photographs)
    with webdataset.ShardWriter(
        str(tmp_path / "in1k-train-%04d.tar"), maxcount=30, verbose=0
    ) as writer:
        for number, image in enumerate(source.images()):
            sample = {"__key__": f"x/{number:08d}", "jpeg": image, "cls": int(source.label[number])}
            writer.write(sample | {"json": {"filename": source.name[number].decode()}})
    names = [f"in1k-train-{i:04d}.tar" for i in range(3)]
    split = {"name": "train", "num_samples": 89, "filenames": names, "shard_lengths": [30, 30, 29]}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    main(["index", str(tmp_path), "--workers", "1"])
    assert "3 shards indexed, 89 images" in capsys.readouterr().out
    index = load_index(expand(tmp_path, "train"), classes=10)
    assert index.label.tolist() == source.label.tolist()
    assert [index.read(i) for i in range(89)] == list(source.images())


def test_bytes_do_not_depend_on_workers(photographs, photograph_shards, tmp_path):
    source = image_folder(photographs)
    prepare_shards(source, tmp_path / "2", "train", shards=5, workers=2)
    assert contents(tmp_path / "2") == contents(photograph_shards[0].parent)
    prepare_shards(source, tmp_path / "seed", "train", shards=5, seed=1)
    one, other = contents(tmp_path / "2"), contents(tmp_path / "seed")
    assert list(one) == list(other)
    assert all(one[name] != other[name] for name in one if name.endswith(".tar"))


def test_checksums_are_those_of_the_shards(photograph_shards):
    directory = photograph_shards[0].parent
    assert (
        not shutil.which("sha256sum")
        or not subprocess.run(
            ["sha256sum", "--strict", "-c", "imagenet1k-train.sha256"], cwd=directory, check=True
        ).returncode
    )
    assert len((directory / "imagenet1k-train.sha256").read_text().splitlines()) == 5


def fail_at(monkeypatch, number: int, error: BaseException) -> None:
    """Writing shard `number` fails when half of its samples are written."""
    write = sharding.write_shard

    def failing(samples, shard, seen):
        def half():
            for count, sample in enumerate(samples):
                if count == 2 and shard.name.endswith(f"-{number:04d}.tar"):
                    raise error
                yield sample

        return write(half(), shard, seen)

    monkeypatch.setattr(sharding, "write_shard", failing)


def test_resumed_shards_are_the_same(tree, tmp_path, monkeypatch):
    source = image_folder(tree)
    whole = prepare_shards(source, tmp_path / "whole", "train", shards=4)
    assert whole.resumed == 0
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        fail_at(patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            prepare_shards(source, stopped, "train", shards=4)
    assert sorted(path.name[-8:-4] for path in stopped.glob("imagenet1k-*.tar")) == ["0000", "0001"]
    assert not list(stopped.glob(".*"))
    for split in ("train", None):
        with pytest.raises(DataError, match="has not written all 4 shards of split 'train'"):
            expand(stopped, split)
    (stopped / "imagenet1k-train-0001.tar.index").unlink()  # as if killed before it
    checksums = stopped / "imagenet1k-train.sha256"
    checksums.write_text(checksums.read_text()[:-30])  # and in the middle of a line
    (stopped / ".imagenet1k-train-0003.0123abcd.tar").write_bytes(b"half a shard")
    before = (stopped / "imagenet1k-train-0000.tar").stat().st_mtime_ns
    written = prepare_shards(source, stopped, "train", shards=4)
    assert written.resumed == 2
    assert written.shards == expand(stopped, "train")
    assert (stopped / "imagenet1k-train-0000.tar").stat().st_mtime_ns == before
    assert contents(stopped) == contents(tmp_path / "whole")
    assert prepare_shards(source, stopped, "train", shards=4).resumed == 4
    assert contents(stopped) == contents(tmp_path / "whole")


def test_killed_and_run_again(photographs, photograph_shards, tmp_path):
    """SIGKILL to the command: no worker outlives it, and the same command finishes the work."""
    command = [sys.executable, "-c", SLOWLY, str(photographs), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    there = len(list((tmp_path / "out").glob("imagenet1k-*.tar")))
    assert 1 <= there < 5
    written = prepare_shards(image_folder(photographs), tmp_path / "out", "train", shards=5)
    assert written.resumed == there
    assert contents(tmp_path / "out") == contents(photograph_shards[0].parent)


SLOWLY = """
import multiprocessing, sys, threading, time
from pathlib import Path
from flatcal_dist.data import image_folder
from flatcal_dist.data.making import sources
from flatcal_dist.data import prepare_shards

def tell():
    while not list(Path(sys.argv[2]).glob("imagenet1k-*.tar")):
        time.sleep(0.01)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)

class Slow(sources.Files):  # leaves time to be killed in the middle of the second shards
    def images(self):
        for image in super().images():
            time.sleep(0.05)
            yield image

if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    source = Slow(**vars(image_folder(Path(sys.argv[1]))))
    prepare_shards(source, Path(sys.argv[2]), "train", shards=5, workers=2)
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"shards": 5}, "shards was 4, is 5"),
        ({"encoding": Encoding(max_edge=64)}, "max_edge was None, is 64"),
        ({"encoding": Encoding(quality=50)}, "quality was None, is 50"),
    ],
)
def test_other_options_are_refused_by_name(tree, tmp_path, change, message):
    source, out = image_folder(tree), tmp_path / "out"
    prepare_shards(source, out, "train", shards=4)
    before = contents(out)
    with pytest.raises(DataError, match=message):
        prepare_shards(source, out, "train", **{"shards": 4} | change)
    assert contents(out) == before


def test_changed_source_is_refused_by_name(tree, tmp_path):
    out = tmp_path / "out"
    prepare_shards(image_folder(tree), out, "train", shards=4)
    image = min(tree.rglob("*.JPEG"))
    data, times = image.read_bytes(), image.stat()
    image.write_bytes(data + b"x")
    with pytest.raises(DataError, match="source size differs; source time differs"):
        prepare_shards(image_folder(tree), out, "train", shards=4)
    image.write_bytes(b"x" * len(data))
    with pytest.raises(DataError, match="otherwise: source time differs"):
        prepare_shards(image_folder(tree), out, "train", shards=4)
    image.write_bytes(data)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare_shards(image_folder(tree), out, "train", shards=4).resumed == 4
    image.rename(image.with_name("n02123045_99.JPEG"))
    with pytest.raises(DataError, match="source key differs; source name differs"):
        prepare_shards(image_folder(tree), out, "train", shards=4)


def test_source_that_changes_or_vanishes_meanwhile(tree, tmp_path):
    source = image_folder(tree)
    image = min(tree.rglob("*.JPEG"))
    data = image.read_bytes()
    image.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{image} has {len(data) - 1} bytes, but had {len(data)}"):
        prepare_shards(source, tmp_path / "out", "train", shards=1)
    image.unlink()
    with pytest.raises(DataError, match=f"{image} cannot be read .No such file"):
        prepare_shards(source, tmp_path / "out", "train", shards=1, workers=2)
    assert not list((tmp_path / "out").glob("imagenet1k-*.tar"))


def test_foreign_swapped_and_concurrent_shards_are_refused(tree, tmp_path):
    source, out = image_folder(tree), tmp_path / "out"
    shards = prepare_shards(source, out, "train", shards=4).shards
    for suffix in ("", ".index"):
        shutil.copy(f"{shards[0]}{suffix}", f"{shards[1]}{suffix}")
    with pytest.raises(DataError, match=r"0001\.tar does not hold the samples that were planned"):
        prepare_shards(source, out, "train", shards=4)
    with (
        plans.locked(out / "imagenet1k-train.plan.json"),
        pytest.raises(DataError, match="Another `flatcal shard` is writing"),
    ):
        prepare_shards(source, out, "train", shards=4)
    (out / "imagenet1k-train.plan.json").unlink()
    with pytest.raises(DataError, match=r"already holds 4 shards .* without a plan"):
        prepare_shards(source, out, "train", shards=4)
    for shard in shards:
        shard.unlink()
    assert prepare_shards(source, out, "train", shards=3).resumed == 0


def test_splits_of_other_classes_are_refused(tree, tmp_path):
    """A class missing in one split would shift the labels behind it, without any error."""
    out = tmp_path / "out"
    prepare_shards(image_folder(tree), out, "train", shards=2)
    fewer = write_photographs(tmp_path / "fewer", classes=2, images_per_class=2, seed=1)
    shutil.rmtree(fewer / "n02123045")
    with pytest.raises(DataError, match=r"has 1 classes.*has 2: 'n02123045' is only in one"):
        prepare_shards(image_folder(fewer), out, "validation", shards=2)
    whole = write_photographs(tmp_path / "whole", classes=2, images_per_class=2, seed=1)
    prepare_shards(image_folder(whole), out, "validation", shards=2)
    assert len(load_index(expand(out, "validation"))) == 5
    assert len(load_index(expand(out, "train"))) == 21


def test_a_split_is_not_hidden_by_another_of_its_name(tree, tmp_path):
    """`_info.json` has one list of shards a split: the first would be lost without a word."""
    source = image_folder(tree)
    first = prepare_shards(source, tmp_path / "a", "train", prefix="first", shards=2)
    for what in ("plan", "list"):
        with pytest.raises(DataError, match=r"already holds .*first"):
            prepare_shards(source, tmp_path / "a", "train", prefix="second", shards=2)
        (tmp_path / "a/first-train.plan.json").unlink(missing_ok=True)
        assert expand(tmp_path / "a", "train") == first.shards, what
    with pytest.raises(DataError, match="2 other shards of split 'train'"):
        write_shards(make_samples(3), tmp_path / "a", "t", split="train", samples_per_shard=3)


def test_prefixes_are_names(tree, tmp_path):
    """Also such as mean something in a pattern; other options are refused under them as well."""
    source = image_folder(tree)
    for prefix in ("a/b", "../a", ".a", ""):
        with pytest.raises(DataError, match="prefix begins the names of files"):
            prepare_shards(source, tmp_path / "a", "train", prefix=prefix)
    prepare_shards(source, tmp_path / "b", "train", prefix="[x]", shards=2)
    other = Encoding(quality=50)
    with pytest.raises(DataError, match="planned otherwise: quality"):
        prepare_shards(source, tmp_path / "b", "train", prefix="[x]", shards=2, encoding=other)
    with pytest.raises(DataError, match="0 or more, not -1"):
        prepare_shards(source, tmp_path / "c", "train", seed=-1)


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(tree, tmp_path, workers):
    """A limit on the size of files fails in the middle of a shard, as a full disk does."""
    source, out = image_folder(tree), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"could not be written \(File too large\).*make room"):
            prepare_shards(source, out, "train", shards=2, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.suffix for path in out.iterdir()} == {".json"}  # only the plan
    prepare_shards(source, out, "train", shards=2)
    assert len(load_index(expand(out, "train"))) == 21


def test_too_little_room_is_said_beforehand(tree, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sharding.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(DataError, match=r"has 0\.0 GB free, but the shards to write need up to"):
        prepare_shards(image_folder(tree), tmp_path / "out", "train", shards=2)
