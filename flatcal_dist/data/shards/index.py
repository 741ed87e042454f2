"""Random access to the samples of WebDataset tars.

`load_index` joins the sidecars of many shards (sidecars.py) into an `Index`, whose `read` is one
`pread` for each image. The tars stay untouched, so any reader of WebDataset shards still reads
them.

Damage is noticed before training uses it:

- Another shard of the same size is refused at the first read, because the tar header in front of
  every image must have the recorded checksum.
- Flipped bits in an image are a `BadImage`, because the image must have its recorded checksum, too.
  Most decoders would turn such bits into other pixels without an error.
"""

import errno
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.shards.members import BLOCK
from flatcal_dist.data.shards.sidecars import COLUMNS, load_sidecar
from flatcal_dist.data.shards.walk import (
    ShardIndex,
    checksum,
)

ALL_COLUMNS = {**COLUMNS, "shard": "i4"}
READERS = 16  # threads that load sidecars; on network disks most of the time is waiting
DESCRIPTORS = 512  # open shards per process; the usual limit for all files is 1024


class Index:
    """All samples of some shards, numbered 0..n-1 in the order of the shards and of their tars.

    Attributes:
        shards: The paths of the shards.
        lengths: The number of samples of each shard, int64 [shards].
        identity: The SHA-256 over shard names, sizes, labels and keys, which names the data in
            reports.

    The columns are attributes, too. They take 28 bytes for each sample (36 MB for ImageNet) in one
    block of memory, which worker processes share, however they are started. Keys stay in the
    sidecars until they are asked for. Reading is safe in several threads and after a fork.
    """

    offset: np.ndarray  # [n] uint64: first byte of the image in its shard
    size: np.ndarray  # [n] uint32: bytes of the image
    header: np.ndarray  # [n] uint32: CRC-32 of the tar header of the image
    content: np.ndarray  # [n] uint32: `checksum` of the bytes of the image
    label: np.ndarray  # [n] int32
    shard: np.ndarray  # [n] int32: the number of the shard

    def __init__(self, shards: Sequence[Path], parts: Sequence[ShardIndex], identity: str) -> None:
        self.shards = tuple(shards)
        self.identity = identity
        self.lengths = np.array([len(part) for part in parts], np.int64)
        self._kept: list[np.ndarray] | None = None  # of each shard, where this is a part
        self._make_columns()
        for name in COLUMNS:
            np.concatenate([getattr(part, name) for part in parts], out=getattr(self, name))
        self.shard[:] = np.repeat(np.arange(len(shards)), self.lengths)

    def part(self, chosen: np.ndarray) -> "Index":
        """Return some of the samples as an index of their own, numbered from 0.

        Args:
            chosen: Which samples, bool [n]. This index must not be a part itself.
        """
        if self._kept is not None:
            raise ValueError("a part of an index has no parts")
        part = copy(self)
        part.lengths = np.bincount(self.shard[chosen], minlength=len(self.shards)).astype(np.int64)
        part._kept = np.split(chosen, np.cumsum(self.lengths)[:-1])
        part.identity = hashlib.sha256(self.identity.encode() + chosen.tobytes()).hexdigest()
        part._make_columns()
        for name in ALL_COLUMNS:
            getattr(part, name)[:] = getattr(self, name)[chosen]
        return part

    def _make_columns(self) -> None:
        row = sum(np.dtype(kind).itemsize for kind in ALL_COLUMNS.values())
        self._memory = torch.empty(row * int(self.lengths.sum()), dtype=torch.uint8)
        self._lay_columns()

    def _lay_columns(self) -> None:
        memory, samples, start = self._memory.numpy(), int(self.lengths.sum()), 0
        for name, kind in ALL_COLUMNS.items():
            end = start + np.dtype(kind).itemsize * samples
            setattr(self, name, memory[start:end].view(kind))
            start = end

    def __getstate__(self) -> dict:
        # Multiprocessing passes tensors on as shared memory. It would move this one there in place
        # and leave the columns pointing at nothing. So it is moved first, into a new block.
        if not self._memory.is_shared():
            self._memory = torch.empty_like(self._memory).share_memory_().copy_(self._memory)
            self._lay_columns()
        return {name: value for name, value in vars(self).items() if name not in ALL_COLUMNS}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._lay_columns()

    def __len__(self) -> int:
        return len(self.offset)

    def read(self, sample: int) -> memoryview:
        """Return the encoded image of one sample.

        Raises DataError if the shard cannot be read or is not the one that was indexed. Raises
        BadImage if only the bytes of the image differ from those that were indexed.
        """
        shard = self.shards[self.shard[sample]]
        size, start = int(self.size[sample]), int(self.offset[sample]) - BLOCK
        expected = self.header[sample]
        error: OSError | None = None
        for attempt in range(2):
            try:
                data = memoryview(os.pread(_open(shard).number, BLOCK + size, start))
            except OSError as failure:
                error, data = failure, memoryview(b"")
            if len(data) == BLOCK + size and zlib.crc32(data[:BLOCK]) == expected:
                break
            if attempt == 0:
                _open.cache_clear()  # the shard may have been replaced, or its mount gone stale
        else:
            raise self._read_error(sample, shard, bytes(data), error)
        if checksum(data[BLOCK:]) != self.content[sample]:
            raise BadImage(
                self.name(sample),
                f"cannot be used: its {size} bytes are not those that were indexed (their checksum "
                "differs); they were damaged on the disk or on the way",
            )
        return data[BLOCK:]

    def announce(self, samples: Iterable[int]) -> None:
        """Tell the system that these images will be read soon, so that it fetches them together."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        for sample in samples:
            try:
                shard = _open(self.shards[self.shard[sample]]).number
            except OSError:
                continue  # reading it will say what is wrong
            start, size = int(self.offset[sample]) - BLOCK, int(self.size[sample]) + BLOCK
            os.posix_fadvise(shard, start, size, os.POSIX_FADV_WILLNEED)

    def name(self, sample: int) -> str:
        """Return "SHARD: the image of sample 'KEY'", for messages."""
        return f"{self.shards[self.shard[sample]]}: the image of sample {self.key(sample)!r}"

    def _read_error(
        self, sample: int, shard: Path, data: bytes, error: OSError | None
    ) -> DataError:
        try:
            name = repr(self.key(sample))
        except (DataError, IndexError):  # the sidecar was changed, too
            name = f"number {sample}"
        where = f"{shard}: reading the image of sample {name}"
        if error is not None and error.errno == errno.EMFILE:
            return DataError(f"{where} failed: {error}. Raise the limit with `ulimit -n 4096`.")
        if error is not None:
            return DataError(f"{where} failed: {error}. Check that the shard is there and whole.")
        return DataError(
            f"{where} found another member, {_header_name(data)}, at byte "
            f"{int(self.offset[sample])}: the shard was changed or swapped after it was indexed. "
            f"Put the right shard back, or run `flatcal index {shard}`."
        )

    def key(self, sample: int) -> str:
        """Return the key of one sample."""
        number = int(self.shard[sample])
        return str(self._keys(number)[sample - int(self.lengths[:number].sum())], "utf-8")

    def keys(self) -> list[str]:
        """Return the keys of all samples from the sidecars; ImageNet's take some 100 MB."""
        return [str(k, "utf-8") for s in range(len(self.shards)) for k in self._keys(s)]

    def _keys(self, number: int) -> np.ndarray:
        keys = load_sidecar(self.shards[number]).key
        return keys if self._kept is None else keys[self._kept[number]]


