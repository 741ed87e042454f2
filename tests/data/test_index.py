import functools
import multiprocessing
import os
import pickle
import shutil
import subprocess
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from flatcal_dist.data import DataError, Sample, index_shard, load_index, write_shards
from flatcal_dist.data.errors import BadImage
from flatcal_dist.data.shards.index import ALL_COLUMNS, Index, _open
from flatcal_dist.data.shards.sidecars import sidecar
from flatcal_dist.data.shards.tar_stream import read_samples
from flatcal_dist.data.shards.walk import ShardIndex
from tests.support.samples import make_samples, png

SAMPLE = (("a.png", b"image a"), ("a.cls", b"1"))
OTHER = (("b.png", b"image b"), ("b.cls", b"2"))


def test_read_gives_the_images(index):
    assert len(index) == 50
    assert index.lengths.tolist() == [12, 12, 12, 12, 2]
    assert index.label.tolist() == [i % 7 for i in range(50)]
    assert index.keys() == [f"s{i:03d}" for i in range(50)]
    assert [index.key(i) for i in (0, 11, 12, 49)] == ["s000", "s011", "s012", "s049"]
    for i in np.random.default_rng(0).permutation(50):
        assert index.read(i) == png(i)


def test_index_is_compact_and_pickles(index):
    assert index._memory.numel() / len(index) * 1_281_167 < 64e6
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(30) == png(30)


def _own_memory(index, queue):
    """Of the mappings that hold the columns: their size, and what only this process has of them.

    The kernel may cut one block of memory into several mappings, or join it with its neighbours.
    """
    total = sum(int(getattr(index, name).sum()) for name in ALL_COLUMNS)
    first_byte, found = index._memory.data_ptr(), Counter()
    last_byte = first_byte + index._memory.numel() - 1
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= last_byte and first_byte < end
        elif inside and first in ("Size:", "Private_Dirty:", "Private_Clean:"):
            found[first] += 1024 * int(rest[0])
    queue.put((total, dict(found)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_index(method):
    n = 1_281_167
    generator = np.random.default_rng(0)
    part = ShardIndex(
        tar_size=1,
        **{
            name: generator.integers(0, 2**31, n).astype(kind)
            for name, kind in ALL_COLUMNS.items()
            if name != "shard"
        },
        key=np.zeros(n, "S1"),
    )
    index = Index([Path("x.tar")], [part], "id")
    expected = sum(int(getattr(index, name).sum()) for name in ALL_COLUMNS)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    for _ in range(2):  # and the columns of this process survive being handed over
        worker = context.Process(target=_own_memory, args=(index, queue))
        worker.start()
        total, found = queue.get(timeout=120)
        worker.join()
        assert total == expected == sum(int(getattr(index, name).sum()) for name in ALL_COLUMNS)
        assert 28 * n <= found["Size:"]
        assert found["Private_Dirty:"] + found["Private_Clean:"] < 28 * n / 10
        if method == "spawn":
            break


def test_more_shards_than_descriptors(index, monkeypatch):
    before = len(list(Path("/proc/self/fd").iterdir()))
    small = functools.lru_cache(maxsize=2)(_open.__wrapped__)
    monkeypatch.setattr("flatcal_dist.data.shards.index._open", small)
    for i in range(0, 50, 3):
        assert index.read(i) == png(i)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_strangers_tars(tar, form):
    """Folders, other extensions, upper case, files that webdataset skips, long names."""
    long = "n" * 150
    shard = tar(
        ("README", b"no dot"),
        ("__about__/shard.json", b"{}"),
        ("./d/a.CLS", b" 5\n"),
        ("./d/a.seg.png", b"a mask, not the image"),
        ("./d/a.JPEG", b"image a"),
        (f"{long}.webp", b"image n"),
        (f"{long}.cls", b"-1"),
        format=form,
    )
    assert index_shard(shard) == 2
    index = load_index([shard])
    assert index.label.tolist() == [5, -1]
    assert [index.read(0), index.read(1)] == [b"image a", b"image n"]
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert index.keys() == [sample["__key__"] for sample in theirs] == ["./d/a", long]


@pytest.mark.parametrize("kind", ["megabytes", "name"])
def test_what_no_shard_should_hold_is_refused_in_words(tmp_path, kind):
    """A member that would fill the memory, and a name that is no text."""
    shard = tmp_path / "t.tar"
    member = tarfile.TarInfo("a.png" if kind == "megabytes" else "\udcff.png")
    member.size = (5 << 30) if kind == "megabytes" else 0
    with shard.open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))
        file.seek(member.size, os.SEEK_CUR)  # a hole
        file.write(bytes(1024))
    message = {"megabytes": r"'a.png' has 5,368,709,120 bytes", "name": r"udcff.png' is not UTF-8"}
    with pytest.raises(DataError, match=message[kind]):
        index_shard(shard)
    with shard.open("rb") as file, pytest.raises(DataError):
        list(read_samples(file, "t.tar", 7))


