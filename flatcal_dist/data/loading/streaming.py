"""Shards that are read from front to back only: over http, from object stores, out of pipes.

For shards on a file system the indexed reader promises more (see loader.py); `Stream.promise`
says what this one does not. Grouping members into samples and shuffling them are webdataset's.
Replaced are its opening of URLs (remote.py), its walk through a tar (tar_stream.py), its cache,
which goes by base names (cache.py), its decoding, which unpickles, and its splitting of shards and
epochs among ranks and workers, which repeats orders and lets ranks run out of step.

An epoch's shards are shuffled by (seed, epoch), for all ranks alike. Then every worker of every
rank gets its part of them, and takes exactly as many samples as its micro-batches need: so all
ranks see the same number of micro-batches, without asking each other.
"""

import hashlib
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Unpack

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.images.decode import MAX_PIXELS, decode
from flatcal_dist.data.images.transforms import Training, stack
from flatcal_dist.data.loading.delivery import Batches, Delivery
from flatcal_dist.data.loading.indexed import Batch
from flatcal_dist.data.loading.substitutes import Replaced
from flatcal_dist.data.order import (
    Position,
    micro_batch_count,
    micro_batches,
    rank_share,
    sample_seed,
    shuffled,
    steps_per_epoch,
)
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.data.shards.members import part
from flatcal_dist.data.shards.remote import RemoteFile, is_remote
from flatcal_dist.data.shards.tar_stream import read_samples
from flatcal_dist.urls import base_name, shown


def streaming_loader(
    stream: Stream,
    *,
    seed: int,
    global_batch_size: int,
    micro_batch_size: int,
    transform: Training,
    channels: int,
    epochs: int,
    max_steps: int | None = None,
    start: Position = Position(),  # noqa: B008 (frozen)
    rank: int = 0,
    world_size: int = 1,
    buffer: int = 2048,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
    **delivery: Unpack[Delivery],
) -> Batches:
    """`loader.training_loader` for a stream: the same batches, but for `Stream.promise`.

    `buffer`: encoded images that a worker holds to shuffle them. `Batch.samples` are hashes of
    shard names and keys. An image that cannot be used is replaced by the next of its micro-batch.
    Raises DataError as there, and for too few shards; iterating raises it for shards that cannot
    be had or are damaged, and for micro-batches without any image that can be used.
    """
    workers = max(delivery.get("workers", 0), 1)
    readers = world_size * workers
    if stream.lengths is None and len(stream.shards) < readers:
        raise DataError(
            f"{len(stream.shards)} shards for {readers} readers ({world_size} ranks, "
            f"{workers} workers each): without counts in an _info.json every one needs a "
            "shard of its own. Lower data.workers, or write more shards."
        )
    images = _Streamed(
        stream=stream,
        channels=channels,
        decoder=decoder,
        max_pixels=max_pixels,
        transform=transform,
        seed=seed,
        buffer=buffer,
        rank=rank,
        world_size=world_size,
        global_batch_size=global_batch_size,
        count=micro_batch_count(global_batch_size, micro_batch_size, world_size),
        steps=steps_per_epoch(len(stream), global_batch_size),
        start=start,
        epochs=epochs,
        max_steps=max_steps,
    )
    return Batches(images, None, **delivery)


class _Piece(NamedTuple):
    """Samples [start, stop) of one shard; `stop` None: all that there are."""

    shard: int
    start: int
    stop: int | None


class _Raw(NamedTuple):
    """One sample as it was stored."""

    shard: int
    key: str
    image: bytes
    label: int


