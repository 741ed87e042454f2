"""The samples of one shard that is read from front to back."""

import io
import os
import pickle
import tarfile

import pytest

from flatcal_dist.data import (
    DataError,
    load_index,
)
from flatcal_dist.data.shards.tar_stream import read_samples
from tests.support.samples import png


def samples_of(content: bytes, classes: int = 7) -> list[tuple[str, bytes, int]]:
    return list(read_samples(io.BytesIO(content), "http://host/a.tar", classes))


def test_samples_are_those_of_the_index(even):
    for shard in sorted(even.glob("*.tar"))[:2]:
        index = load_index([shard])
        expected = [(index.key(i), index.read(i), int(index.label[i])) for i in range(len(index))]
        assert samples_of(shard.read_bytes()) == expected


def test_a_tar_cut_anywhere_is_an_error(even):
    """At every block's beginning, where tarfile takes the end for the end; and within blocks."""
    whole = (even / "e-train-0001.tar").read_bytes()
    samples = samples_of(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmembers()[-1]
        end = last.offset_data + -(-last.size // 512) * 512
    cuts = [*range(0, end + 1, 512), *range(100, end, 5000), end + 511]
    assert len(cuts) > 40
    for cut in cuts:
        with pytest.raises(DataError, match=r"a.tar cannot be read.*cut short"):
            samples_of(whole[:cut])
    assert samples_of(whole[: end + 512]) == samples, "one block of zeros is an end"


def test_a_damaged_header_is_an_error(even):
    whole = (even / "e-train-0001.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        offsets = [member.offset for member in tar]
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset + 3] ^= 1
        with pytest.raises(DataError, match=r"a.tar cannot be read"):
            samples_of(bytes(damaged))


def test_foreign_shards_that_are_wrong_are_named(tar):
    image, good = png(0), ("b.cls", b"1")
    cases = [
        ([("a.png", image), ("b.png", image), ("a.cls", b"1"), good], "'a' has no label.*adjacent"),
        ([("a.png", image)], "sample 'a' has no label"),
        ([("a.cls", b"1"), ("b.png", image), good], "sample 'a' has no image"),
        ([("a.png", b""), ("a.cls", b"1")], "sample 'a' has an empty image"),
        ([("a.png", image), ("a.jpg", image), ("a.cls", b"1")], "'a' has several images"),
        ([("a.png", image), ("a.cls", b"cat")], "'a' has the label 'cat'"),
        ([("a.png", image), ("a.cls", b"7")], "'a' has the label 7, outside 0..6"),
        ([("a.png", image), ("a.cls", b"-1")], "'a' has the label -1, outside 0..6"),
        ([("a.png", image), ("a.cls", b"1"), ("a.cls", b"2")], "a.cls: duplicate"),
        (
            [*[("a.png", image), ("a.cls", b"1")], *[("b.png", image), good]] * 2,
            "members of sample 'a' are not adjacent",
        ),
        ([("../a.png", image), ("../a.cls", b"1")], "absolute name or one with"),
        ([("/a.png", image), ("/a.cls", b"1")], "absolute name or one with"),
    ]
    for members, message in cases:
        with pytest.raises(DataError, match=message) as error:
            samples_of(tar(*members).read_bytes())
        assert "http://host/a.tar" in str(error.value)


def test_a_compressed_or_joined_tar_is_an_error(tar):
    members = [("a.png", png(0)), ("a.cls", b"1")]
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        samples_of(tar(*members, mode="w:gz").read_bytes())
    with pytest.raises(DataError, match="data follows the end-of-archive mark"):
        samples_of(tar(*members).read_bytes() * 2)


def test_sizes_that_would_not_fit_into_memory_are_refused():
    plain, sparse, pax = tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE
    large = r"'a.png' has [\d,]+ bytes"
    for size, kind, message in (
        (1 << 32, plain, large),
        (1 << 34, plain, large),  # too large for its field: a pax header says so
        (1 << 10, sparse, "'a.png' is no file but a sparse file"),
        (1 << 32, pax, "a header of"),
    ):
        header = tarfile.TarInfo("a.png")
        header.size, header.type = size, kind
        with pytest.raises(DataError, match=message):
            samples_of(header.tobuf())


class _Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def test_nothing_is_unpickled(tar, tmp_path, monkeypatch):
    """Members that webdataset's own decoding would unpickle or hand to torch.load."""
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = pickle.dumps(_Trap())
    names = ["a.pyd", "a.pickle", "a.pkl", "a.pth", "a.cls", "a.png"]
    content = {"a.cls": b"1", "a.png": png(0)}
    shard = tar(*[(name, content.get(name, trap)) for name in names])
    assert samples_of(shard.read_bytes()) == [("a", png(0), 1)]
    assert not (tmp_path / "sprung").exists()
