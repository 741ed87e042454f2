"""Batches for training and evaluation, from an index to pinned tensors.

Training is one DataLoader over all remaining epochs, so that workers keep reading across their
ends. What a worker is handed is a whole micro-batch's sample numbers; what comes back depends on
(index, seed, epoch, sample) alone, hence not on ranks, workers or where a run was interrupted.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from flatcal_dist.data.decode import decode
from flatcal_dist.data.errors import DataError
from flatcal_dist.data.index import Index
from flatcal_dist.data.order import (
    Position,
    epoch_order,
    evaluation_batches,
    global_batch,
    micro_batch_count,
    micro_batches,
    rank_share,
    sample_seed,
    steps_per_epoch,
)
from flatcal_dist.data.transforms import Evaluation, Training


@dataclass(frozen=True)
class Batch:
    """One micro-batch of training."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64
    samples: Tensor  # [N] int64: numbers in the index
    epoch: int
    step: int  # of the epoch
    last: bool  # the final micro-batch of its optimizer step on this rank

    def pin_memory(self) -> "Batch":
        return _pinned(self)


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of evaluation; padding repeats the last sample and is marked False in `valid`."""

    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64
    samples: Tensor  # [N] int64: numbers in the index
    valid: Tensor  # [N] bool

    def pin_memory(self) -> "EvaluationBatch":
        return _pinned(self)


def _pinned(batch: Any) -> Any:
    tensors = {k: v.pin_memory() for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **tensors)


class Batches:
    """A DataLoader's batches; a DataError of a worker is raised here as it was raised there."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __len__(self) -> int:
        """Batches that one pass yields on this rank."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


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
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> Batches:
    """Training from `start` to the end as `Batch` objects, this rank's share of it.

    The end is `epochs` epochs, or `max_steps` optimizer steps where that is given, both counted
    from the beginning of the run. Micro-batches hold `micro_batch_size` samples at most; every
    rank gets the same number of them in every step, with at most one sample difference.
    `window`: see `epoch_order`. `prefetch`: micro-batches that each worker holds ready.

    Raises DataError for fewer samples than a global batch, a global batch that leaves a rank
    with nothing, or a start that the data does not have; iterating raises it for bad data.
    """
    schedule = _Schedule(
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
    )
    images = _TrainingImages(index, channels, seed, transform)
    return Batches(
        _loader(images, schedule, workers, prefetch, pin_memory, multiprocessing_context)
    )


def evaluation_loader(
    index: Index,
    *,
    batch_size: int,
    transform: Evaluation,
    channels: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> Batches:
    """Every sample once, over all ranks, as `EvaluationBatch` objects of exactly `batch_size`.

    Which samples share a batch does not depend on the world size, and every rank gets the same
    number of batches (see `evaluation_batches`). Iterating raises DataError for bad data.
    """
    requests = list(evaluation_batches(len(index), batch_size, rank, world_size))
    images = _EvaluationImages(index, channels, transform)
    return Batches(
        _loader(images, requests, workers, prefetch, pin_memory, multiprocessing_context)
    )


def optimizer_steps(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group micro-batches into optimizer steps."""
    step: list[Batch] = []
    for batch in batches:
        step.append(batch)
        if batch.last:
            yield step
            step = []


@dataclass(frozen=True)
class _Request:
    """What a worker is asked for: one micro-batch of training."""

    samples: np.ndarray
    epoch: int
    step: int
    last: bool


@dataclass(frozen=True)
class _Schedule(Sampler[_Request]):
    """All micro-batches of this rank from `start` on."""

    shard_lengths: np.ndarray
    seed: int
    global_batch_size: int
    count: int  # micro-batches per optimizer step
    rank: int
    world_size: int
    window: int | None
    start: Position
    steps: int  # per epoch
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
        end = self.epochs * self.steps if self.max_steps is None else self.max_steps
        return range(self.start.epoch * self.steps + self.start.step, end)

    def __len__(self) -> int:
        return len(self._range()) * self.count

    def __iter__(self) -> Iterator[_Request]:
        ordered = None
        for done in self._range():
            epoch, step = divmod(done, self.steps)
            if epoch != ordered:
                order = epoch_order(self.shard_lengths, self.seed, epoch, self.window)
                ordered = epoch
            batch = global_batch(order, step, self.global_batch_size)
            parts = micro_batches(rank_share(batch, self.rank, self.world_size), self.count)
            for i, samples in enumerate(parts):
                yield _Request(samples, epoch, step, last=i == len(parts) - 1)


@dataclass(frozen=True)
class _TrainingImages(Dataset[Batch | DataError]):
    index: Index
    channels: int
    seed: int
    transform: Training

    def __getitem__(self, request: _Request) -> Batch | DataError:
        try:
            images = [self._image(sample, request.epoch) for sample in request.samples.tolist()]
        except DataError as error:
            return error  # DataLoader would bury the message of a raised one in tracebacks
        return Batch(
            images=torch.stack(images),
            labels=_labels(self.index, request.samples),
            samples=torch.from_numpy(request.samples.copy()),
            epoch=request.epoch,
            step=request.step,
            last=request.last,
        )

    def _image(self, sample: int, epoch: int) -> Tensor:
        image = _decoded(self.index, sample, self.channels)
        return self.transform(image, sample_seed(self.seed, epoch, sample))


@dataclass(frozen=True)
class _EvaluationImages(Dataset[EvaluationBatch | DataError]):
    index: Index
    channels: int
    transform: Evaluation

    def __getitem__(self, request: tuple[np.ndarray, int]) -> EvaluationBatch | DataError:
        samples, valid = request
        try:
            # Padding repeats one sample: decode it once, even where it is all there is.
            distinct = samples[: max(valid, 1)].tolist()
            images = [self.transform(_decoded(self.index, s, self.channels)) for s in distinct]
        except DataError as error:
            return error
        images += images[-1:] * (len(samples) - len(images))
        return EvaluationBatch(
            images=torch.stack(images),
            labels=_labels(self.index, samples),
            samples=torch.from_numpy(samples),
            valid=torch.arange(len(samples)) < valid,
        )


def _decoded(index: Index, sample: int, channels: int) -> Tensor:
    data = index.read(sample)
    try:
        return decode(data, channels, f"sample number {sample}")
    except DataError:  # now the key is worth looking up
        name = f"{index.shards[index.shard[sample]]}: the image of sample {index.key(sample)!r}"
        return decode(data, channels, name)


def _labels(index: Index, samples: np.ndarray) -> Tensor:
    return torch.from_numpy(index.label[samples].astype(np.int64))


def _loader(
    images: Dataset,
    requests: Any,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    context: str | None,
) -> DataLoader:
    return DataLoader(
        images,
        sampler=requests,
        batch_size=None,  # the sampler makes the batches
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=context if workers else None,
        generator=torch.Generator(),  # else DataLoader draws from the process's random stream
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(number: int) -> None:
    """Workers leave signals to the main process.

    Ctrl-C and SLURM's preemption signals reach every process of a job; a worker that died of one
    would take the run with it before it could write its checkpoint. The main process itself ends
    its workers by SIGTERM, so that one is obeyed when it comes from there.
    """
    for received in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(received, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process() -> None:
    # A handler is not told who sent a signal; waiting for it is. Ignoring SIGTERM altogether
    # would let a run that fails wait for its workers for ever. (The parent's own number is no
    # help: it is the fork server's where there is one.)
    main = multiprocessing.parent_process()
    while main.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 5)
        if received is not None and received.si_pid == main.pid:
            break
    os._exit(0)