def _header_name(data: bytes) -> str:
    try:
        member = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "replace")
    except tarfile.HeaderError:
        return "or none at all"
    return f"{member.name!r} of {member.size} bytes"


class _Descriptor:
    """An open file, which is closed when neither the cache nor a reader uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=DESCRIPTORS)
def _open(path: Path) -> _Descriptor:
    return _Descriptor(path)


def load_index(shards: Sequence[Path], classes: int | None = None) -> Index:
    """Join the sidecars of `shards`, in the order given.

    `classes` is the number of classes; None leaves labels unchecked. Raises DataError if a shard or
    its sidecar is missing or damaged, if the size of a shard changed after it was indexed, if a
    label lies outside [0, classes), or if two samples have the same key.
    """
    shards = tuple(Path(shard) for shard in shards)
    if not shards:
        raise DataError("No shards were given. Name a directory or pattern that holds some.")
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(load_sidecar, shards))
    digest = hashlib.sha256()
    for shard, part in zip(shards, parts, strict=True):
        if classes is not None:
            _check_labels(shard, part, classes)
        digest.update(f"{shard.name}\0{part.tar_size}\0{len(part)}\0".encode())
        digest.update(part.label.astype("<i4").tobytes())
        digest.update(b"\0".join(part.key.tolist()))
    _check_keys(shards, parts)
    return Index(shards, parts, digest.hexdigest())


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
    """Raise DataError if a key occurs twice.

    Hashes are sorted first, which takes a tenth of the time of sorting keys.
    """
    hashes = np.sort(np.concatenate([_hashes(part.key) for part in parts]))
    if (hashes[1:] != hashes[:-1]).all():
        return
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


def _hashes(keys: np.ndarray) -> np.ndarray:
    """Return a 64-bit number [n] for each of the keys [n] S.

    The number of a key does not depend on the width in which the keys are stored.
    """
    width = -(-keys.dtype.itemsize // 8)
    words = keys.astype(f"S{8 * width}").view("<u8").reshape(len(keys), width)
    hashes = np.zeros(len(keys), np.uint64)
    for word, factor in zip(words.T, np.random.Philox(key=0).random_raw(width), strict=True):
        mixed = (word ^ (word >> np.uint64(29))) * (factor | np.uint64(1))
        hashes += mixed ^ (mixed >> np.uint64(32))
    return hashes