def test_gnu_tar_is_read(tmp_path):
    if shutil.which("tar") is None:
        pytest.skip("no tar here")
    for name, data in (*SAMPLE, *OTHER):
        (tmp_path / name).write_bytes(data)
    command = ["tar", "--format=gnu", "--sort=name", "-cf", "g.tar", "a.cls", "a.png"]
    subprocess.run([*command, "b.cls", "b.png"], cwd=tmp_path, check=True)
    shard = tmp_path / "g.tar"
    assert index_shard(shard) == 2
    assert load_index([shard]).read(1) == b"image b"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((SAMPLE[0], *OTHER, SAMPLE[1]), "'a' are not adjacent"),
        ((*SAMPLE, *OTHER, *SAMPLE), r"a\.png occurs twice"),
        ((*SAMPLE, SAMPLE[0]), r"a\.png occurs twice"),
        ((*OTHER, SAMPLE[1]), "'a' has no image.*only .'cls'"),
        ((*OTHER, SAMPLE[0]), "'a' has no label.*only .'png'"),
        ((*SAMPLE, ("a.jpg", b"x")), "'a' has several images.*a.png.*a.jpg"),
        ((SAMPLE[0], ("a.cls", b"cat")), "label of sample 'a' is 'cat'"),
        ((SAMPLE[0], ("a.cls", b"1.0")), r"label of sample 'a' is '1\.0'"),
        ((SAMPLE[0], ("a.cls", b"1_0")), "label of sample 'a' is '1_0'"),
        ((SAMPLE[0], ("a.cls", b"")), "label of sample 'a' is ''"),
        ((SAMPLE[0], ("a.cls", b"9" * 12)), "label of sample 'a' is"),
        ((("a.png", b""), SAMPLE[1]), "'a.png' is empty"),
        ((*SAMPLE, ("/b.png", b"x")), "'/b.png' has an absolute name"),
        ((*SAMPLE, ("x/../b.png", b"x")), r"'x/\.\./b.png' has an absolute name or one with"),
        ((), "holds no samples"),
        ((("README", b"x"),), "holds no samples"),
    ],
)
def test_refused_tars(tar, members, message):
    shard = tar(*members)
    with pytest.raises(DataError, match=message) as error:
        index_shard(shard)
    assert str(shard) in str(error.value)
    assert not sidecar(shard).exists()


def test_every_truncation_is_refused(tar):
    shard = tar(*SAMPLE, *OTHER)
    whole = shard.read_bytes()
    end = 4 * 1024  # four members of a header and a block each, then zeros
    assert not whole[end:].strip(b"\0")
    for length in (0, 100, *range(512, end + 1, 256), end + 511):
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t\.tar"):
            index_shard(shard)
    shard.write_bytes(whole[: end + 1024])
    assert index_shard(shard) == 2


def test_damaged_header_joined_and_compressed_tars_are_refused(tar, tmp_path):
    shard = tar(*SAMPLE, *OTHER)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2048] + b"x" * 512 + whole[2560:])
    with pytest.raises(DataError, match="end-of-archive mark at byte 2048"):
        index_shard(shard)
    shard.write_bytes(whole + whole)
    with pytest.raises(DataError, match="data follows the end-of-archive"):
        index_shard(shard)
    with pytest.raises(DataError, match="uncompressed tar"):
        index_shard(tar(*SAMPLE, mode="w:gz"))
    with pytest.raises(DataError, match="no such shard"):
        index_shard(tmp_path / "none.tar")


