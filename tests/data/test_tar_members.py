"""Tars of strangers and attackers, by every reader: links, litter, damage; none hides or hangs."""

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from flatcal_dist.cli import main
from flatcal_dist.data import DataError, index_shard, load_index
from flatcal_dist.data.loading.pieces import Piece, read_piece
from flatcal_dist.data.making.archives import ilsvrc_archive
from flatcal_dist.data.making.validation import validate_shards
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.listing import open_stream
from flatcal_dist.data.shards.sidecars import sidecar
from flatcal_dist.data.shards.tar_stream import read_samples
from tests.data.tar_blocks import (
    END,
    IMAGES,
    by_index,
    by_stream,
    checked,
    findings,
    header,
    link,
    member,
    pair,
    pax,
)
from tests.support.web import serving


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., Path]:
    def write(*parts: bytes, name: str = "t-train-0000.tar", end: bytes = END) -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join(parts) + end)
        return path

    return write


# Links


@pytest.mark.parametrize("prefix", ["", "./", "n01/"])
def test_a_hard_link_is_the_file_that_it_names(shard, prefix):
    path = shard(
        pair(f"{prefix}a", 1),
        pair(f"{prefix}b", 2),
        link(f"{prefix}c.png", f"{prefix}a.png"),
        member(f"{prefix}c.cls", b"3"),
        link(f"{prefix}d.png", f"{prefix}c.png"),  # of a link
        link(f"{prefix}d.cls", f"{prefix}b.cls"),
    )
    expected = [
        (f"{prefix}{key}", IMAGES[number], label)
        for key, number, label in (("a", 1, 1), ("b", 2, 2), ("c", 1, 3), ("d", 1, 2))
    ]
    assert by_index(path) == by_stream(path) == expected
    assert findings(path) == {"image twice, other label": 2, "class without images": 1}


def test_hard_links_of_gnu_tar(tmp_path):
    """Equal files that were made one by hard links: tar packs the second name as a link."""
    (tmp_path / "s").mkdir()
    for number in range(4):
        (tmp_path / f"s/{number:03d}.png").write_bytes(IMAGES[number])
        (tmp_path / f"s/{number:03d}.cls").write_text(str(number))
    for suffix in ("png", "cls"):
        (tmp_path / f"s/003.{suffix}").unlink()
        (tmp_path / f"s/003.{suffix}").hardlink_to(tmp_path / f"s/000.{suffix}")
    subprocess.run(["tar", "--sort=name", "-cf", "../x.tar", "."], cwd=tmp_path / "s", check=True)
    expected = [(f"./{n:03d}", IMAGES[n % 3], n % 3) for n in range(4)]
    assert by_index(tmp_path / "x.tar") == by_stream(tmp_path / "x.tar") == expected


@pytest.mark.parametrize("ranges", [True, False])
def test_hard_links_over_http(shard, tmp_path, ranges):
    """The bytes have passed already: they are asked for again, and only they where that goes."""
    shard(pair("a", 1), *[member(f"a.{i}.json", bytes(40_000)) for i in range(30)], pair("b", 2),
          link("c.png", "a.png"), member("c.cls", b"5"))  # fmt: skip
    (tmp_path / "_info.json").write_text(
        '{"splits": {"train": {"filenames": ["t-train-0000.tar"], "shard_lengths": [3]}}}'
    )
    expected = [("a", IMAGES[1], 1), ("b", IMAGES[2], 2), ("c", IMAGES[1], 5)]
    with serving(tmp_path, ranges=ranges) as web:
        stream = open_stream(f"{web.url}/", "train", 9, Access(backoff=0.01))
        assert [raw[1:] for raw in read_piece(stream, Piece(0, 0, None))] == expected
        assert ("t-train-0000.tar", 512) in web.requests


