"""A sidecar index per shard: WebDataset tars become random-access arrays of samples.

`index_shard` walks the headers of one tar once and writes `SHARD.tar.index.npz` beside it (plain
uncompressed arrays, no pickle). `load_index` joins the sidecars of many shards into an `Index`,
whose `read` is one `pread` per image. The tar itself stays untouched, so anything that reads
WebDataset shards still reads it.

What is guarded: a shard whose size changed since it was indexed is refused when the index is
loaded; another shard of the same size in its place is refused at the read, because the tar header
in front of every image must have the recorded checksum. Flipped bits inside an image are left to
the decoder to notice.
"""

import hashlib
import os
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.walk import BLOCK, ShardIndex, walk_shard

VERSION = 1
DESCRIPTORS = 512  # open shards per process; the usual limit for all files is 1024


def sidecar(shard: Path) -> Path:
    """Where the index of `shard` lies."""
    return shard.with_name(shard.name + ".index.npz")


def index_shard(shard: Path) -> int:
    """Write the sidecar of `shard` (whole, by rename) and return its number of samples.

    Raises DataError where `walk_shard` does.
    """
    shard = Path(shard)
    found = walk_shard(shard)
    path = sidecar(shard)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            np.savez(file, version=np.int64(VERSION), **vars(found))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(found)


@dataclass(frozen=True)
class Index:
    """All samples of some shards, numbered 0..n-1 in shard and tar order.

    24 bytes a sample (31 MB for ImageNet), numpy only: cheap to fork and to pickle. Keys stay in
    the sidecars until asked for. Reading is safe from several threads and after a fork.
    """

    shards: tuple[Path, ...]
    lengths: np.ndarray  # [shards] i8: samples of each shard
    shard: np.ndarray  # [n] i4: number of the sample's shard
    offset: np.ndarray  # [n] u8
    size: np.ndarray  # [n] u4
    header: np.ndarray  # [n] u4
    label: np.ndarray  # [n] i4
    identity: str  # SHA-256 over shard names, sizes, labels and keys: names the data in reports

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, sample: int) -> bytes:
        """The encoded image of one sample.

        Raises DataError if the shard cannot be read or is not the one that was indexed.
        """
        shard = self.shards[self.shard[sample]]
        size, start = int(self.size[sample]), int(self.offset[sample]) - BLOCK
        expected = self.header[sample]
        error: OSError | None = None
        for attempt in range(2):
            try:
                data = os.pread(_open(shard).number, BLOCK + size, start)
            except OSError as failure:
                error, data = failure, b""
            if len(data) == BLOCK + size and zlib.crc32(memoryview(data)[:BLOCK]) == expected:
                return data[BLOCK:]
            if attempt == 0:
                _open.cache_clear()  # the shard may have been replaced, or its mount gone stale
        raise self._read_error(sample, shard, data, error)

    def _read_error(self, sample: int, shard: Path, data: bytes, error: OSError | None):
        try:
            name = repr(self.key(sample))
        except (DataError, IndexError):  # the sidecar was changed, too
            name = f"number {sample}"
        where = f"{shard}: reading the image of sample {name}"
        if error is not None:
            return DataError(f"{where} failed: {error}. Check that the shard is there and whole.")
        return DataError(
            f"{where} found another member, {_header_name(data)}, at byte "
            f"{int(self.offset[sample])}: the shard was changed or swapped after it was indexed. "
            f"Put the right shard back, or run `flatcal index {shard}`."
        )

    def key(self, sample: int) -> str:
        """The key of one sample."""
        number = int(self.shard[sample])
        return str(self._keys(number)[sample - int(self.lengths[:number].sum())], "utf-8")

    def keys(self) -> list[str]:
        """The keys of all samples, read from the sidecars: some 100 MB for ImageNet."""
        return [str(k, "utf-8") for s in range(len(self.shards)) for k in self._keys(s)]

    def _keys(self, number: int) -> np.ndarray:
        return _load_sidecar(self.shards[number]).key


