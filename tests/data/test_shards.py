import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from timm.data.readers.reader_wds import ReaderWds

from flatcal_dist.data import DataError, Sample, expand, load_index, write_shards
from tests.support.samples import make_samples, png


def write(directory: Path, samples: list[Sample], prefix: str = "x", split: str = "train"):
    return write_shards(samples, directory, prefix, split=split, samples_per_shard=4)


def test_bytes_are_reproducible_and_whole(tmp_path):
    one, two = (write(tmp_path / name, make_samples(10)) for name in ("one", "two"))
    assert [path.name for path in one] == ["x-0000.tar", "x-0001.tar", "x-0002.tar"]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 3 + 3 + 2  # shards, indexes, _info.json, checksums: no temporary is left
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with tarfile.open(two[0]) as file:
        members = file.getmembers()
    assert [m.name for m in members[:3]] == ["s000.cls", "s000.json", "s000.png"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_json_member_tells_label_file_and_more(tmp_path):
    sample = Sample("a", png(0), "png", 3, "dir/a.png", {"clean_label": 5})
    (shard,) = write(tmp_path, [sample])
    with tarfile.open(shard) as file:
        about = json.load(file.extractfile("a.json"))
    assert about == {"label": 3, "filename": "dir/a.png", "clean_label": 5}


def test_webdataset_reads_the_same_samples(shards, index):
    stream = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)
    samples = list(stream)
    assert [sample["__key__"] for sample in samples] == index.keys()
    assert [int(sample["cls"]) for sample in samples] == index.label.tolist()
    assert [sample["png"] for sample in samples] == [index.read(i) for i in range(len(index))]


def test_timm_reads_the_same_samples(shards, index):
    reader = ReaderWds(str(shards[0].parent), split="train")
    assert reader.num_samples == len(index)
    read = list(reader)
    assert [label for _, label in read] == index.label.tolist()
    for i, (image, _) in enumerate(read):
        assert image.tobytes() == _pixels(i)
    timm_keys = ReaderWds(str(shards[0].parent), split="train").filenames()
    assert len(timm_keys) == len(index)


def _pixels(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8).tobytes()


def test_splits_share_a_directory_and_info(tmp_path):
    train = write(tmp_path, make_samples(9), "x-train", "train")
    validation = write(tmp_path, make_samples(5, "v"), "x-validation", "validation")
    info = json.loads((tmp_path / "_info.json").read_text())["splits"]
    assert info["train"]["shard_lengths"] == [4, 4, 1]
    assert info["validation"] == {
        "name": "validation",
        "num_samples": 5,
        "filenames": ["x-validation-0000.tar", "x-validation-0001.tar"],
        "shard_lengths": [4, 1],
    }
    assert expand(tmp_path, "train") == train
    assert expand([str(tmp_path)], "validation") == validation
    assert expand(tmp_path) == train + validation
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        expand(tmp_path, "test")
    (tmp_path / "_info.json").unlink()
    assert expand(tmp_path, "train") == train
    assert expand(tmp_path, "test") == train + validation
    assert ReaderWds(str(tmp_path), split="x-train-{0000..0002}.tar|9").num_samples == 9


def test_info_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path, make_samples(5))
    (tmp_path / "x-0001.tar").unlink()
    with pytest.raises(DataError, match=r"lists x-0001\.tar"):
        expand(tmp_path, "train")
    (tmp_path / "_info.json").write_text("[]")
    with pytest.raises(DataError, match="does not have the form"):
        expand(tmp_path, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "n01.foo"}, "cannot be a key"),
        ({"key": "a/b"}, "cannot be a key"),
        ({"key": ""}, "cannot be a key"),
        ({"key": "k" * 91}, "too long"),
        ({"key": "s000"}, "occurs twice"),
        ({"extension": "tiff"}, "extension 'tiff'"),
    ],
)
def test_bad_samples_are_refused_and_leave_no_shard(tmp_path, change, message):
    bad = Sample(**{"key": "b", "image": png(0), "extension": "png", "label": 0} | change)
    with pytest.raises(DataError, match=message):
        write(tmp_path, [*make_samples(1), bad])
    assert list(tmp_path.iterdir()) == []


def test_longest_key_fits_a_tar(tmp_path):
    shards = write(tmp_path, [Sample("k" * 90, png(0), "webp", 0)])
    assert load_index(shards).keys() == ["k" * 90]


def test_no_samples_and_old_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match="no samples to write"):
        write(tmp_path, [])
    write(tmp_path, make_samples(1))
    with pytest.raises(DataError, match="already holds 2 files"):
        write(tmp_path, make_samples(1))


def test_expand_patterns(tmp_path):
    paths = [tmp_path / f"a-{i:04d}.tar" for i in range(12)]
    for path in paths:
        path.touch()
    (tmp_path / "a-0000.tar.index").touch()
    (tmp_path / ".a-0000.tar").touch()
    assert expand(tmp_path) == expand(str(tmp_path)) == paths
    assert expand(f"{tmp_path}/a-*.tar") == expand(f"{tmp_path}/a-*") == paths
    assert expand(f"{tmp_path}/a-{{0002..0010}}.tar") == paths[2:11]
    assert expand(f"{tmp_path}/{{a-0001,a-0000}}.tar") == [paths[1], paths[0]]
    assert expand(f"{tmp_path}/{{a-001*,a-0000}}.tar") == [*paths[10:], paths[0]]
    assert expand([paths[3], str(paths[1]), f"{tmp_path}/a-000[123].tar"]) == [
        paths[3],
        paths[1],
        paths[2],
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a-{0000..0002}.tar", r"a-0001\.tar: no such shard"),
        ("b-*.tar", r"b-\*\.tar' matches no"),
        ("missing.tar", r"missing\.tar: no such shard"),
        ("empty", "holds no .tar"),
        ("a-{0000..", "unbalanced braces|no such shard"),
    ],
)
def test_expand_refuses(tmp_path, pattern, message):
    (tmp_path / "a-0000.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        expand(f"{tmp_path}/{pattern}")
    with pytest.raises(DataError, match="No shards were named"):
        expand([])
