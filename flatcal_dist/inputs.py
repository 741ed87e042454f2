"""Indexes and loaders for training and evaluation, made as the configuration says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from flatcal_dist.batch_sizes import micro_batch_size
from flatcal_dist.config import Config, DataConfig
from flatcal_dist.data import (
    Augmentation,
    BatchPlan,
    DataError,
    Decoding,
    Index,
    Normalize,
    Position,
    Some,
    Workers,
    describe_decoder,
    evaluation_loader,
    evaluation_transform,
    expand,
    load_index,
    prepare_digits,
    sample_loader,
    steps_per_epoch,
    training_loader,
    training_transform,
)
from flatcal_dist.data.holdout import held_out
from flatcal_dist.data.image_index import ImageIndex
from flatcal_dist.data.loading.delivery import Batches
from flatcal_dist.data.loading.memory import MemoryBatches
from flatcal_dist.data.loading.streaming import streaming_loader
from flatcal_dist.data.making.digits import NOISE
from flatcal_dist.data.shards.access import is_remote
from flatcal_dist.data.shards.listing import Stream, class_names, list_shards, open_stream
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.shard_sources import access, cache_of, download, remote, streams
from flatcal_dist.urls import public

__all__ = [
    "access", "agree_on_decoder", "augmentation", "check_classes", "download", "evaluation_batches",
    "images_apart", "normalization", "open_holdout", "open_index", "open_training", "prepare",
    "promise", "remote", "statistics_batches", "streams", "training_batches",
]  # fmt: skip

STATISTICS_SAMPLES = 8192  # 10^3 to 10^4 are enough (Wu and Johnson, 2021, arXiv 2105.07576)

HOW_TO_PREPARE = """
Make WebDataset shards of a data set once, from its archives or from trees of one folder a class:
  flatcal shard ILSVRC2012_img_train.tar data/imagenet --split train
  flatcal shard ILSVRC2012_img_val.tar   data/imagenet --split validation
(configs/base/cifar10.yaml, cifar100.yaml and tiny_imagenet.yaml begin with theirs.) Or name shards
that you have, by pattern or directory, after `flatcal index SHARDS`:
  data.train=PATTERN data.validation=PATTERN
