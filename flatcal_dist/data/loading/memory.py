"""Batches of a small data set that is held in memory, augmented as a whole on the device.

All images are decoded once, when the first batch is asked for. The samples come in the order of
the indexed reader, and with its random choices. Where images are only padded, cut and mirrored, or
not varied at all, batches are made on the device by integer arithmetic, so they are the same bytes.
With any other augmentation the images are varied one by one, as the indexed reader does it. This
saves the decoding alone.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatcal_dist.data.errors import BadImage, DataError
from flatcal_dist.data.images.decode import Decoding
from flatcal_dist.data.images.pad_crop import PadCrop
from flatcal_dist.data.images.transforms import (
    Augmentation,
    Evaluation,
    is_of_integers,
    stack,
    stretch,
    training_transform,
)
from flatcal_dist.data.loading.delivery import Batches
from flatcal_dist.data.loading.indexed import Batch, EvaluationBatch
from flatcal_dist.data.loading.plan import BatchPlan, Workers
from flatcal_dist.data.loading.schedule import Request, Schedule
from flatcal_dist.data.loading.substitutes import TRIES, Images, Replaced
from flatcal_dist.data.order import sample_seeds, substitutes
from flatcal_dist.data.shards.index import Index

PIECE = 64  # images that a worker decodes for one request


class MemoryBatches:
    """The training batches of one rank, as `Batch` objects whose images are on the device.

    They are the batches of `training_loader`. The constructor raises DataError if the data and the
    plan do not fit together. Iterating raises DataError for bad data, and for data that do not fit
    in memory.
    """

    def __init__(
        self,
        index: Index,
        plan: BatchPlan,
        augmentation: Augmentation,
        image_size: int,
        decoding: Decoding,
        workers: Workers = Workers(),  # noqa: B008 (frozen)
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare the batches. Nothing is read before the first one is asked for.

        Args:
            index: The samples.
            plan: How they are cut into batches.
            augmentation: How images are varied.
            image_size: Height and width of the images of a batch.
            decoding: How images are decoded.
            workers: The processes that decode the images, once.
            device: Where the images are held and varied.
        """
        self._index, self._plan, self._schedule = index, plan, Schedule(plan, index)
        self._augmentation, self._image_size = augmentation, image_size
        self._decoding, self._workers, self._device = decoding, workers, torch.device(device)
        self._images: Tensor | None = None  # [n, H, W, C] uint8
        self._bad: dict[int, str] = {}  # the reason why an image cannot be used
        self._whole = is_of_integers(augmentation)  # whether whole batches are varied

    def __len__(self) -> int:
        return len(self._schedule)

    def __iter__(self) -> Iterator[Batch]:
        if self._images is None:
            self._read()
        for request in self._schedule:
            used, replaced = self._used(request)
            # As everywhere, a substitute is cut as the image that it replaces would have been.
            seeds = sample_seeds(self._plan.seed, request.epoch, request.samples)
            yield Batch(
                images=self._varied(used, seeds).permute(0, 3, 1, 2),
                labels=torch.from_numpy(self._index.label[used].astype(np.int64)),
                samples=torch.from_numpy(used),
                epoch=request.epoch,
                step=request.step,
                last=request.last,
                replaced=tuple(replaced),
            )

    def _varied(self, samples: np.ndarray, seeds: np.ndarray) -> Tensor:
        """Return a batch [n, H, W, C] of these samples, varied by these seeds."""
        assert self._images is not None
        augmentation = self._augmentation
        places = torch.from_numpy(samples)
        if self._whole:
            images = self._images.index_select(0, places.to(self._images.device))
            if augmentation.kind != "pad_crop":
                return images
            return PadCrop(augmentation.padding, augmentation.flip).batch(images, seeds)
        vary = training_transform(augmentation, self._image_size)
        one_by_one = zip(self._images[places].permute(0, 3, 1, 2), seeds.tolist(), strict=True)
        return stack([vary(image, seed) for image, seed in one_by_one]).permute(0, 2, 3, 1)

    def _used(self, request: Request) -> tuple[np.ndarray, list[Replaced]]:
        """Return the samples to use [n], and which of them stand for images that are bad."""
        used, replaced = request.samples.copy(), []
        for place, sample in enumerate(used.tolist() if self._bad else ()):
            if sample not in self._bad:
                continue
            others = substitutes(self._plan.seed, request.epoch, sample, len(self._index))
            good = (other for other in islice(others, TRIES) if other not in self._bad)
            if (by := next(good, None)) is None:
                raise DataError(
                    f"{TRIES} images drawn in place of {self._index.name(sample)} cannot be used "
                    f"either: it {self._bad[sample]}. Check the shards with `flatcal validate`."
                )
            used[place] = by
            replaced.append(Replaced(sample, by, request.epoch, request.step, self._bad[sample]))
        return used, replaced

    def _read(self) -> None:
        """Decode all images, and bring them to the device if they are varied there."""
        n, device = len(self._index), self._device if self._whole else torch.device("cpu")
        how = stretch(self._augmentation, self._image_size) if self._whole else None
        pieces = np.array_split(np.arange(n), -(-n // PIECE))
        decoded = _Decoded(Images(self._index, self._decoding), how)
        held: Tensor | None = None
        for good, images, bad in Batches(decoded, pieces, self._workers):
            self._bad |= bad
            if not len(good):
                continue
            if held is None:
                _refuse_too_large(n * images[0].numel(), device)
                held = torch.zeros((n, *images.shape[1:]), dtype=torch.uint8, device=device)
            _refuse_other_size(images, held, self._index.name(int(good[0])))
            held[torch.from_numpy(good).to(device)] = images.to(device)
        if held is None:
            raise DataError(
                f"None of the {n} training images can be used; the first {self._bad[0]}. Check the "
                "shards with `flatcal validate`."
            )
        self._images = held


class HeldBatches:
    """Evaluation batches that are loaded once, and then held in memory for every other pass.

    They are loaded in each pass if they would take more than a half of the free memory.
    """

    def __init__(self, batches: Batches) -> None:
        """Prepare the batches. Nothing is loaded before the first pass."""
        self._batches = batches
        self._held: list[EvaluationBatch] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[EvaluationBatch]:
        if self._held is not None:
            yield from self._held
            return
        held: list[EvaluationBatch] | None = []
        for batch in self._batches:
            if held is not None and (held or self._fits(batch)):
                held.append(batch.copied())
            else:
                held = None
            yield batch
        self._held = held

    def _fits(self, first: EvaluationBatch) -> bool:
        return _room(len(self) * first.images.nbytes, torch.device("cpu"))[0]


@dataclass(frozen=True)
class _Decoded(Dataset[tuple[np.ndarray, Tensor, dict[int, str]] | DataError]):
    """Pieces of the data: the numbers of good images, these [n, H, W, C], and what is bad."""

    images: Images
    stretch: Evaluation | None

    def __getitem__(
        self, samples: np.ndarray
    ) -> tuple[np.ndarray, Tensor, dict[int, str]] | DataError:
        self.images.index.announce(samples.tolist())
        good, tensors, bad = [], [], {}
        try:
            for sample in samples.tolist():
                try:
                    image = self.images.image(sample)
                except BadImage as error:
                    bad[sample] = error.reason
                    continue
                good.append(sample)
                tensors.append(self.stretch(image) if self.stretch else image)
                _refuse_other_size(tensors[-1][None].permute(0, 2, 3, 1),
                                   tensors[0][None].permute(0, 2, 3, 1),
                                   self.images.index.name(sample))  # fmt: skip
        except DataError as error:
            return error
        held = stack(tensors).permute(0, 2, 3, 1) if tensors else torch.empty(0)
        return np.array(good, np.int64), held, bad


def _refuse_other_size(images: Tensor, others: Tensor, name: str) -> None:
    if images.shape[1:] != others.shape[1:]:
        (height, width), (h, w) = images.shape[1:3], others.shape[1:3]
        raise DataError(
            f"{name} has {width} x {height} pixels, and others have {w} x {h}: with "
            "data.reader=memory this augmentation needs images of one size. Set "
            "data.reader=indexed, or data.augmentation=pad_crop."
        )


def _refuse_too_large(size: int, device: torch.device) -> None:
    """Raise DataError for data that would take more than a half of the free memory."""
    fits, free, copies = _room(size, device)
    if not fits:
        times = f" {copies} times" if copies > 1 else ""
        raise DataError(
            f"data.reader=memory would hold {size / 2**30:,.1f} GiB of training images{times} on "
            f"{device}, where {free / 2**30:,.1f} GiB are free: at most a half of that is used. "
            "Set data.reader=indexed, or a smaller data.image_size."
        )


def _room(size: int, device: torch.device) -> tuple[bool, int, int]:
    """Return whether a half of the free memory holds the data, the free bytes, and how many copies.

    On the CPU all ranks of a machine hold a copy each. Where nothing tells what is free, it fits.
    """
    free, copies = _free(device), 1
    if device.type == "cpu":
        copies = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free is None or copies * size <= free / 2, free or 0, copies


def _free(device: torch.device) -> int | None:
    """Return the free bytes of a device, or None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # macOS
        return None
    told = dict(line.split(":", 1) for line in lines)
    return int(told["MemAvailable"].split()[0]) << 10
