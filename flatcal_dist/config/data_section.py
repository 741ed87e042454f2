"""The keys of the section `data`: what is read, how it is decoded and augmented."""

from typing import Literal

from pydantic import Field, model_validator

from flatcal_dist.config.kinds import (
    MANY,
    Mean,
    PathText,
    Ratio,
    Section,
    Shards,
    Share,
    Std,
)


class DataConfig(Section):
    """Images: where they lie, and how they are read, decoded and augmented."""

    prepare: Literal["digits", "digits_clean"] | None = Field(
        None,
        description="The embedded data set whose shards are written where `train` expects them: "
        "handwritten digits of which a fifth of the training labels are wrong, or none.",
    )
    train: Shards | list[Shards] | None = Field(
        None, description="The training shards: a pattern, a directory, a URL, or a list of these."
    )
    validation: Shards | list[Shards] | None = Field(
        None, description="The shards to evaluate on, named in the same ways."
    )
    holdout: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The share of the training images that is never trained on. The evaluation "
        "fits the temperature on them (TS-valid). Each class gives the same share. Default: none, "
        "and the temperature is cross-fitted on the evaluated images.",
    )
    holdout_seed: int = Field(
        0, ge=0, le=2**63 - 1, description="The seed that chooses these images."
    )
    global_batch_size: int = Field(
        256, ge=1, le=2**24, description="The number of images of one optimizer step, on all ranks."
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=2**24,
        description="The number of images of one forward pass on one rank. Default: the rank's "
        "whole share of the global batch.",
    )
    workers: int = Field(
        4, ge=0, le=1024, description="The number of loader processes of each rank."
    )
    image_size: int = Field(
        224, ge=1, le=8192, description="Height and width of an image in pixels."
    )
    channels: Literal[1, 3] = Field(3, description="1 for grey images, 3 for colour.")
    mean: list[Mean] = Field(
        [0.485, 0.456, 0.406],
        description="What is subtracted from each channel, of values in [0, 1].",
    )
    std: list[Std] = Field(
        [0.229, 0.224, 0.225], description="What each channel is divided by after that."
    )
    augmentation: Literal["none", "resized_crop", "pad_crop"] = Field(
        "resized_crop",
        description="How training images vary. resized_crop: a random crop, resized, and a flip. "
        "pad_crop: zeros are added on all sides, then a crop of image_size and a flip. none: they "
        "are resized as for evaluation.",
    )
    crop_scale: list[Share] = Field(
        [0.08, 1.0],
        min_length=2,
        max_length=2,
        description="The smallest and the largest area of a crop, as a share of the image.",
    )
    crop_ratio: list[Ratio] = Field(
        [3 / 4, 4 / 3],
        min_length=2,
        max_length=2,
        description="The smallest and the largest ratio of a crop's width to its height.",
    )
    crop_padding: int = Field(
        4, ge=0, le=1024, description="The number of pixels that pad_crop adds on each side."
    )
    flip: float = Field(0.5, ge=0, le=1, description="The probability of a horizontal flip.")
    auto_augment: Literal["none", "randaugment", "autoaugment", "trivial_augment", "augmix"] = (
        Field(
            "none",
            description="What torchvision's policy of this name does after crop and flip.",
        )
    )
    auto_augment_magnitude: int = Field(
        9,
        ge=0,
        le=30,
        description="The strength: 0 to 30 for randaugment, 1 to 10 for augmix.",
    )
    auto_augment_operations: int = Field(
        2, ge=1, le=100, description="How many operations randaugment applies to an image."
    )
    color_jitter: float = Field(
        0.0,
        ge=0,
        le=10,
        description="The largest relative change of brightness, contrast and saturation.",
    )
    random_erasing: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The probability that a rectangle is painted in the mean colour.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="How images are resized, in training and in evaluation."
    )
    crop_pct: float = Field(
        0.875,
        gt=0,
        le=1,
        description="The share of the side of an image that evaluation keeps, with "
        "data.augmentation=resized_crop. Otherwise it keeps whole images.",
    )
    decoder: Literal["auto", "simplejpeg", "torchvision", "pil"] = Field(
        "auto",
        description="What decodes JPEGs. auto: the fastest that is installed. Pillow decodes all "
        "other formats.",
    )
    max_pixels: int = Field(
        89_478_485,
        ge=1,
        le=178_956_970,
        description="An image with more pixels counts as bad. This bounds memory.",
    )
    max_bad_samples: int = Field(
        100,
        ge=0,
        le=MANY,
        description="How many different images may be replaced before training stops.",
    )
    shuffle_window: int = Field(
        65536,
        ge=1,
        le=MANY,
        description="How many images are shuffled together. Shards that lie about this far apart "
        "are read at the same time.",
    )
    reader: Literal["auto", "indexed", "memory", "streaming"] = Field(
        "auto",
        description="How `train` is read. auto: streaming for URLs and commands, else indexed. "
        "memory: as indexed, but all images are decoded once and kept, and whole batches are "
        "varied on the device.",
    )
    epoch_samples: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="The number of images of a stream's epoch. Default: the count of _info.json.",
    )
    shuffle_buffer: int = Field(
        2048,
        ge=1,
        le=10**7,
        description="How many encoded images a worker holds to shuffle a stream.",
    )
    cache: PathText | None = Field(
        None,
        description="The directory that keeps shards from URLs. With reader=indexed all of them "
        "are downloaded.",
    )
    cache_limit: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="The largest size of the cache in GiB. The least recently used shards are "
        "deleted first.",
    )
    stall_timeout: float = Field(
        30.0,
        ge=0.1,
        le=60,
        description="After how many seconds without a byte a URL is opened again.",
    )
    retries: int = Field(
        5,
        ge=0,
        le=6,
        description="How often a shard's URL is opened again after an error. The pause before it "
        "doubles each time, from half a second on.",
    )
    allow_pipe: bool = Field(
        False, description="Whether `pipe:COMMAND` as a shard's name may run that command."
    )

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"data.{name} has {len(values)} values for data.channels={self.channels}: give "
                    "one value for each channel"
                )
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("data.crop_scale must satisfy 0 < smallest <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("data.crop_ratio must satisfy 0 < smallest <= largest")
        random = self.auto_augment != "none" or self.color_jitter or self.random_erasing
        if self.augmentation == "none" and random:
            raise ValueError(
                "data.augmentation=none varies nothing: leave out data.auto_augment, "
                "data.color_jitter and data.random_erasing, or set data.augmentation=pad_crop or "
                "resized_crop"
            )
        if self.auto_augment == "augmix" and not 1 <= self.auto_augment_magnitude <= 10:
            raise ValueError(
                "data.auto_augment=augmix needs data.auto_augment_magnitude between 1 and 10, not "
                f"{self.auto_augment_magnitude}"
            )
        return self
