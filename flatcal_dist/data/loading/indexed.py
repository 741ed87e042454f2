"""Batches for training and evaluation, from an index to pinned tensors.

Training is one DataLoader over all remaining epochs, so that workers keep reading across their
ends. What a worker is handed is a whole micro-batch's sample numbers; what comes back depends on
(index, seed, epoch, sample) alone, hence not on ranks, workers or where a run was interrupted. That
holds for images that cannot be decoded, too: others stand in for them, and batches say so.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.images.decode import MAX_PIXELS
from flatcal_dist.data.images.transforms import Evaluation, Training, stack
from flatcal_dist.data.loading.delivery import Batches, Delivery
from flatcal_dist.data.loading.schedule import Ahead, Request, Schedule
from flatcal_dist.data.loading.substitutes import Images, Replaced
from flatcal_dist.data.order import (
    Position,
    epoch_order,
    evaluation_batches,
    global_batch,
    micro_batch_count,
    sample_seed,
    steps_per_epoch,
)
from flatcal_dist.data.shards.index import Index


@dataclass(frozen=True)
class Batch:
    """One micro-batch of training."""

    images: Tensor  # [N, C, H, W] uint8, in memory [N, H, W, C]
    labels: Tensor  # [N] int64
    samples: Tensor  # [N] int64: numbers in the index; where one was bad, that of its substitute
    epoch: int
    step: int  # of the epoch
    last: bool  # the final micro-batch of its optimizer step on this rank
    replaced: tuple[Replaced, ...] = ()

    def pin_memory(self) -> "Batch":
        return _pinned(self)


Some = np.ndarray | None  # numbers of some samples, or all


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of evaluation; padding repeats the last sample and is marked False in `valid`."""

    images: Tensor  # [N, C, H, W] uint8, in memory [N, H, W, C]
    labels: Tensor  # [N] int64
    samples: Tensor  # [N] int64: numbers in the index
    valid: Tensor  # [N] bool

    def pin_memory(self) -> "EvaluationBatch":
        return _pinned(self)


def _pinned(batch: Any) -> Any:
    tensors = {k: v.pin_memory() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **tensors)


def training_loader(
    index: Index,
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
    window: int | None = None,
    same_class: bool = False,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
    **delivery: Unpack[Delivery],
) -> Batches:
    """Training from `start` to the end as `Batch` objects, this rank's share of it.

    The end is `epochs` epochs, or `max_steps` optimizer steps where that is given, both counted
    from the beginning of the run. Micro-batches hold `micro_batch_size` samples at most; every
    rank gets the same number of them in every step, with at most one sample difference.
    `window`: see `epoch_order`. `same_class`: pair images of one class, as it says of `paired_by`.
    `decoder`, `max_pixels`: see `decode`. The rest is `Delivery`'s.

    An image that cannot be used is replaced by one that (seed, epoch, sample) alone decide, with
    the label of that one; `Batch.replaced` lists these.

    Raises DataError for fewer samples than a global batch, a global batch that leaves a rank
    with nothing, or a start that the data does not have; iterating raises it for bad data.
    """
    schedule = Schedule(
        shard_lengths=index.lengths,
        seed=seed,
        global_batch_size=global_batch_size,
        count=micro_batch_count(global_batch_size, micro_batch_size, world_size),
        rank=rank,
        world_size=world_size,
        window=window,
        start=start,
        steps=steps_per_epoch(len(index), global_batch_size),
        epochs=epochs,
        max_steps=max_steps,
        paired_by=index.label if same_class else None,
    )
    images = _TrainingImages(Images(index, channels, decoder, max_pixels), seed, transform)
    return Batches(images, Ahead(schedule, max(delivery.get("workers", 0), 1)), **delivery)