ODD = {
    "symbolic link": (link("b.png", "a.png", tarfile.SYMTYPE), "symbolic link to 'a.png'.*-h"),
    "hard link to nothing": (link("b.png", "z.png"), "hard link to 'z.png'.*hard-dereference"),
    "hard link to what comes later": (link("b.png", "c.png"), "hard link to 'c.png'"),
    "FIFO": (header("b.png", 0, tarfile.FIFOTYPE), "'b.png' is no file but a FIFO"),
    "character device": (header("b.png", 0, tarfile.CHRTYPE), "but a character device"),
    "block device": (header("b.png", 0, tarfile.BLKTYPE), "but a block device"),
    "unknown type": (member("b.png", b"x", b"Z"), "but a member of type 'Z'"),
    "volume label": (header("b.png", 0, b"V"), "but a volume label"),
    "another volume": (member("b.png", b"x", b"M"), "but a part of a file that began in"),
    "sparse, of pax": (
        pax(b"22 GNU.sparse.major=1\n") + member("b.png", b"x"), "but a sparse file"
    ),
    "sparse, of GNU": (header("b.png", 0, tarfile.GNUTYPE_SPARSE), "but a sparse file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_regular_file_is_a_finding_with_name_and_kind(shard, kind):
    odd, message = ODD[kind]
    path = shard(pair("a", 1), odd, pair("c", 2))
    with pytest.raises(DataError, match=message) as error:
        index_shard(path)
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match=message):
        by_stream(path)
    result = validate_shards([path])
    assert result.findings["not a regular file"].count == 1
    assert result.findings["not a regular file"].examples[0]["key"] == "b.png"
    assert result.images == 2, "the others are read"


def test_links_in_the_official_archives(shard, tmp_path):
    inner = b"".join([member("a.JPEG", IMAGES[0]), link("b.JPEG", "a.JPEG"), END])
    path = shard(member("n01440764.tar", inner))
    source = ilsvrc_archive(path, "train")
    assert list(source.images()) == [IMAGES[0]] * 2
    for odd in (link("b.JPEG", "z", tarfile.SYMTYPE), header("b.JPEG", 0, tarfile.FIFOTYPE)):
        path = shard(member("n01440764.tar", member("a.JPEG", IMAGES[0]) + odd + END))
        with pytest.raises(DataError, match=r"class archive at byte 512, holds 'b.JPEG', a"):
            ilsvrc_archive(path, "train")


# Litter


def test_litter_of_operating_systems_is_left_out_counted_and_named(shard, capfd):
    path = shard(
        member("./._a.png", b"\0\5\x16\7"),
        member(".DS_Store", b"x"),
        member("__MACOSX/._a.png", b"x"),
        member("d/._a.png", b"x"),
        pair("a", 1),
        pair("d/b", 2),
        member("d/Thumbs.db", b"x"),
        member("desktop.ini", b"x"),
        member("README", b"x"),
        member("d/.hidden.png", b"x"),
        header("d/", 0, tarfile.DIRTYPE),
    )
    expected = [("a", IMAGES[1], 1), ("d/b", IMAGES[2], 2)]
    assert by_index(path) == expected
    told = capfd.readouterr().err
    assert "6 files that macOS or Windows adds to folders were left out ('./._a.png', '.DS" in told
    assert "2 members were left out ('README', 'd/.hidden.png'), because hidden files" in told
    assert by_stream(path) == expected
    assert "6 files that macOS or Windows adds" in capfd.readouterr().err
    assert findings(path) == {"system files": 6, "members not used": 2, "class without images": 1}
    main(["index", str(path)])
    said = capfd.readouterr()
    assert "1 shards indexed, 2 images" in said.out
    assert f"warning: {path}: 6 files that macOS" in said.err


# Damage

LONG = b"27 path=" + b"p" * 18 + b"\n"
BOMBS = {
    "a size below zero": header("a.png", -512),
    "a size below zero, of a pax header": pax(b"13 size=-512\n") + header("a.png"),
    "a size that is no number": pax(b"12 size=abc\n") + header("a.png"),
    "a size of 87 bits": header("a.png", (1 << 87) - 1),
    "a pax header of gigabytes": header("pax", 3 << 30, b"x"),
    "a long name of gigabytes": header("././@LongLink", 3 << 30, b"L"),
    "a long name of minus one": header("././@LongLink", -1, b"L"),
    "3,000 pax headers": pax(LONG) * 3000,
    "3,000 long names": member("././@LongLink", b"n.png\0", b"L") * 3000,
    "3,000 global headers": pax(b"14 comment=ab\n", b"g") * 3000,
    "a pax header without end": pax(b"9999999 path=a.png\n"),
    "a pax header of length zero": pax(b"0 path=a.png\n"),
    "a pax header without numbers": pax(b"path=a.png\n"),
    "a global header with a name": pax(b"14 path=a.png\n", b"g") + member("b.png", b"x"),
    "a global header with a size": pax(b"9 size=8\n", b"g") + member("b.png", b"x"),
    "a sparse map of letters": pax(b"26 GNU.sparse.map=a,b,c,d\n") + header("a.png"),
    "a sparse size of letters": pax(b"22 GNU.sparse.size=a\n") + header("a.png"),
    "a sparse map that says it is long": (
        pax(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n") + member("a.png", b"9" * 512)
    ),
    "a sparse map without end": (
        checked(header("a.png", 0, b"S")[:482] + b"\1" + bytes(29))
        + (bytes(504) + b"\1" * 8) * 3000
    ),
    "a name of 5,000 letters": member("././@LongLink", b"n" * 5000 + b".png", b"L")
    + member("n", b"x"),
    "a name with a zero": pax(b"16 path=a\0b.png\n") + member("n", b"x"),
    "nothing but ones": b"\xff" * 4096,
    "a header cut short": header("a.png")[:100],
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_shard_that_is_a_bomb_does_not_hide_the_others(shard, bomb, tmp_path, capsys):
    """In the walk, index, validate, the stream, and as an ILSVRC archive; in memory and time."""
    good = shard(pair("z", 1), name="z-train-0001.tar")
    path = shard(BOMBS[bomb])
    before = resident()
    for read in (by_stream, lambda p: ilsvrc_archive(p, "train"), index_shard):
        with pytest.raises(DataError, match=r"t-train-0000\.tar"):
            read(path)
    result = validate_shards([path, good])
    assert result.images == 1
    assert result.errors >= 1
    assert not sidecar(path).exists()
    with pytest.raises(SystemExit, match=r"1 shards cannot be indexed:\n\S+t-train-0000.tar"):
        main(["index", str(tmp_path), "--workers", "1"])
    assert "1 shards indexed, 1 image" in capsys.readouterr().out
    assert by_index(good) == [("z", IMAGES[1], 1)]
    assert resident() < before + (200 << 20)


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError


@pytest.mark.parametrize("what", ["fifo", "directory", "device", "loop", "gone"])
def test_what_is_no_file_at_all(shard, tmp_path, what):
    """A FIFO would wait for a writer for ever."""
    good = shard(pair("z", 1), name="z-train-0001.tar")
    path = tmp_path / "t-train-0000.tar"
    make = {
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "gone": lambda: None,
    }
    make[what]()
    for read in (index_shard, lambda p: load_index([p]), lambda p: ilsvrc_archive(p, "train")):
        with pytest.raises(DataError, match=r"t-train-0000\.tar"):
            within(10, partial(read, path))
    result = within(10, lambda: validate_shards([path, good]))
    assert (result.images, result.errors) == (1, 1)
    index_shard(good)
    sidecar(good).unlink()
    if what == "fifo":
        os.mkfifo(sidecar(good))
        with pytest.raises(DataError, match=r"z-train-0001.tar.index is a FIFO"):
            within(10, lambda: load_index([good]))


def within(seconds: float, work: Callable[[], object]) -> object:
    """The result of `work`, or its error; a test that hangs is a test that failed."""
    outcome: list = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"nothing came in {seconds} s"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def test_zeros_without_end_after_the_tar(shard):
    """A few MiB are what tar pads with; a stream of them would never end."""
    path = shard(pair("a", 1), end=bytes(1 << 20))
    assert len(by_index(path)) == len(by_stream(path)) == 1

    class Endless(io.RawIOBase):
        def __init__(self) -> None:
            self.left = pair("a", 1)

        def read(self, size: int = -1) -> bytes:
            data, self.left = self.left[:size], self.left[size:]
            return data or bytes(size)

    with pytest.raises(DataError, match="bytes of zeros follow the end-of-archive mark"):
        within(20, lambda: list(read_samples(Endless(), "a.tar", 9)))
    with path.open("ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="bytes of zeros follow the end-of-archive mark"):
        within(20, lambda: index_shard(path))
