"""Tars with random damage are read rightly or refused, by every reader."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from flatcal_dist.data import DataError, write_shards
from flatcal_dist.data.making.validation import validate_shards
from tests.data.tar_blocks import (
    END,
    IMAGES,
    Streamed,
    by_index,
    by_stream,
    checked,
    link,
    member,
    pair,
)
from tests.support.samples import make_samples


def _mutated(whole: bytes, generator: random.Random) -> bytes:
    """A tar after one accident or attack: of bytes, blocks, header fields or length."""
    data = bytearray(whole)
    headers = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    at = generator.choice(headers)
    kind = generator.randrange(8)
    if kind == 0:  # bytes anywhere
        for _ in range(generator.randrange(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == 1:  # the end
        del data[generator.randrange(len(data)) :]
    elif kind == 2:  # a block more, less or twice
        block = generator.randrange(len(data) // 512) * 512
        data[block : block + generator.choice([0, 512])] = bytes(
            generator.randrange(256) for _ in range(generator.choice([0, 512]))
        )
    else:  # a header that is right but for a field
        block = data[at : at + 512]
        start, stop = generator.choice(
            [(0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (257, 265),
             (345, 500), (386, 512), (482, 483)]
        )  # fmt: skip
        width = stop - start
        block[start:stop] = generator.choice(
            [
                bytes(generator.randrange(256) for _ in range(width)),
                (b"%o" % generator.randrange(1 << 33)).ljust(width, b"\0")[:width],
                (b"\x80" + generator.randbytes(8)).rjust(width, b"\0")[:width],
                (b"\xff" * width),
                generator.choice([b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"5", b"7", b"V"])
                * width,
                bytes(width),
            ]
        )
        data[at : at + 512] = checked(bytes(block))
    return bytes(data)


def refused_or(read: Callable[[Path], Streamed], path: Path) -> Streamed | None:
    """What a reader returns; None where it refuses the shard by name."""
    try:
        return read(path)
    except DataError as error:
        if str(path) not in str(error):
            raise
        return None


@pytest.mark.parametrize("accidents", [120, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_mutated_tars_are_read_rightly_or_refused(accidents, tmp_path, monkeypatch):
    """What readers return was in the tar, both say the same, and neither hangs.

    Whatever is wrong is a DataError that names the shard. A stream that ends well has the index's
    samples, unless a member passed its checksum with another name or size: then both have that.
    """
    monkeypatch.setattr("flatcal_dist.data.shards.tar_stream.TOLD", 0)
    samples = make_samples(3)
    plain = write_shards(samples, tmp_path / "p", "x", split="x", samples_per_shard=3)[0]
    other = io.BytesIO()
    with tarfile.open(fileobj=other, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(3):
            for suffix, data in (("png", IMAGES[number]), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"{'n' * 120}é{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    wholes = [
        plain.read_bytes(),
        other.getvalue(),
        pair("a", 1) + link("b.png", "a.png") + member("b.cls", b"2") + pair("c", 3) + END,
    ]
    generator = random.Random(0)
    path, good = tmp_path / "t-train-0000.tar", tmp_path / "z-train-0001.tar"
    good.write_bytes(pair("z", 4) + END)
    outcomes = {"read": 0, "refused": 0}
    for number in range(accidents):
        path.write_bytes(_mutated(wholes[number % 3], generator))
        indexed, streamed = refused_or(by_index, path), refused_or(by_stream, path)
        if indexed is not None and all(0 <= label < 100 for _, _, label in indexed):
            assert streamed == indexed, number
        if streamed is not None:
            assert streamed == (indexed or []), number
        if number % 4 == 0:
            result = validate_shards([path, good], decode_images=0)
            assert result.images == len(indexed or []) + 1 or (indexed is None and result.errors)
        outcomes["read" if indexed is not None else "refused"] += 1
    assert min(outcomes.values()) > accidents / 8, outcomes
