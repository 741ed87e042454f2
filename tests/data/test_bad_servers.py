"""Servers that never end, and files beside shards that say what cannot be: refused in time."""

import itertools
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash

from flatcal_dist.data import DataError, expand, load_index, write_shards
from flatcal_dist.data.making.validation import validate_shards
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.cache import ShardCache
from flatcal_dist.data.shards.listing import open_stream
from flatcal_dist.data.shards.remote import RemoteFile, read_small
from flatcal_dist.data.shards.sidecars import HEADER, sidecar
from flatcal_dist.data.shards.tar_stream import read_samples
from tests.support.samples import make_samples
from tests.support.web import serving

HASTY = Access(stall_timeout=0.5, retries=1, backoff=0.01)
HASTIER = Access(stall_timeout=0.2, retries=1, backoff=0.01)  # where nothing is to come


@contextmanager
def answering(*parts: bytes, then: bytes = b"", pause: float = 0.0) -> Iterator[str]:
    """A server that sends `parts`, then `then` again and again, whatever it is asked; its URL."""
    closing = threading.Event()
    server = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(4096)
                for part in itertools.chain(parts, itertools.repeat(then) if then else ()):
                    if closing.wait(pause):
                        return
                    connection.sendall(part)
            except OSError:
                pass  # the client has gone

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
    finally:
        closing.set()
        server.shutdown(socket.SHUT_RDWR)
        server.close()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SERVERS = {
    "a status byte by byte": ((b"H",), b"T", 0.05),
    "header lines without end": ((OK,), b"X-A: b\r\n", 0.05),
    "a header line without end": ((OK, b"X-A: "), b"b", 0.05),
    "100 continue without end": ((), b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "a redirect to itself": ((b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n",),
                             b"", 0.0),
    "the length of a chunk byte by byte": ((CHUNKED,), b"0", 0.05),
    "a chunk's extension without end": ((CHUNKED, b"5;a="), b"b", 0.05),
    "a body byte by byte": ((OK + b"\r\n",), b"a", 0.05),
    "silence": ((), b"x", 60),
    "no HTTP": ((b"SSH-2.0-OpenSSH_9.2\r\n",), b"", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_that_never_ends_is_given_up(kind):
    """Each attempt lasts about as long as `stall_timeout` says, whatever comes meanwhile."""
    parts, then, pause = SERVERS[kind]
    began = time.monotonic()
    named = pytest.raises(DataError, match=r"127\.0\.0\.1")
    with answering(*parts, then=then, pause=pause) as url, named:
        read_small(f"{url}/a.tar", HASTIER)
    assert time.monotonic() - began < 30


def test_numbers_that_no_server_means():
    """A length of 5,000 digits is none; a body ends where it was announced to."""
    digits = OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nabc"
    with answering(digits) as url:
        assert read_small(f"{url}/a", HASTY).startswith(b"abc")
    with answering(OK + b"Content-Length: 3\r\n\r\nabcdef") as url:
        assert read_small(f"{url}/a", HASTY) == b"abc"
    more = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 3-5/6\r\n\r\ndefghijkl"
    with answering(more) as url, RemoteFile(f"{url}/a", HASTY) as file:
        file.position = 3
        assert b"".join(iter(file.read, b"")) == b"def"
    late = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: " + b"9" * 5000 + b"\r\n\r\n"
    with answering(late) as url, pytest.raises(DataError, match="gave up at byte 0"):
        read_small(f"{url}/a", HASTY)
    large = pytest.raises(DataError, match="more than 1,000 bytes")
    with answering(OK + b"\r\n", then=bytes(1 << 16)) as url, large:
        read_small(f"{url}/a", HASTY, limit=1000)


@pytest.mark.parametrize("target", ["http://[bad/", "file:///etc/passwd", "http://h:99999/", "/a"])
def test_redirections_that_lead_nowhere(target, capfd):
    """Other attempts would not mend them; and the address that is asked for is named."""
    there = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nConnection: close\r\nLocation: "
    named = pytest.raises(
        DataError, match=r"127\.0\.0\.1:\d+/a: this address, or one that the serv"
    )
    with answering(there + target.encode() + b"?sig=SECRET\r\n\r\n") as url, named as error:
        read_small(f"{url}/a", HASTY)
    assert "SECRET" not in str(error.value) + capfd.readouterr().err


def test_a_length_that_is_said_once_holds():
    """A server that goes on in the middle, and does not say again how long all of it is."""
    parts = iter([b"200 OK\r\nContent-Length: 6\r\n\r\nabc", b"206 OK\r\nContent-Range: bytes 3-4/*"
                  b"\r\n\r\nde", b"206 OK\r\nContent-Range: bytes 5-5/*\r\n\r\nf"])  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for part in parts:
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 " + part)

        threading.Thread(target=serve, daemon=True).start()
        patient = Access(stall_timeout=2, retries=2, backoff=0.01)
        url = f"HTTP://127.0.0.1:{server.getsockname()[1]}/a"  # a scheme may be written large
        assert read_small(url, patient) == b"abcdef"


def test_zeros_without_end_after_a_shard(tmp_path):
    """A server that does not say how long a shard is, and goes on after it."""
    shard = write_shards(make_samples(3), tmp_path, "x", split="x", samples_per_shard=3)[0]
    zeros = pytest.raises(DataError, match="bytes of zeros follow the end-of-archive mark")
    with answering(OK + b"\r\n" + shard.read_bytes(), then=bytes(1 << 16)) as url, zeros:
        list(read_samples(RemoteFile(f"{url}/x-0000.tar", HASTY), "x-0000.tar", 9))


def test_a_shard_larger_than_the_disk_is_not_begun(tmp_path):
    large = OK + b"Content-Length: 999999999999999\r\n\r\n"
    refused = pytest.raises(DataError, match=r"999,999,999,999,999 bytes, but \S+ has [\d,]+ free")
    with answering(large, then=bytes(512)) as url, refused:
        ShardCache(tmp_path / "cache", HASTY).open(f"{url}/a.tar")


# Files beside shards

ABSURD = [
    b"", b"[]", b"{}", b"null", b"3", b"\xff\xfe", b"{" * 100_000, b"[" * 100_000,
    b'{"splits": []}', b'{"splits": {"train": []}}', b'{"splits": {"train": {}}}',
    b'{"splits": {"train": {"filenames": "a.tar", "shard_lengths": [1]}}}',
    b'{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": 5}}}',
    b'{"splits": {"train": {"filenames": ["a.tar"], "shard_lengths": [1, 2]}}}',
    b'{"splits": {"train": {"filenames": [5], "shard_lengths": [1]}}}',
]  # fmt: skip
LENGTHS = [-1, 1.5, 1e300, True, None, "10", [3], {}, 10**9, 10**30, float("nan"), float("inf")]
NAMES = ["../a.tar", "/etc/a.tar", "", "a\nb.tar", "http://evil/a.tar", "b/../../a.tar", 7, None]


def described(name: object, length: object) -> bytes:
    about = {"name": "train", "filenames": [name], "shard_lengths": [length]}
    return json.dumps({"splits": {"train": about}}).encode()


def test_absurd_info_is_refused_by_name(tmp_path):
    shard = write_shards(make_samples(3), tmp_path, "x", split="train", samples_per_shard=3)[0]
    content = [*ABSURD, *[described(shard.name, length) for length in LENGTHS]]
    content += [described(name, 3) for name in NAMES]
    with serving(tmp_path) as web:
        for number, text in enumerate(content):
            (tmp_path / "_info.json").write_bytes(text)
            with pytest.raises(DataError, match=r"_info\.json does not have the form"):
                open_stream(f"{web.url}/", "train", 9, HASTY)
            with pytest.raises(DataError, match=r"_info\.json does not have the form"):
                open_stream(f"{web.url}/x-0000.tar", "train", 9, HASTY)
            found = validate_shards([shard], decode_images=0).findings
            assert "_info.json unreadable" in found, text[:80]
            if number >= len(ABSURD):
                with pytest.raises(DataError, match=r"_info\.json does not have the form"):
                    expand(tmp_path, "train")
        (tmp_path / "_info.json").write_bytes(described(shard.name, 3))
        assert len(open_stream(f"{web.url}/", "train", 9, HASTY)) == 3


def test_mutated_info_is_read_or_refused():
    from flatcal_dist.data.shards.info import parse_info

    whole = json.dumps(
        {"splits": {"train": {"filenames": [f"x-{i}.tar" for i in range(9)],
                              "shard_lengths": [12] * 9, "num_samples": 108}}}
    ).encode()  # fmt: skip
    generator = random.Random(0)
    read = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(data))
            data[at : at + generator.randrange(3)] = generator.choice(
                [
                    b"9",
                    b"-",
                    b"]",
                    b"}",
                    b"e999",
                    b'"',
                    b"null",
                    b"..",
                    b"/",
                    generator.randbytes(2),
                ]
            )
        try:
            for split in parse_info(bytes(data), "I", "Mend it.").values():
                assert all(0 <= n <= 10**8 for n in split.lengths or [])
                assert not any(".." in name.split("/") for name in split.names)
                read += 1
        except DataError as error:
            assert str(error).startswith("I does not have the form")  # noqa: PT017
    assert read > 20


def forged(shard: Path, change: Callable[[list, bytearray], None]) -> None:
    """Rewrite a sidecar by `change` (of its numbers and rows), with a checksum that is right."""
    stored = sidecar(shard).read_bytes()
    magic, version, size, samples, key_bytes, _ = HEADER.unpack_from(stored)
    numbers, rows = [size, samples, key_bytes], bytearray(stored[HEADER.size :])
    change(numbers, rows)
    about = (magic, version, *numbers)
    digest = xxhash.xxh3_64(HEADER.pack(*about, 0))
    digest.update(rows)
    sidecar(shard).write_bytes(HEADER.pack(*about, digest.intdigest()) + rows)


def put(form: str, at: int, value: object) -> Callable[[list, bytearray], None]:
    return lambda _, rows: struct.pack_into(form, rows, at, value)


def number(place: int, value: int) -> Callable[[list, bytearray], None]:
    return lambda numbers, _: numbers.__setitem__(place, value)


# A row: offset u8, size u4, header u4, content u4, label i4, key.
FORGED = {
    "fewer samples than rows": (number(1, 2), "does not hold the 2 samples"),
    "more samples than rows": (number(1, 4), "does not hold the 4 samples"),
    "samples without end": (number(1, 2**64 - 1), "does not hold the 18,446,"),
    "no samples": (lambda n, rows: (n.__setitem__(1, 0), rows.clear()), "no samples"),
    "keys of no bytes": (number(2, 0), "with keys of 0 bytes"),
    "keys of gigabytes": (number(2, 2**40), "with keys of 1,099,511,627,776 bytes"),
    "keys of other bytes": (number(2, 5), "with keys of 5 bytes"),
    "an offset before the first header": (put("<Q", 0, 100), "an image outside of the tar"),
    "an offset after the end": (put("<Q", 0, 2**63), "an image outside of the tar"),
    "an image longer than the tar": (put("<I", 8, 2**31), "an image outside of the tar"),
    "an empty image": (put("<I", 8, 0), "an empty image, sample number 0"),
    "a key that is no text": (put("<B", 24, 0xFF), "a key that is not UTF-8"),
    "an empty key": (put("<I", 24, 0), "an empty key, sample number 0"),
    "a label below zero": (put("<i", 20, -1), "the label -1, outside"),
    "a label too large": (put("<i", 20, 2**31 - 1), "the label 2147483647, outside"),
    "another size of the tar": (number(0, 1), "had 1 when it was indexed"),
}


@pytest.mark.parametrize("what", FORGED)
def test_an_index_with_a_right_checksum_and_wrong_contents(tmp_path, what):
    change, message = FORGED[what]
    shard = write_shards(make_samples(3), tmp_path, "x", split="x", samples_per_shard=3)[0]
    forged(shard, change)
    with pytest.raises(DataError, match=message) as error:
        load_index([shard], classes=7)
    assert shard.name in str(error.value)
    assert validate_shards([shard], decode_images=0).findings["index stale"].count == 1


def test_forged_indexes_read_nothing_but_images(tmp_path):
    """300 sidecars with a right checksum and random contents: refused, or every read is checked."""
    shard = write_shards(make_samples(3), tmp_path, "x", split="x", samples_per_shard=3)[0]
    whole, generator = sidecar(shard).read_bytes(), random.Random(0)
    images = {bytes(load_index([shard]).read(i)) for i in range(3)}
    refused = 0
    for _ in range(300):
        sidecar(shard).write_bytes(whole)

        def change(numbers: list, rows: bytearray) -> None:
            if generator.random() < 0.2:
                numbers[generator.randrange(3)] = generator.choice([0, 1, 3, 4, 2**16, 2**63])
            for _ in range(generator.randrange(4)):
                at = generator.randrange(len(rows))
                rows[at : at + 2] = generator.randbytes(len(rows[at : at + 2]))

        forged(shard, change)
        try:
            index = load_index([shard], classes=7)
            assert {bytes(index.read(i)) for i in range(len(index))} <= images
            index.keys()
        except DataError as error:
            refused += 1
            assert "x-0000.tar" in str(error)  # noqa: PT017
    assert refused > 100