def test_load_refusals(tar):
    shard, other = tar(*SAMPLE, *OTHER), tar(*OTHER, name="u.tar")
    with pytest.raises(DataError, match=r"t\.tar has no index.*`flatcal index "):
        load_index([shard])
    index_shard(shard)
    index_shard(other)
    with pytest.raises(DataError, match=r"t\.tar: sample 'b' has the label 2, outside 0\.\.1"):
        load_index([shard], classes=2)
    assert len(load_index([shard], classes=3)) == 2
    with pytest.raises(DataError, match=r"key 'b' occurs in \S+t\.tar and again in \S+u\.tar"):
        load_index([shard, other])
    with pytest.raises(DataError, match="No shards"):
        load_index([])
    with shard.open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(DataError, match=r"index is stale.*`flatcal index "):
        load_index([shard])
    sidecar(other).write_bytes(sidecar(other).read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cut short.*`flatcal index "):
        load_index([other])
    other.unlink()
    with pytest.raises(DataError, match=r"u\.tar: no such shard"):
        load_index([other])


def test_sidecar_of_another_format_is_refused(tar):
    shard = tar(*SAMPLE)
    index_shard(shard)
    other = bytearray(sidecar(shard).read_bytes())
    other[8] = 99
    sidecar(shard).write_bytes(other)
    with pytest.raises(DataError, match="has format 99, expected 2"):
        load_index([shard])
    sidecar(shard).write_bytes(b"a\tb\n" * 100)
    with pytest.raises(DataError, match="no index at all"):
        load_index([shard])


def test_every_flipped_byte_of_a_sidecar_is_noticed(tar):
    shard = tar(*SAMPLE, *OTHER)
    index_shard(shard)
    path = sidecar(shard)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"t\.tar.*`flatcal index "):
            load_index([shard])
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"t\.tar.*`flatcal index "):
            load_index([shard])


def test_every_flipped_byte_of_an_image_is_noticed(tar):
    shard = tar(*SAMPLE, *OTHER)
    index_shard(shard)
    index = load_index([shard])
    whole = shard.read_bytes()
    start = int(index.offset[1])
    assert whole[start : start + 7] == b"image b"
    for place in range(start, start + 7):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(BadImage, match="not those that were indexed"):
            index.read(1)
        assert index.read(0) == b"image a"


def test_announcing_changes_nothing(index):
    index.announce(range(50))
    assert [index.read(i) for i in (0, 49)] == [png(0), png(49)]


def test_swapped_shards_are_noticed_at_the_read(tmp_path):
    one, two = (
        write_shards(
            [Sample(f"{name}{i}", b"same size", "png", i) for i in range(4)],
            tmp_path,
            name,
            split=name,
            samples_per_shard=4,
        )[0]
        for name in "pq"
    )
    index = load_index([one, two])
    assert index.read(1) == b"same size"
    os.rename(one, tmp_path / "x")  # noqa: PTH104
    two.rename(one)
    (tmp_path / "x").rename(two)
    assert len(load_index([one, two])) == 8  # the sizes agree, so loading cannot notice
    _open.cache_clear()
    with pytest.raises(DataError, match=r"p-0000\.tar.*'p1' found another member, 'q1\.png'"):
        index.read(1)
    two.unlink()
    _open.cache_clear()
    with pytest.raises(DataError, match=r"q-0000\.tar.*failed: .*No such file"):
        index.read(5)


def test_replaced_shard_is_reopened(tmp_path):
    """Shard and index are exchanged while the old shard is still open here."""
    old, new = (
        write_shards(make_samples(4, name), tmp_path / name, "x", split="x", samples_per_shard=4)[0]
        for name in "on"
    )
    load_index([old]).read(0)
    for source, target in ((new, old), (sidecar(new), sidecar(old))):
        source.replace(target)
    index = load_index([old])
    assert index.key(0) == "n000"
    assert index.read(0) == png(0)


def test_identity_follows_contents_not_place(tmp_path):
    def identity(name: str, samples: list[Sample]) -> str:
        directory = tmp_path / name
        paths = write_shards(samples, directory, "x", split="train", samples_per_shard=4)
        return load_index(paths).identity

    samples = make_samples(6)
    one = identity("one", samples)
    assert one == identity("two", samples)
    relabelled = [*samples[:5], Sample("s005", samples[5].image, "png", 6)]
    renamed = [*samples[:5], Sample("s999", samples[5].image, "png", samples[5].label)]
    assert len({one, identity("three", relabelled), identity("four", renamed)}) == 3


def test_header_checksum_is_of_the_header_before_the_image(tar):
    shard = tar(*SAMPLE)
    index_shard(shard)
    index = load_index([shard])
    with tarfile.open(shard) as file:
        member = file.getmember("a.png")
    start = member.offset_data - 512
    assert int(index.header[0]) == zlib.crc32(shard.read_bytes()[start : start + 512])