Without any data, configs/digits/csam.yaml runs as it is, and --dry-run needs none."""


def prepare(data: DataConfig) -> None:
    """Write the embedded data set where `data.train` expects it, unless it is there."""
    if data.prepare is not None:
        if not isinstance(data.train, str) or is_remote(data.train):
            raise DataError(
                f"data.prepare={data.prepare} needs data.train to be one pattern or directory, not "
                f"{public(data.train)}"
            )
        train = Path(data.train).expanduser()
        is_pattern = train.suffix == ".tar" or any(sign in train.name for sign in "*?[{")
        noise = NOISE if data.prepare == "digits" else 0.0
        prepare_digits(train.parent if is_pattern else train, label_noise=noise)


def open_index(data: DataConfig, split: str, classes: int) -> Index:
    """Return the index of the shards that `data.train` or `data.validation` names.

    Training images that `data.holdout` keeps apart are left out (see `open_holdout`). Shards from
    URLs have to be in the cache already (see `download`).

    Args:
        data: The configuration of the data.
        split: "train" or "validation".
        classes: The number of classes; labels have to lie in [0, classes).

    Raises:
        DataError: No shards are named, or they cannot be used.
    """
    index = _whole_index(data, split, classes)
    if split != "train" or data.holdout is None:
        return index
    return index.part(~_apart(data, index))


def open_holdout(data: DataConfig, classes: int) -> Index:
    """Return the training images that `data.holdout` keeps apart. Raises DataError."""
    index = _whole_index(data, "train", classes)
    return index.part(_apart(data, index))


def images_apart(config: Config, accelerator: Accelerator) -> Index | None:
    """Return the training images to fit the temperature on, if the configuration keeps some apart.

    All ranks call this function. Raises FailedTogether where the training data is not there.
    """
    data, classes = config.data, config.model.num_classes
    if data.holdout is None:
        return None
    download(data, accelerator, "train")
    return on_all_ranks(lambda: open_holdout(data, classes))


def _apart(data: DataConfig, index: Index) -> np.ndarray:
    assert data.holdout is not None
    return held_out(index.keys(), index.label, data.holdout, data.holdout_seed)


def _whole_index(data: DataConfig, split: str, classes: int) -> Index:
    pattern = getattr(data, split)
    if pattern is None:
        raise DataError(f"data.{split} names no shards.{HOW_TO_PREPARE}")
    if remote(pattern):
        cache = cache_of(data, f"data.{split}")
        names = list_shards(pattern, split, access(data))
        return load_index([cache.path(n) if is_remote(n) else Path(n) for n in names], classes)
    try:
        shards = expand(pattern, split)
    except DataError as error:
        raise DataError(
            f"data.{split}: {error} (Relative paths start at the working directory, {Path.cwd()}.)"
            f"{HOW_TO_PREPARE}"
        ) from None
    return load_index(shards, classes)


def check_classes(data: DataConfig) -> None:
    """Raise DataError if two of the shards that a run reads count different classes.

    Only shards that `flatcal shard` made from folders or archives tell their classes. Folders that
    are plain numbers are numbers of classes, and fit anything.
    """
    found: dict[str, list[str]] = {}
    for pattern, split in ((data.train, "train"), (data.validation, "validation")):
        if pattern is not None:
            found |= class_names(list_shards(pattern, split, access(data)), access(data))
    named = [(plan, names) for plan, names in found.items() if not all(map(str.isdigit, names))]
    for plan, names in named[1:]:
        if names == named[0][1]:
            continue
        odd = sorted({*names} ^ {*named[0][1]})
        which = f"{odd[0]!r} is in one of them only ({len(odd)} such)" if odd else "in other order"
        raise DataError(
            f"{named[0][0]} has {len(named[0][1])} classes and {plan} has {len(names)}, {which}: "
            "equal labels would mean different classes. Shard the complete data again."
        )


def agree_on_decoder(data: DataConfig) -> None:
    """Check that all ranks have the decoder, and the same version of it.

    All ranks call this function. Raises FailedTogether if they do not.
    """
    mine = on_all_ranks(lambda: describe_decoder(data.decoder))
    found = sorted(set(gather_object([mine])))

    def check() -> None:
        if len(found) > 1:
            raise DataError(
                f"the ranks would decode images by different decoders ({', '.join(found)}): "
                "install the same packages on all machines, or set data.decoder=pil"
            )

    on_all_ranks(check)


def open_training(data: DataConfig, classes: int) -> Index | Stream:
    """Return the training data, opened by the reader that `data.reader` names. Raises DataError."""
    if data.train is None or not streams(data):
        return open_index(data, "train", classes)
    if data.holdout is not None:
        raise DataError(
            "data.holdout chooses images by their keys and labels, which streamed shards do not "
            "have: set data.reader=indexed, with data.cache for URLs."
        )
    cache = cache_of(data, "data.train") if data.cache else None
    return open_stream(data.train, "train", classes, access(data), data.epoch_samples, cache)


def promise(train: Index | Stream, reader: str = "indexed") -> str:
    """Say in words what a run may rely on in the order of the training data.

    Args:
        train: The training data.
        reader: What `data.reader` says.
    """
    if isinstance(train, Stream):
        return train.promise
    name = "indexed reader"
    if reader == "memory":
        name = f"reader in memory, which decodes {len(train):,} images before the first step"
    return (
        f"{name}: every epoch visits each image at most once, in an order that depends on "
        "run.seed and the epoch alone; a run resumes exactly, on any number of ranks and workers"
    )


def _decoding(data: DataConfig) -> Decoding:
    return Decoding(data.channels, data.decoder, data.max_pixels)


def _plan(config: Config, start: Position, rank: int, world_size: int) -> BatchPlan:
    data = config.data
    return BatchPlan(
        seed=config.run.seed,
        global_batch_size=data.global_batch_size,
        micro_batch_size=micro_batch_size(data, world_size),
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        start=start,
        rank=rank,
        world_size=world_size,
        window=data.shuffle_window,
    )


def training_batches(
    config: Config,
    train: Index | Stream,
    start: Position,
    rank: int,
    world_size: int,
    pin_memory: bool,
    same_class: bool = False,
    device: torch.device | str = "cpu",
) -> Batches | MemoryBatches:
    """Return the training batches of one rank, from `start` to the end of the run.

    Args:
        config: The configuration.
        train: The training data.
        start: The optimizer step to begin with.
        rank: The number of this rank.
        world_size: The number of ranks.
        pin_memory: Whether batches are put into pinned memory.
        same_class: Whether images of one class are paired, which a stream cannot do.
        device: Where data.reader=memory holds and varies the images.

    Raises:
        DataError: The data does not fit the batches.
    """
    data = config.data
    plan = replace(_plan(config, start, rank, world_size), same_class=same_class)
    if data.reader == "memory" and not isinstance(train, Stream):
        return MemoryBatches(
            train, plan, augmentation(data), data.image_size, _decoding(data),
            Workers(data.workers), device,
        )  # fmt: skip
    transform = training_transform(augmentation(data), data.image_size)
    workers = Workers(data.workers, pin_memory=pin_memory)
    if isinstance(train, Stream):
        return streaming_loader(
            train, plan, transform, _decoding(data), workers, buffer=data.shuffle_buffer
        )
    return training_loader(train, plan, transform, _decoding(data), workers)


def statistics_batches(
    config: Config, train: Index | Stream, rank: int, world_size: int, pin_memory: bool
) -> tuple[Batches | MemoryBatches, int]:
    """Return training batches to estimate norm statistics on, and how many of them count.

    A batch counts if its `Batch.step` is below this number. The batches hold `STATISTICS_SAMPLES`
    images, or those of an epoch if it has fewer. The images are augmented as in training, and are
    the same at every call. Indexed data gives the same batches on any number of ranks: the first of
    the first epoch, of data.global_batch_size images, but of evaluate.batch_size images at most. A
    stream gives the batches that its training begins with, which depend on ranks and workers.

    Args:
        config: The configuration.
        train: The training data.
        rank: The number of this rank.
        world_size: The number of ranks.
        pin_memory: Whether batches are put into pinned memory.
    """
    data, size = config.data, config.data.global_batch_size
    if isinstance(train, Stream):
        steps = min(-(-STATISTICS_SAMPLES // size), steps_per_epoch(len(train), size))
        short = config.train.model_copy(update={"max_steps": steps})
        config = config.model_copy(update={"train": short})
        return training_batches(config, train, Position(), rank, world_size, pin_memory), steps
    size = min(size, max(config.evaluate.batch_size, 2))
    if config.mixing.name != "none":
        size -= size % 2
    batches = max(min(STATISTICS_SAMPLES, len(train)) // size, 1)
    loader = sample_loader(
        train,
        replace(_plan(config, Position(), rank, world_size), global_batch_size=size),
        batches,
        training_transform(augmentation(data), data.image_size),
        _decoding(data),
        Workers(data.workers, pin_memory=pin_memory),
    )
    return loader, batches


def evaluation_batches(
    config: Config,
    index: ImageIndex,
    rank: int,
    world_size: int,
    pin_memory: bool,
    only: Some = None,
) -> Batches:
    """Return one rank's share of the images of a data set, in batches of evaluate.batch_size.

    Args:
        config: The configuration.
        index: The images.
        rank: The number of this rank.
        world_size: The number of ranks.
        pin_memory: Whether batches are put into pinned memory.
        only: The numbers of the images to take; None takes all.
    """
    data = config.data
    return evaluation_loader(
        index,
        config.evaluate.batch_size,
        evaluation_transform(augmentation(data), data.image_size),
        _decoding(data),
        Workers(data.workers, pin_memory=pin_memory),
        rank=rank,
        world_size=world_size,
        samples=only,
    )


def normalization(data: DataConfig) -> Normalize:
    """Return the layer that normalizes batches."""
    return Normalize(data.mean, data.std)


def augmentation(data: DataConfig) -> Augmentation:
    """Return how images are cut and varied."""
    return Augmentation(
        kind=data.augmentation,
        scale=(data.crop_scale[0], data.crop_scale[1]),
        ratio=(data.crop_ratio[0], data.crop_ratio[1]),
        padding=data.crop_padding,
        flip=data.flip,
        interpolation=data.interpolation,
        crop_pct=data.crop_pct,
        auto_augment=data.auto_augment,
        magnitude=data.auto_augment_magnitude,
        operations=data.auto_augment_operations,
        color_jitter=data.color_jitter,
        random_erasing=data.random_erasing,
        fill=tuple(round(255 * mean) for mean in data.mean),
    )
