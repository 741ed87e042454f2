"""Sidecars: the index of one shard, in a file beside it.

`index_shard` reads one tar once and writes `SHARD.tar.index`, which holds a header (`HEADER`) and a
row for each sample (`_rows`). A sidecar is refused when it is loaded if it does not match its
checksum, or if the size of its shard changed after it was indexed.
"""

import struct
import sys
from pathlib import Path

import numpy as np
import xxhash

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.members import BLOCK, LONGEST_NAME
from flatcal_dist.data.shards.regular import check_regular, read_regular
from flatcal_dist.data.shards.samples import LARGEST_MEMBER
from flatcal_dist.data.shards.walk import WARNINGS, Problem, Report, ShardIndex, walk_shard
from flatcal_dist.files import write_atomically

VERSION = 2
MAGIC = b"flatcal "
# MAGIC; version, bytes of the tar, samples, bytes of a key; XXH3 of these and of the rows
HEADER = struct.Struct("<8s4QQ")
LARGEST_SIDECAR = 4 << 30  # bytes; a shard of 1,281,167 images has one of some 60 MB
COLUMNS = {
    "offset": "u8",
    "size": "u4",
    "header": "u4",
    "content": "u4",
    "label": "i4",
}


def sidecar(shard: Path) -> Path:
    """Return the path of the index of `shard`."""
    return shard.with_name(shard.name + ".index")


def _print_warning(problem: Problem) -> None:
    print(f"warning: {problem.text}", file=sys.stderr)


def index_shard(shard: Path, warn: Report = _print_warning) -> int:
    """Write the sidecar of `shard` and return the number of its samples.

    The sidecar appears whole, by rename. `warn` is called for members that are left out. Raises
    DataError for a shard that cannot be read, is damaged, or holds samples that are not whole.
    """
    shard = Path(shard)

    def report(problem: Problem) -> None:
        if problem.kind not in WARNINGS:
            raise DataError(problem.text)
        warn(problem)

    found = walk_shard(shard, report)
    rows = np.empty(len(found), _rows(found.key.dtype.itemsize))
    for name in rows.dtype.names or ():
        rows[name] = getattr(found, name)
    about = (MAGIC, VERSION, found.tar_size, len(found), found.key.dtype.itemsize)
    header = HEADER.pack(*about, _whole_checksum(about, rows.data))
    path = sidecar(shard)
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(header)
        file.write(rows.data)
    return len(found)


def _rows(key_bytes: int) -> np.dtype:
    numbers = [(name, f"<{kind}") for name, kind in COLUMNS.items()]
    return np.dtype([*numbers, ("key", f"S{key_bytes}")])


def _whole_checksum(about: tuple, rows: memoryview) -> int:
    digest = xxhash.xxh3_64(HEADER.pack(*about, 0))
    digest.update(rows)
    return digest.intdigest()


def load_sidecar(shard: Path) -> ShardIndex:
    """Load the index of one shard.

    Raises DataError if the shard or its sidecar is missing or damaged, or if the size of the shard
    changed after it was indexed.
    """
    again = f"Run `flatcal index {shard.parent}`."
    try:
        tar_size = check_regular(shard).st_size
    except FileNotFoundError:
        raise DataError(f"{shard}: no such shard. Check the pattern or the directory.") from None
    except OSError as error:
        raise DataError(f"{shard} cannot be read ({error.strerror or error}).") from error
    try:
        stored = read_regular(sidecar(shard), LARGEST_SIDECAR)
    except FileNotFoundError:
        raise DataError(
            f"{shard} has no index: expected {sidecar(shard).name} beside it. {again}"
        ) from None
    except OSError as error:
        raise DataError(f"{sidecar(shard)} cannot be read ({error}). {again}") from error
    if len(stored) < HEADER.size or not stored.startswith(MAGIC):
        raise DataError(f"{sidecar(shard)} is cut short or no index at all. {again}")
    *about, expected = HEADER.unpack_from(stored)
    _, version, recorded, samples, key_bytes = about
    if version != VERSION:
        raise DataError(
            f"{sidecar(shard)} has format {version}, expected {VERSION}: another version of "
            f"this program wrote it. {again}"
        )
    if _whole_checksum(tuple(about), memoryview(stored)[HEADER.size :]) != expected:
        raise DataError(f"{sidecar(shard)} is damaged (its checksum differs). {again}")
    if tar_size != recorded:
        raise DataError(
            f"{shard} has {tar_size} bytes, but had {recorded} when it was indexed: the index is "
            f"stale, or the shard was not copied whole. {again}"
        )
    expected_size = HEADER.size + samples * (_rows(0).itemsize + key_bytes)
    if not 0 < key_bytes <= LONGEST_NAME or len(stored) != expected_size:
        raise DataError(
            f"{sidecar(shard)} does not hold the {samples:,} samples with keys of {key_bytes:,} "
            f"bytes that it announces. {again}"
        )
    rows = np.frombuffer(stored, _rows(key_bytes), samples, HEADER.size)
    if (wrong := _impossible(rows, tar_size)) is not None:
        raise DataError(f"{sidecar(shard)} describes what no shard holds: {wrong}. {again}")
    return ShardIndex(tar_size=recorded, **{name: rows[name] for name in rows.dtype.names or ()})


def _impossible(rows: np.ndarray, tar_size: int) -> str | None:
    """Return what a sidecar says that no shard can hold, or None.

    Offsets and sizes come from the file, so a read has to stay inside the shard and fit into
    memory.
    """
    if not len(rows):
        return "no samples"
    offset, size = rows["offset"], rows["size"]
    outside = (offset < BLOCK) | (offset > tar_size) | (size > tar_size - offset)
    for name, bad in (
        ("an image outside of the tar", outside),
        ("an empty image", size == 0),
        (f"an image of more than {LARGEST_MEMBER:,} bytes", size > LARGEST_MEMBER),
        ("an empty key", rows["key"] == b""),
    ):
        if bad.any():
            return f"{name}, sample number {int(np.flatnonzero(bad)[0])}"
    try:
        b"\0".join(rows["key"].tolist()).decode()
    except UnicodeDecodeError:
        return "a key that is not UTF-8"
    return None
