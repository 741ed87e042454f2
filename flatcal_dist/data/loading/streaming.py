"""Shards that are read from front to back only: over HTTP, from object stores, out of pipes.

For shards on a file system, the indexed reader (indexed.py) promises more. `Stream.promise` says
what this reader does not promise. webdataset groups members into samples and shuffles them. These
parts of webdataset are replaced:

- its opening of URLs (remote.py) and its walk through a tar (tar_stream.py);
- its cache, which knows shards by their base names only (cache.py);
- its decoding, which unpickles;
- its splitting of shards and epochs among ranks and workers, which repeats orders and lets ranks
  take different numbers of steps.

The shards of an epoch are shuffled by (seed, epoch), in the same way on all ranks. Then every
worker of every rank gets its part of them. It takes exactly as many samples as its micro-batches
need, so all ranks see the same number of micro-batches without asking each other.
"""

import hashlib
import itertools
import random
import sys
from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.images.decode import Decoding, decode
from flatcal_dist.data.images.transforms import Training, stack
from flatcal_dist.data.loading.delivery import Batches
from flatcal_dist.data.loading.indexed import Batch
from flatcal_dist.data.loading.pieces import Piece, StoredSample, cut, read_piece
from flatcal_dist.data.loading.plan import BatchPlan, Workers
from flatcal_dist.data.loading.substitutes import Replaced
from flatcal_dist.data.order import (
    micro_batches,
    rank_share,
    sample_seed,
    shuffled,
    steps_per_epoch,
)
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.urls import base_name, shown


def streaming_loader(
    stream: Stream,
    plan: BatchPlan,
    transform: Training,
    decoding: Decoding,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
    *,
    buffer: int = 2048,
) -> Batches:
    """Return the training batches of one rank from a stream, as `Batch` objects.

    `Stream.promise` says how they differ from the batches of `training_loader`. `Batch.samples` are
    hashes of shard names and keys. An image that cannot be used is replaced by the next image of
    its micro-batch. Iterating raises DataError for shards that cannot be read or are damaged, and
    for micro-batches without any image that can be used.

    Args:
        stream: The shards.
        plan: How the samples are cut into batches. A stream knows neither windows nor classes, so
            `window` is not used, and `same_class` is refused.
        transform: The augmentation.
        decoding: How images are decoded.
        workers: The processes that load.
        buffer: How many encoded images a worker holds to shuffle them.

    Raises:
        DataError: The plan does not fit the data, as for `training_loader`, or there are fewer
            shards than readers and their samples are not counted.
    """
    readers = plan.world_size * workers.readers
    if stream.lengths is None and len(stream.shards) < readers:
        raise DataError(
            f"{len(stream.shards)} shards for {readers} readers ({plan.world_size} ranks, "
            f"{workers.readers} workers each): without counts in an _info.json every one needs a "
            "shard of its own. Lower data.workers, or write more shards."
        )
    if plan.same_class:
        raise DataError(
            "A stream cannot pair images of one class, because it does not know their labels "
            "beforehand. Set data.reader=indexed."
        )
    return Batches(_Streamed(stream, plan, transform, decoding, buffer), None, workers)


