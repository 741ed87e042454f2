"""Batches for training and evaluation, from an index to pinned tensors.

Training is one DataLoader over all remaining epochs, so workers keep reading when an epoch ends. A
worker gets the numbers of the samples of a whole micro-batch. What it returns depends on (index,
seed, epoch, sample) alone. It does not depend on ranks, on workers, or on where a run was
interrupted. This also holds for images that cannot be decoded: substitutes take their places, and
the batch lists them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.images.decode import Decoding
from flatcal_dist.data.images.transforms import Evaluation, Training, stack
from flatcal_dist.data.loading.delivery import Batches
from flatcal_dist.data.loading.plan import BatchPlan, Workers
from flatcal_dist.data.loading.schedule import Ahead, Request, Schedule
from flatcal_dist.data.loading.substitutes import Images, Replaced
from flatcal_dist.data.order import (
    epoch_order,
    evaluation_batches,
    global_batch,
    sample_seed,
)
from flatcal_dist.data.shards.index import Index


@dataclass(frozen=True)
class Batch:
    """One micro-batch of training."""

    images: Tensor  # [N, C, H, W] uint8, in memory [N, H, W, C]
    labels: Tensor  # [N] int64
    samples: Tensor  # [N] int64: numbers in the index, of the substitute where an image was bad
    epoch: int
    step: int  # of the epoch
    last: bool  # the final micro-batch of its optimizer step on this rank
    replaced: tuple[Replaced, ...] = ()

    def pin_memory(self) -> "Batch":
        """Return the same batch in pinned memory."""
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=self.labels.pin_memory(),
            samples=self.samples.pin_memory(),
        )


Some = np.ndarray | None  # numbers of some samples; None for all


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of evaluation. Padding repeats the last sample and is marked False in `valid`."""

    images: Tensor  # [N, C, H, W] uint8, in memory [N, H, W, C]
    labels: Tensor  # [N] int64
    samples: Tensor  # [N] int64: numbers in the index
    valid: Tensor  # [N] bool

    def copied(self) -> "EvaluationBatch":
        """Return the same batch in memory of its own, not in what workers share."""
        return self._each(Tensor.clone)

    def pin_memory(self) -> "EvaluationBatch":
        """Return the same batch in pinned memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, changed: Callable[[Tensor], Tensor]) -> "EvaluationBatch":
        return EvaluationBatch(**{name: changed(value) for name, value in vars(self).items()})


def training_loader(
    index: Index,
    plan: BatchPlan,
    transform: Training,
    decoding: Decoding,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
) -> Batches:
    """Return the training batches of one rank, as `Batch` objects.

    Every rank gets the same number of micro-batches in every step, and their sizes differ by one
    sample at most. An image that cannot be used is replaced by one that follows from (seed, epoch,
    sample) alone, and by the label of that one. `Batch.replaced` lists the replacements. Iterating
    raises DataError for bad data.

    Args:
        index: The samples.
        plan: How they are cut into batches.
        transform: The augmentation.
        decoding: How images are decoded.
        workers: The processes that load.

    Raises:
        DataError: The data holds fewer samples than a global batch, a global batch leaves a rank
            with nothing, or training would start where the data has no step.
    """
    images = _TrainingImages(Images(index, decoding), plan.seed, transform)
    return Batches(images, Ahead(Schedule(plan, index), workers.readers), workers)


def sample_loader(
    index: Index,
    plan: BatchPlan,
    batches: int,
    transform: Training,
    decoding: Decoding,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
) -> Batches:
    """Return the first batches of the first epoch, as `Batch` objects; the same at every call.

    Batch b (`Batch.step`) holds the same images, cut in the same way, on any number of ranks, and
    goes whole to rank b % world_size. Every rank gets the same number of batches. A surplus batch
    has a step of `batches` or more, and the images of the last one. Iterating raises DataError for
    bad data.

    Args:
        index: The samples.
        plan: The seed, the size of a global batch, the window, the rank and the world size are
            used.
        batches: How many batches of all ranks together.
        transform: The augmentation.
        decoding: How images are decoded.
        workers: The processes that load.
    """
    order = epoch_order(index.lengths, plan.seed, 0, plan.window)
    rounds = -(-batches // plan.world_size)
    requests = [
        Request(global_batch(order, min(b, batches - 1), plan.global_batch_size), 0, b, last=True)
        for b in range(plan.rank, rounds * plan.world_size, plan.world_size)
    ]
    images = _TrainingImages(Images(index, decoding), plan.seed, transform)
    return Batches(images, Ahead(requests, workers.readers), workers)


def evaluation_loader(
    index: ImageIndex,
    batch_size: int,
    transform: Evaluation,
    decoding: Decoding,
    workers: Workers = Workers(),  # noqa: B008 (frozen)
    *,
    rank: int = 0,
    world_size: int = 1,
    samples: Some = None,
) -> Batches:
    """Return one rank's share of all samples, as `EvaluationBatch` objects of `batch_size`.

    Every sample comes once, over all ranks. Which samples share a batch does not depend on the
    world size, and every rank gets the same number of batches (see `evaluation_batches`). No image
    stands in for another here: iterating raises DataError for bad data.

    Args:
        index: The samples.
        batch_size: The number of samples in each batch, padding included.
        transform: How images are cut.
        decoding: How images are decoded.
        workers: The processes that load.
        rank: The number of this rank.
        world_size: The number of ranks.
        samples: The numbers [m] of the samples to take; None takes all.
    """
    taken = np.arange(len(index)) if samples is None else samples
    batches = evaluation_batches(len(taken), batch_size, rank, world_size)
    requests = [(taken[places], valid) for places, valid in batches]
    return Batches(_EvaluationImages(Images(index, decoding), transform), requests, workers)


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
                # A substitute is cut as the image that it replaces would have been: it comes twice
                # in the epoch, and should not look the same both times.
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
        # Padding repeats one sample: decode it once, also in a batch of padding alone.
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


def _labels(index: ImageIndex, samples: np.ndarray) -> Tensor:
    return torch.from_numpy(index.label[samples].astype(np.int64))