@dataclass(frozen=True)
class _Streamed(IterableDataset[Batch | DataError]):
    """This rank's micro-batches, number by number to one worker after the other.

    That is the order in which DataLoader asks its workers, so micro-batches arrive in theirs.
    """

    stream: Stream
    channels: int
    decoder: str
    max_pixels: int
    transform: Training
    seed: int
    buffer: int
    rank: int
    world_size: int
    global_batch_size: int
    count: int  # micro-batches of a step
    steps: int  # of an epoch
    start: Position
    epochs: int
    max_steps: int | None

    def __post_init__(self) -> None:
        if not 0 <= self.start.step <= self.steps or self.start.epoch < 0:
            raise DataError(
                f"Training cannot start at step {self.start.step} of epoch {self.start.epoch}: an "
                f"epoch of this data has {self.steps} steps. Resume with the data and the "
                "data.global_batch_size that the run began with."
            )

    def _range(self) -> range:
        """Numbers of the micro-batches, counted from the beginning of the run."""
        end = self.epochs * self.steps if self.max_steps is None else self.max_steps
        first = self.start.epoch * self.steps + self.start.step
        return range(first * self.count, end * self.count)

    def __len__(self) -> int:
        return len(self._range())

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._batches(number, workers)
        except DataError as error:  # as in loader.py: DataLoader would bury its message
            yield error

    def _batches(self, number: int, workers: int) -> Iterator[Batch]:
        wanted, per_epoch = self._range(), self.steps * self.count
        own = (wanted.start + number) % workers  # the micro-batches are m with m % workers == own
        sizes = self._sizes(self.rank)
        for epoch in range(wanted.start // per_epoch, -(-wanted.stop // per_epoch)):
            begin = epoch * per_epoch
            samples = self._samples(epoch, own, workers)
            with closing(samples):
                for m in range(begin + (own - begin) % workers, begin + per_epoch, workers):
                    if m >= wanted.stop:
                        return
                    taken = list(itertools.islice(samples, sizes[m % self.count]))
                    if m >= wanted.start:
                        yield self._batch(taken, epoch, m - begin)

    def _batch(self, taken: list[_Raw], epoch: int, m: int) -> Batch:
        step, part = divmod(m, self.count)
        used, images, replaced = [], [], []
        for place, raw in enumerate(taken):
            image, by, reason = self._image_or_another(taken, place)
            if reason:
                replaced.append(Replaced(raw[:2], by[:2], epoch, step, reason))
            used.append(by)
            # A substitute is cut as the image that it stands for would have been.
            images.append(self.transform(image, sample_seed(self.seed, epoch, self._number(raw))))
        return Batch(
            images=stack(images),
            labels=torch.tensor([raw.label for raw in used]),
            samples=torch.tensor([self._number(raw) for raw in used]),
            epoch=epoch,
            step=step,
            last=part == self.count - 1,
            replaced=tuple(replaced),
        )

    def _image_or_another(self, taken: list[_Raw], place: int) -> tuple[torch.Tensor, _Raw, str]:
        """An image, or the next of its micro-batch that is one; which, and why another."""
        reason = ""
        for raw in (*taken[place:], *taken[:place]):
            name = f"{shown(self.stream.shards[raw.shard])}: the image of sample {raw.key!r}"
            try:
                image = decode(raw.image, self.channels, name, self.decoder, self.max_pixels)
                return image, raw, reason
            except BadImage as error:
                reason = reason or error.reason
                last = error
        raise DataError(f"No image of a micro-batch of {len(taken)} can be used; the last: {last}")

    def _number(self, raw: _Raw) -> int:
        """A 63-bit number for a sample, the same wherever its shard lies."""
        text = f"{base_name(self.stream.shards[raw.shard])}/{raw.key}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _samples(self, epoch: int, own: int, workers: int) -> Iterator[_Raw]:
        """What this reader reads in an epoch, in its order; without counts, without end."""
        pieces = self._pieces(epoch, own, workers)
        reader = self.rank * workers + own
        generator = random.Random(sample_seed(self.seed, epoch, reader))
        shuffled_by = shuffle(self.buffer, initial=self.buffer, rng=generator)
        repeated = 0
        try:
            for again in itertools.count():
                samples = (raw for piece in pieces for raw in _read_piece(self.stream, piece))
                for raw in shuffled_by(samples):
                    repeated += again > 0
                    yield raw
        finally:
            if repeated:
                print(
                    f"epoch {epoch}, rank {self.rank}, worker {own}: the shards of this worker "
                    f"held {repeated} images too few, so many came again",
                    file=sys.stderr,
                )

    def _sizes(self, rank: int) -> list[int]:
        """Samples of the micro-batches of one step on a rank."""
        share = rank_share(np.arange(self.global_batch_size), rank, self.world_size)
        return [len(part) for part in micro_batches(share, self.count)]

    def _pieces(self, epoch: int, own: int, workers: int) -> list[_Piece]:
        """What one of this rank's workers reads in an epoch."""
        key = np.array([self.seed, epoch], np.uint64)
        order = shuffled(len(self.stream.shards), np.random.Philox(key=key))
        reader, readers = self.rank * workers + own, self.world_size * workers
        if self.stream.lengths is None:
            return [_Piece(shard, 0, None) for shard in order[reader::readers].tolist()]
        needs = self._needs(epoch, workers)
        end = int(needs[: reader + 1].sum())
        return cut(order, self.stream.lengths, end - int(needs[reader]), end)

    def _needs(self, epoch: int, workers: int) -> np.ndarray:
        """Samples [ranks * workers] that each reader takes in an epoch."""
        per_epoch = self.steps * self.count
        worker = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch) % workers
        needs = []
        for rank in range(self.world_size):
            sizes = np.tile(self._sizes(rank), self.steps)
            needs.append(np.bincount(worker, weights=sizes, minlength=workers))
        return np.concatenate(needs).astype(np.int64)


def cut(order: np.ndarray, lengths: Sequence[int], begin: int, end: int) -> list[_Piece]:
    """Samples [begin, end) of the shards laid end to end in `order`."""
    ends = np.cumsum(np.asarray(lengths, np.int64)[order])
    pieces = []
    for shard, stop in zip(order.tolist(), ends.tolist(), strict=True):
        start = stop - lengths[shard]
        piece = _Piece(shard, max(begin - start, 0), min(end, stop) - start)
        if piece.start < piece.stop:
            pieces.append(piece)
    return pieces


def _read_piece(stream: Stream, piece: _Piece) -> Iterator[_Raw]:
    url, expected = stream.shards[piece.shard], stream.sha256[piece.shard]
    cached = stream.cache is not None and is_remote(url)
    if cached:
        file = stream.cache.open(url, expected)
        expected = expected or stream.cache.recorded(url)
    else:
        file = RemoteFile(url, stream.access)
    length = stream.lengths[piece.shard] if stream.lengths is not None else None
    if expected is not None:
        file = _Hashed(file)
    number = -1
    with closing(file), closing(read_samples(file, shown(url), stream.classes)) as samples:
        for number, (key, image, label) in enumerate(samples):
            if number == length:
                break
            if number >= piece.start:
                yield _Raw(piece.shard, key, image, label)
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
    if expected is not None and file.digest.hexdigest() != expected.lower():
        mend = (
            f"Delete {stream.cache.path(url)}, where it lies since it was downloaded."
            if cached
            else "Put the right shard there, or correct the .sha256 file beside it."
        )
        raise DataError(
            f"{shown(url)} is damaged: its SHA-256 is {file.digest.hexdigest()}, expected "
            f"{expected}. {mend}"
        )


class _Hashed:
    """A file that feeds a digest with all that is read of it."""

    def __init__(self, file: BinaryIO | RemoteFile):
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data

    def part(self, start: int, size: int) -> bytes:
        """Bytes that have been read and hashed before."""
        return part(self.file, start, size)

    def close(self) -> None:
        self.file.close()