def _header_name(data: bytes) -> str:
    try:
        member = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "replace")
    except tarfile.HeaderError:
        return "or none at all"
    return f"{member.name!r} of {member.size} bytes"


class _Descriptor:
    """An open file that closes itself when the cache and the last reader have let it go."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=DESCRIPTORS)
def _open(path: Path) -> _Descriptor:
    return _Descriptor(path)


def load_index(shards: Sequence[Path], classes: int | None = None) -> Index:
    """Join the sidecars of `shards`, in the order given.

    Raises DataError if a shard or its sidecar is missing, if a shard is not the size it had when
    it was indexed, if a label lies outside [0, classes) (not checked for None), or if two
    samples have the same key.
    """
    shards = tuple(Path(shard) for shard in shards)
    if not shards:
        raise DataError("No shards were given. Name a directory or pattern that holds some.")
    parts = [_load_sidecar(shard) for shard in shards]
    digest = hashlib.sha256()
    for shard, part in zip(shards, parts, strict=True):
        if classes is not None:
            _check_labels(shard, part, classes)
        digest.update(f"{shard.name}\0{part.tar_size}\0{len(part)}\0".encode())
        digest.update(part.label.astype("<i4").tobytes())
        digest.update(b"\0".join(part.key.tolist()))
    _check_keys(shards, parts)
    lengths = np.array([len(part) for part in parts], np.int64)
    return Index(
        shards=shards,
        lengths=lengths,
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), lengths),
        offset=np.concatenate([part.offset for part in parts]),
        size=np.concatenate([part.size for part in parts]),
        header=np.concatenate([part.header for part in parts]),
        label=np.concatenate([part.label for part in parts]),
        identity=digest.hexdigest(),
    )


def _load_sidecar(shard: Path) -> ShardIndex:
    again = f"Run `flatcal index {shard.parent}`."
    try:
        tar_size = shard.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{shard}: no such shard. Check the pattern or the directory.") from None
    try:
        with np.load(sidecar(shard), allow_pickle=False) as file:
            stored = dict(file)
    except FileNotFoundError:
        raise DataError(
            f"{shard} has no index: expected {sidecar(shard).name} beside it. {again}"
        ) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{sidecar(shard)} cannot be read ({error}). {again}") from error
    version = int(stored.pop("version", -1))
    if version != VERSION:
        raise DataError(
            f"{sidecar(shard)} has format {version}, expected {VERSION}: another version of "
            f"this program wrote it. {again}"
        )
    recorded = int(stored.pop("tar_size"))
    if tar_size != recorded:
        raise DataError(
            f"{shard} has {tar_size} bytes, but had {recorded} when it was indexed: the index is "
            f"stale, or the shard was not copied whole. {again}"
        )
    return ShardIndex(tar_size=recorded, **stored)


def _check_labels(shard: Path, part: ShardIndex, classes: int) -> None:
    wrong = np.flatnonzero((part.label < 0) | (part.label >= classes))
    if len(wrong):
        first = wrong[0]
        raise DataError(
            f"{shard}: sample {str(part.key[first], 'utf-8')!r} has the label "
            f"{part.label[first]}, outside 0..{classes - 1} ({len(wrong)} such samples in this "
            "shard). Set model.num_classes to the data's number of classes, or write the shard "
            "again with labels that count from 0."
        )


def _check_keys(shards: tuple[Path, ...], parts: list[ShardIndex]) -> None:
    keys = np.concatenate([part.key for part in parts])
    by_name = np.argsort(keys, kind="stable")
    ordered = keys[by_name]
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        ends = np.cumsum([len(part) for part in parts])
        first, second = np.searchsorted(ends, by_name[twice[0] : twice[0] + 2], side="right")
        raise DataError(
            f"The key {str(ordered[twice[0]], 'utf-8')!r} occurs in {shards[first]} and again in "
            f"{shards[second]} ({len(twice)} such keys): records are kept by key, so every sample "
            "needs its own. Take one of the shards out, or write them with unique keys."
        )
