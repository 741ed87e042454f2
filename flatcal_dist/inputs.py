"""From the configuration's data section to indexes and loaders, for training and evaluation."""

from pathlib import Path

from accelerate.utils import gather_object

from flatcal_dist.config import Config, DataConfig
from flatcal_dist.data import (
    Augmentation,
    DataError,
    Index,
    Mixing,
    Normalize,
    Position,
    describe_decoder,
    evaluation_loader,
    evaluation_transform,
    expand,
    load_index,
    prepare_digits,
    steps_per_epoch,
    training_loader,
    training_transform,
)
from flatcal_dist.data.loader import Batches
from flatcal_dist.data.order import micro_batch_count
from flatcal_dist.distributed import on_all_ranks

HOW_TO_PREPARE = """
Prepare ImageNet (an ImageFolder tree, one folder a class) once, as WebDataset shards:
  flatcal shard PATH/TO/train      data/imagenet --split train
  flatcal shard PATH/TO/validation data/imagenet --split validation
or name shards that you have, by pattern or directory, after `flatcal index SHARDS`:
  data.train=PATTERN data.validation=PATTERN
Without any data, configs/digits/csam.yaml runs as it is, and --dry-run needs none."""


def prepare(data: DataConfig) -> None:
    """Write the embedded data set where `data.train` expects it, unless it is there."""
    if data.prepare == "digits":
        if not isinstance(data.train, str):
            raise DataError(
                "data.prepare=digits needs data.train to be one pattern or directory, not "
                f"{data.train}"
            )
        train = Path(data.train).expanduser()
        is_pattern = train.suffix == ".tar" or any(sign in train.name for sign in "*?[{")
        prepare_digits(train.parent if is_pattern else train)


def open_index(data: DataConfig, split: str, classes: int) -> Index:
    """The index of the shards that `data.train` or `data.validation` names. Raises DataError."""
    pattern = getattr(data, split)
    if pattern is None:
        raise DataError(f"data.{split} names no shards.{HOW_TO_PREPARE}")
    try:
        shards = expand(pattern, split)
    except DataError as error:
        raise DataError(
            f"data.{split}: {error} (Relative paths start at the working directory, {Path.cwd()}.)"
            f"{HOW_TO_PREPARE}"
        ) from None
    return load_index(shards, classes)


def agree_on_decoder(data: DataConfig) -> None:
    """Called by all ranks. Raises FailedTogether unless they have the decoder, and the same."""
    mine = on_all_ranks(lambda: describe_decoder(data.decoder))
    found = sorted(set(gather_object([mine])))

    def check() -> None:
        if len(found) > 1:
            raise DataError(
                f"the ranks would decode images by different decoders ({', '.join(found)}): "
                "install the same packages on all machines, or set data.decoder=pil"
            )

    on_all_ranks(check)


def micro_batch_size(data: DataConfig, world_size: int) -> int:
    """Images per forward pass on a rank: as configured, or a rank's whole share."""
    return data.micro_batch_size or -(-data.global_batch_size // world_size)


def batch_arithmetic(config: Config, world_size: int, images: int | None) -> str:
    """How the global batch is made up, in words; `images` of the training data, where known."""
    data, train = config.data, config.train
    size = data.global_batch_size
    count = micro_batch_count(size, micro_batch_size(data, world_size), world_size)
    if mixing(data, config.model.num_classes) and size % (2 * world_size * count):
        raise DataError(
            f"data.mixup and data.cutmix mix pairs of images, but {size} images on {world_size} "
            f"ranks in {count} micro-batches each are not an even number per micro-batch: make "
            f"data.global_batch_size a multiple of {2 * world_size * count}, or choose another "
            "data.micro_batch_size"
        )
    share = f"{size / world_size:g}"
    text = (
        f"a step takes {size} images: {world_size} rank{'s' * (world_size > 1)} x {share} images, "
        f"in {count} micro-batch{'es' * (count > 1)} of {size / world_size / count:g} on a rank"
    )
    if images is None:
        length = f"{train.max_steps} steps" if train.max_steps else f"{train.epochs} epochs"
        return f"{text}; {length} (no training data found yet, so their number of images is open)"
    steps = steps_per_epoch(images, size)
    total = train.max_steps or train.epochs * steps
    return (
        f"{text}; {images:,} images make {steps:,} steps an epoch ({images - steps * size} images "
        f"of each epoch's order are left over); {total:,} steps in all, {total / steps:g} epochs"
    )


def training_batches(
    config: Config, index: Index, start: Position, rank: int, world_size: int, pin_memory: bool
) -> Batches:
    data = config.data
    return training_loader(
        index,
        seed=config.run.seed,
        global_batch_size=data.global_batch_size,
        micro_batch_size=micro_batch_size(data, world_size),
        transform=training_transform(augmentation(data), data.image_size),
        channels=data.channels,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        start=start,
        rank=rank,
        world_size=world_size,
        window=data.shuffle_window,
        decoder=data.decoder,
        max_pixels=data.max_pixels,
        workers=data.workers,
        pin_memory=pin_memory,
    )


def evaluation_batches(
    config: Config, index: Index, rank: int, world_size: int, pin_memory: bool
) -> Batches:
    data = config.data
    return evaluation_loader(
        index,
        batch_size=config.evaluate.batch_size,
        transform=evaluation_transform(augmentation(data), data.image_size),
        channels=data.channels,
        decoder=data.decoder,
        max_pixels=data.max_pixels,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        pin_memory=pin_memory,
    )


def normalization(data: DataConfig) -> Normalize:
    return Normalize(data.mean, data.std)


def augmentation(data: DataConfig) -> Augmentation:
    return Augmentation(
        kind=data.augmentation,
        scale=tuple(data.crop_scale),
        ratio=tuple(data.crop_ratio),
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


def mixing(data: DataConfig, classes: int) -> Mixing | None:
    if not (data.mixup or data.cutmix):
        return None
    return Mixing(classes, data.mixup, data.cutmix, data.mix_probability)