class _Streamed(IterableDataset[Batch | DataError]):
    """The micro-batches of one rank; micro-batch m comes from worker m % workers.

    DataLoader asks its workers in this order, so micro-batches arrive in the order of their
    numbers.
    """

    def __init__(
        self,
        stream: Stream,
        plan: BatchPlan,
        transform: Training,
        decoding: Decoding,
        buffer: int,
    ) -> None:
        self.stream, self.plan, self.transform = stream, plan, transform
        self.decoding, self.buffer = decoding, buffer
        self.count = plan.micro_batches  # of a step
        self.steps = steps_per_epoch(len(stream), plan.global_batch_size)
        self.left = plan.steps_left(self.steps)

    def _range(self) -> range:
        """Return the numbers of the micro-batches, counted from the beginning of the run."""
        return range(self.left.start * self.count, self.left.stop * self.count)

    def __len__(self) -> int:
        return len(self._range())

    def __iter__(self) -> Iterator[Batch | DataError]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            yield from self._batches(number, workers)
        except DataError as error:  # DataLoader would bury the message of a raised one
            yield error

    def _batches(self, number: int, workers: int) -> Iterator[Batch]:
        wanted, per_epoch = self._range(), self.steps * self.count
        own = (wanted.start + number) % workers  # the micro-batches are m with m % workers == own
        sizes = self._sizes(self.plan.rank)
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

    def _batch(self, taken: list[StoredSample], epoch: int, m: int) -> Batch:
        step, part = divmod(m, self.count)
        seed = self.plan.seed
        used, images, replaced = [], [], []
        for place, raw in enumerate(taken):
            image, by, reason = self._image_or_another(taken, place)
            if reason:
                replaced.append(Replaced(raw[:2], by[:2], epoch, step, reason))
            used.append(by)
            # A substitute is cut as the image that it replaces would have been.
            images.append(self.transform(image, sample_seed(seed, epoch, self._number(raw))))
        return Batch(
            images=stack(images),
            labels=torch.tensor([raw.label for raw in used]),
            samples=torch.tensor([self._number(raw) for raw in used]),
            epoch=epoch,
            step=step,
            last=part == self.count - 1,
            replaced=tuple(replaced),
        )

    def _image_or_another(
        self, taken: list[StoredSample], place: int
    ) -> tuple[torch.Tensor, StoredSample, str]:
        """Return an image, the sample that it comes from, and why that is a substitute."""
        how, reason = self.decoding, ""
        for raw in (*taken[place:], *taken[:place]):
            name = f"{shown(self.stream.shards[raw.shard])}: the image of sample {raw.key!r}"
            try:
                image = decode(raw.image, how.channels, name, how.decoder, how.max_pixels)
                return image, raw, reason
            except BadImage as error:
                reason = reason or error.reason
                last = error
        raise DataError(f"No image of a micro-batch of {len(taken)} can be used; the last: {last}")

    def _number(self, raw: StoredSample) -> int:
        """Return a 63-bit number for a sample; it is the same wherever the shard lies."""
        text = f"{base_name(self.stream.shards[raw.shard])}/{raw.key}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _samples(self, epoch: int, own: int, workers: int) -> Generator[StoredSample, None, None]:
        """Yield what a reader reads in an epoch, in its order, and begin again at the end."""
        pieces = self._pieces(epoch, own, workers)
        reader = self.plan.rank * workers + own
        generator = random.Random(sample_seed(self.plan.seed, epoch, reader))
        shuffled_by = shuffle(self.buffer, initial=self.buffer, rng=generator)
        repeated = 0
        try:
            for again in itertools.count():
                samples = (raw for piece in pieces for raw in read_piece(self.stream, piece))
                for raw in shuffled_by(samples):
                    repeated += again > 0
                    yield raw
        finally:
            if repeated:
                print(
                    f"epoch {epoch}, rank {self.plan.rank}, worker {own}: the shards of this "
                    f"worker held {repeated} images too few, so many came again",
                    file=sys.stderr,
                )

    def _sizes(self, rank: int) -> list[int]:
        """Return the numbers of samples in the micro-batches of one step on a rank."""
        share = rank_share(np.arange(self.plan.global_batch_size), rank, self.plan.world_size)
        return [len(part) for part in micro_batches(share, self.count)]

    def _pieces(self, epoch: int, own: int, workers: int) -> list[Piece]:
        """Return what one worker of this rank reads in an epoch."""
        key = np.array([self.plan.seed, epoch], np.uint64)
        order = shuffled(len(self.stream.shards), np.random.Philox(key=key))
        reader, readers = self.plan.rank * workers + own, self.plan.world_size * workers
        if self.stream.lengths is None:
            return [Piece(shard, 0, None) for shard in order[reader::readers].tolist()]
        needs = self._needs(epoch, workers)
        end = int(needs[: reader + 1].sum())
        return cut(order, self.stream.lengths, end - int(needs[reader]), end)

    def _needs(self, epoch: int, workers: int) -> np.ndarray:
        """Return the number of samples that each reader takes in an epoch, [ranks * workers]."""
        per_epoch = self.steps * self.count
        worker = np.arange(epoch * per_epoch, (epoch + 1) * per_epoch) % workers
        needs = []
        for rank in range(self.plan.world_size):
            sizes = np.tile(self._sizes(rank), self.steps)
            needs.append(np.bincount(worker, weights=sizes, minlength=workers))
        return np.concatenate(needs).astype(np.int64)
