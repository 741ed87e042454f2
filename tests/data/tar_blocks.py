"""Tars that are built block by block, and what each reader makes of them."""

import tarfile
from pathlib import Path

from flatcal_dist.data import index_shard, load_index
from flatcal_dist.data.making.validation import validate_shards
from flatcal_dist.data.shards.tar_stream import read_samples
from tests.support.samples import png

IMAGES = [png(i) for i in range(8)]
Streamed = list[tuple[str, bytes, int]]


def header(name: str, size: int = 0, kind: bytes = b"0", link: str = "", **more: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str, data: bytes, kind: bytes = b"0", link: str = "") -> bytes:
    return header(name, len(data), kind, link) + padded(data)


def pair(key: str, number: int) -> bytes:
    """A sample: its label is its number."""
    return member(f"{key}.png", IMAGES[number]) + member(f"{key}.cls", str(number).encode())


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> bytes:
    return header(name, 0, kind, target)


def pax(records: bytes, kind: bytes = b"x", size: int | None = None) -> bytes:
    return header("pax", len(records) if size is None else size, kind) + padded(records)


def checked(block: bytes) -> bytes:
    """A header block with the checksum that it should have."""
    total = sum(block[:148]) + 8 * 32 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


END = bytes(1024)


def by_index(path: Path) -> Streamed:
    index_shard(path)
    index = load_index([path])
    return [(index.key(i), bytes(index.read(i)), int(index.label[i])) for i in range(len(index))]


def by_stream(path: Path) -> Streamed:
    with path.open("rb") as file:
        return list(read_samples(file, str(path), 100))


def findings(path: Path) -> dict[str, int]:
    found = validate_shards([path], decode_images=None).findings.values()
    return {f.kind: f.count for f in found if f.kind not in ("index missing", "image not JPEG")}
