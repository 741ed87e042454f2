"""The pieces of shards that one reader of a stream reads, and the samples in them."""

import hashlib
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import BinaryIO, NamedTuple

import numpy as np

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.access import is_remote
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.data.shards.members import part
from flatcal_dist.data.shards.remote import RemoteFile
from flatcal_dist.data.shards.tar_stream import read_samples
from flatcal_dist.urls import shown


class Piece(NamedTuple):
    """The samples [start, stop) of one shard. `stop` is None for all samples of the shard."""

    shard: int
    start: int
    stop: int | None


class StoredSample(NamedTuple):
    """One sample as it was stored."""

    shard: int
    key: str
    image: bytes
    label: int


def cut(order: np.ndarray, lengths: Sequence[int], begin: int, end: int) -> list[Piece]:
    """Return the samples [begin, end) of shards that are laid end to end.

    Args:
        order: The numbers of the shards, in the order in which they are laid.
        lengths: The number of samples of each shard, by its number.
        begin: The first sample.
        end: The sample after the last one.
    """
    ends = np.cumsum(np.asarray(lengths, np.int64)[order])
    pieces = []
    for shard, last in zip(order.tolist(), ends.tolist(), strict=True):
        first = last - lengths[shard]
        start, stop = max(begin - first, 0), min(end, last) - first
        if start < stop:
            pieces.append(Piece(shard, start, stop))
    return pieces


def read_piece(stream: Stream, piece: Piece) -> Generator[StoredSample, None, None]:
    """Yield the samples of a piece in the order of the tar.

    A piece that reaches the end of its shard checks the whole shard: its number of samples, and its
    SHA-256 where that is known. Raises DataError for a shard that cannot be read, is damaged, or
    holds another number of samples than its `_info.json` says.
    """
    url = stream.shards[piece.shard]
    source, expected = _opened(stream, piece.shard)
    length = stream.lengths[piece.shard] if stream.lengths is not None else None
    hashed = _Hashed(source) if expected is not None else None
    file = hashed or source
    number = -1
    with closing(file), closing(read_samples(file, shown(url), stream.classes)) as samples:
        for number, (key, image, label) in enumerate(samples):
            if number == length:
                break
            if number >= piece.start:
                yield StoredSample(piece.shard, key, image, label)
            # The last sample of a shard is followed by a look at the shard's end.
            if number + 1 == piece.stop != length:
                return
    if number < 0:
        raise DataError(f"{shown(url)} holds no samples. Write it again, or leave it out.")
    if length is not None and number + 1 != length:
        more = "more than" if number == length else f"only {number + 1} of"
        raise DataError(
            f"{shown(url)} holds {more} the {length} samples that its _info.json counts. Put the "
            "right one there, or correct it."
        )
    if hashed is not None and expected is not None:
        found = hashed.digest.hexdigest()
        if found != expected.lower():
            raise DataError(
                f"{shown(url)} is damaged: its SHA-256 is {found}, expected {expected}. "
                f"{_mend(stream, url)}"
            )


def _opened(stream: Stream, shard: int) -> tuple[BinaryIO | RemoteFile, str | None]:
    """Open a shard. Return it with its SHA-256, where that is known."""
    url, expected = stream.shards[shard], stream.sha256[shard]
    if stream.cache is None or not is_remote(url):
        return RemoteFile(url, stream.access), expected
    file = stream.cache.open(url, expected)
    return file, expected or stream.cache.recorded(url)


def _mend(stream: Stream, url: str) -> str:
    if stream.cache is None or not is_remote(url):
        return "Put the right shard there, or correct the .sha256 file beside it."
    return f"Delete {stream.cache.path(url)}, where it lies since it was downloaded."


class _Hashed:
    """A file that feeds a digest with all that is read from it."""

    def __init__(self, file: BinaryIO | RemoteFile) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data

    def part(self, start: int, size: int) -> bytes:
        """Return bytes that have been read and hashed before."""
        return part(self.file, start, size)

    def close(self) -> None:
        self.file.close()