def sample_loader(
    index: Index,
    *,
    seed: int,
    batch_size: int,
    batches: int,
    transform: Training,
    channels: int,
    rank: int = 0,
    world_size: int = 1,
    window: int | None = None,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
    **delivery: Unpack[Delivery],
) -> Batches:
    """The first `batches` batches of the first epoch, as `Batch` objects; the same at every call.

    Batch b (`Batch.step`) holds the same images, cut in the same way, on any number of ranks, and
    goes whole to rank b % world_size. Every rank gets the same number of batches: a surplus one
    has a step of `batches` or more, and the images of the last. Iterating raises DataError for
    bad data.
    """
    order = epoch_order(index.lengths, seed, 0, window)
    rounds = -(-batches // world_size)
    requests = [
        Request(global_batch(order, min(b, batches - 1), batch_size), epoch=0, step=b, last=True)
        for b in range(rank, rounds * world_size, world_size)
    ]
    images = _TrainingImages(Images(index, channels, decoder, max_pixels), seed, transform)
    return Batches(images, Ahead(requests, max(delivery.get("workers", 0), 1)), **delivery)


def evaluation_loader(
    index: Index,
    *,
    batch_size: int,
    transform: Evaluation,
    channels: int,
    rank: int = 0,
    world_size: int = 1,
    decoder: str = "auto",
    max_pixels: int = MAX_PIXELS,
    samples: Some = None,
    **delivery: Unpack[Delivery],
) -> Batches:
    """Every sample once, over all ranks, as `EvaluationBatch` objects of exactly `batch_size`.

    samples: numbers [m] of those to take; None: all.

    Which samples share a batch does not depend on the world size, and every rank gets the same
    number of batches (see `evaluation_batches`). Iterating raises DataError for bad data: here no
    image stands in for another.
    """
    taken = np.arange(len(index)) if samples is None else samples
    batches = evaluation_batches(len(taken), batch_size, rank, world_size)
    requests = [(taken[places], valid) for places, valid in batches]
    images = _EvaluationImages(Images(index, channels, decoder, max_pixels), transform)
    return Batches(images, requests, **delivery)


def optimizer_steps(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group micro-batches into optimizer steps."""
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if batch.last:
            yield step
            step = []


@dataclass(frozen=True)
class _TrainingImages(Dataset[Batch | DataError]):
    images: Images
    seed: int
    transform: Training

    def __getitem__(self, request: Request) -> Batch | DataError:
        index = self.images.index
        if request.ahead is not None:
            index.announce(request.ahead.tolist())
        tensors, samples, replaced = [], request.samples.copy(), []
        try:
            for place, sample in enumerate(request.samples.tolist()):
                found = self.images.image_or_another(sample, self.seed, request.epoch)
                image, samples[place], reason = found
                if reason:
                    at = (request.epoch, request.step)
                    replaced.append(Replaced(sample, int(samples[place]), *at, reason))
                # A substitute is cut as the image that it stands for would have been: it is in the
                # epoch a second time, and not to look the same there.
                seed = sample_seed(self.seed, request.epoch, sample)
                tensors.append(self.transform(image, seed))
        except DataError as error:
            return error  # DataLoader would bury the message of a raised one in tracebacks
        return Batch(
            images=stack(tensors),
            labels=_labels(index, samples),
            samples=torch.from_numpy(samples),
            epoch=request.epoch,
            step=request.step,
            last=request.last,
            replaced=tuple(replaced),
        )


@dataclass(frozen=True)
class _EvaluationImages(Dataset[EvaluationBatch | DataError]):
    images: Images
    transform: Evaluation

    def __getitem__(self, request: tuple[np.ndarray, int]) -> EvaluationBatch | DataError:
        samples, valid = request
        # Padding repeats one sample: decode it once, even where it is all there is.
        distinct = samples[: max(valid, 1)].tolist()
        self.images.index.announce(distinct)
        try:
            tensors = [self._image(sample) for sample in distinct]
        except DataError as error:
            return error
        tensors += tensors[-1:] * (len(samples) - len(tensors))
        return EvaluationBatch(
            images=stack(tensors),
            labels=_labels(self.images.index, samples),
            samples=torch.from_numpy(samples),
            valid=torch.arange(len(samples)) < valid,
        )

    def _image(self, sample: int) -> Tensor:
        image = self.images.image(sample)
        try:
            return self.transform(image)
        except BadImage as error:
            raise BadImage(self.images.index.name(sample), error.reason) from error


def _labels(index: Index, samples: np.ndarray) -> Tensor:
    return torch.from_numpy(index.label[samples].astype(np.int64))
