"""Typed configuration: YAML files that inherit, dotted overrides, errors that say how to mend them.

    config = load("configs/digits/csam.yaml", ["sharpness.rho=0.1", "train.epochs=3"])
    config.sharpness.rho

A file may name others that it builds on (`inherits: ../base/digits.yaml`, or a list of them; paths
are relative to the file). Later ones win: inherited files in their order, then the file itself,
then the command line. Every key is declared once, below, with its meaning; a key that is not, or
a value that does not fit, is refused with its path, where it was written, and what was expected.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    model_validator,
)

from flatcal_dist.config_choices import with_chosen_only
from flatcal_dist.config_files import ConfigError, dump_yaml, parse_yaml, private_file, read_layers
from flatcal_dist.config_messages import explain
from flatcal_dist.config_types import (
    Label,
    Mean,
    Options,
    PathText,
    Ratio,
    ScoreKeys,
    Section,
    Shards,
    Share,
    Std,
    Text,
)
from flatcal_dist.files import write_text
from flatcal_dist.urls import identified, public

__all__ = ["Config", "ConfigError", "Section", "load", "parse_yaml"]

WEEK = 7 * 24 * 60.0  # minutes
MANY = 10**12  # beyond any number of images or steps


class RunConfig(Section):
    dir: PathText | None = Field(None, description="run directory; by default runs/NAME-HASH")
    start_again: int | None = Field(
        None, ge=1, le=MANY, description="begin at step 0 although the checkpoints are lost: how "
        "often the run was started so far, so that this holds for one start only"
    )  # fmt: skip
    seed: int = Field(
        0, ge=0, lt=2**64, description="seed of weights, order, augmentation and dropout"
    )
    world_size: int | None = Field(
        None, ge=1, le=2**20, description="refuse to run on another number of ranks"
    )


class DataConfig(Section):
    prepare: Literal["digits"] | None = Field(
        None, description="embedded data set whose shards are written where `train` expects them"
    )
    train: Shards | list[Shards] | None = Field(
        None, description="shards: pattern, directory, or list"
    )
    validation: Shards | list[Shards] | None = Field(None, description="shards to evaluate on")
    global_batch_size: int = Field(
        256, ge=1, le=2**24, description="images per optimizer step, all ranks"
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=2**24,
        description="images per forward pass on one rank; by default its whole share",
    )
    workers: int = Field(4, ge=0, le=1024, description="loader processes per rank")
    image_size: int = Field(224, ge=1, le=8192, description="pixels, height and width")
    channels: Literal[1, 3] = 3
    mean: list[Mean] = Field([0.485, 0.456, 0.406], description="per channel, of values in [0, 1]")
    std: list[Std] = Field([0.229, 0.224, 0.225], description="per channel, of values in [0, 1]")
    augmentation: Literal["none", "resized_crop"] = "resized_crop"
    crop_scale: list[Share] = Field([0.08, 1.0], min_length=2, max_length=2)
    crop_ratio: list[Ratio] = Field([3 / 4, 4 / 3], min_length=2, max_length=2)
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    auto_augment: Literal["none", "randaugment", "autoaugment", "trivial_augment", "augmix"] = (
        Field("none", description="after crop and flip, as torchvision has them")
    )
    auto_augment_magnitude: int = Field(
        9, ge=0, le=30, description="of randaugment, 0 to 30, and of augmix, 1 to 10"
    )
    auto_augment_operations: int = Field(2, ge=1, le=100, description="of randaugment, per image")
    color_jitter: float = Field(
        0.0,
        ge=0,
        le=10,
        description="brightness, contrast and saturation change by up to this share",
    )
    random_erasing: float = Field(
        0.0, ge=0, le=1, description="probability that a rectangle is painted in the mean colour"
    )
    mixup: float = Field(0.0, ge=0, le=1000, description="alpha of mixup; 0 for none")
    cutmix: float = Field(
        0.0, ge=0, le=1000, description="alpha of cutmix; 0 for none; with mixup: in turn"
    )
    mix_probability: float = Field(1.0, ge=0, le=1, description="that a pair of images is mixed")
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_pct: float = Field(0.875, gt=0, le=1, description="share of the image kept in evaluation")
    decoder: Literal["auto", "simplejpeg", "torchvision", "pil"] = Field(
        "auto", description="of JPEGs; auto: the fastest that is installed; others are Pillow's"
    )
    max_pixels: int = Field(
        89_478_485, ge=1, le=178_956_970, description="larger images count as bad; bounds memory"
    )
    max_bad_samples: int = Field(
        100,
        ge=0,
        le=MANY,
        description="different images that may be replaced before training stops",
    )
    shuffle_window: int = Field(
        65536,
        ge=1,
        le=MANY,
        description="images shuffled together; shards are read about this far apart",
    )
    reader: Literal["auto", "indexed", "streaming"] = Field(
        "auto", description="of `train`; auto: streaming for URLs and commands, indexed for paths"
    )
    epoch_samples: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="streaming: images of an epoch; by default _info.json counts them",
    )
    shuffle_buffer: int = Field(
        2048,
        ge=1,
        le=10**7,
        description="streaming: encoded images that a worker holds, to shuffle them",
    )
    cache: PathText | None = Field(
        None, description="directory that keeps shards from URLs; reader=indexed downloads all"
    )
    cache_limit: int | None = Field(
        None, ge=1, le=10**9, description="GiB; what was unused longest goes"
    )
    stall_timeout: float = Field(
        30.0, ge=0.1, le=60, description="seconds without a byte until a URL is opened again"
    )
    retries: int = Field(
        5, ge=0, le=6, description="of a shard's URL, with pauses that double from half a second"
    )
    allow_pipe: bool = Field(
        False, description="whether `pipe:COMMAND` as a shard's name may run that command"
    )

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError("crop_scale must satisfy 0 < smallest <= largest <= 1")
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError("crop_ratio must satisfy 0 < smallest <= largest")
        random = self.auto_augment != "none" or self.color_jitter or self.random_erasing
        if self.augmentation == "none" and random:
            raise ValueError(
                "augmentation=none varies nothing: leave out auto_augment, color_jitter and "
                "random_erasing, or set augmentation=resized_crop"
            )
        if self.auto_augment == "augmix" and not 1 <= self.auto_augment_magnitude <= 10:
            raise ValueError(
                "auto_augment=augmix needs auto_augment_magnitude between 1 and 10, not "
                f"{self.auto_augment_magnitude}"
            )
        return self


class ModelConfig(Section):
    name: Text = Field("resnet50", description="'mlp', any network of timm, torchvision:NAME")
    num_classes: int = Field(1000, ge=2, le=1_000_000)
    options: Options = Field({}, description="passed to the builder of the network")
    channels_last: bool = Field(False, description="memory format; faster for convolutions on GPU")


class OptimizerConfig(Section):
    name: Text = Field("sgd", description="'sgd' (no Nesterov), or any optimizer of timm")
    learning_rate: float = Field(0.1, gt=0, le=1e6)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(
        0.0, ge=0, le=1e6, description="not applied to biases and norm weights"
    )
    clip_norm: float | None = Field(
        None, gt=0, le=1e30, description="of the descent gradient, all ranks'"
    )
    warmup_epochs: float = Field(0.0, ge=0, le=1e6)
    options: Options = Field({}, description="passed to the optimizer, such as betas")


class SharpnessConfig(Section):
    rule: Literal["none", "sam", "asam", "csam", "looksam", "gsam", "momentum_sam"] = "none"
    rho: float = Field(0.05, ge=0, le=1000, description="length of the perturbation")
    rho_schedule: Literal["constant", "learning_rate"] = Field(
        "constant", description="learning_rate: from rho to rho_min as the learning rate falls"
    )
    rho_min: float = Field(0.0, ge=0, le=1000, description="of rho_schedule=learning_rate")
    gamma: float = Field(1.0, ge=0, le=2, description="CSAM's exponent; 0 is SAM")
    eta: float = Field(0.01, ge=0, le=1000, description="ASAM's, added to absolute weights")
    alpha: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="weight of LookSAM's remembered gradient, by default 0.7, or of the part of "
        "the gradient that GSAM takes away, by default 0.4",
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="of Momentum-SAM; best that of optimizer.momentum"
    )
    every: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="perturb in each so-manieth step only; by default 1, LookSAM's 5",
    )
    scope: Literal["global", "rank", "node"] | Annotated[int, Field(ge=1, le=2**20)] = Field(
        "global", description="whose gradient perturbs: of all ranks, each one's own, a number's"
    )
    per_micro_batch: bool = Field(False, description="perturb for each micro-batch by itself")
    allow_other_samples: bool = Field(
        False, description="go on although another number of samples makes a perturbation"
    )


class TrainConfig(Section):
    engine: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = "ddp"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    epochs: int = Field(90, ge=1, le=10**6)
    max_steps: int | None = Field(
        None, ge=1, le=MANY, description="optimizer steps; wins over epochs"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    log_every_steps: int = Field(50, ge=1, le=MANY)
    validate_every_epochs: int | None = Field(
        1, ge=1, le=MANY, description="null: only the report at the end"
    )
    checkpoint_every_epochs: int = Field(1, ge=1, le=MANY)
    checkpoint_every_steps: int | None = Field(
        None, ge=1, le=MANY, description="within epochs, too"
    )
    keep_checkpoints: int = Field(2, ge=1, le=MANY, description="the newest so many")
    keep_best: Literal["accuracy", "nll"] | None = Field(
        None,
        description="keep the checkpoint of the best validation as well; each is then saved",
    )
    average: Literal["none", "ema"] = Field(
        "none", description="ema: of the weights; it is what is validated, reported and exported"
    )
    average_decay: float = Field(0.9999, ge=0, lt=1, description="of the average, per step")
    average_norm_statistics: Literal["reestimate", "average"] = Field(
        "reestimate",
        description="of batch norm in the average: from training images, or averaged (cheaper)",
    )
    stop_after_minutes: float | None = Field(
        None,
        gt=0,
        le=52 * WEEK,
        description="of this start; then a checkpoint, and the end as preempted",
    )
    stop_margin_minutes: float = Field(
        5.0, ge=0, le=WEEK, description="before the end of a SLURM job, to stop likewise"
    )
    hang_minutes: float | None = Field(
        30.0, ge=0.01, le=WEEK, description="without a step, until a rank ends itself and says "
        "where it was; longer than a validation and a save take"
    )  # fmt: skip
    collective_timeout_minutes: float = Field(
        10.0, ge=0.01, le=WEEK, description="that a rank waits for the others"
    )


class EvaluateConfig(Section):
    at_end: bool = Field(True, description="evaluate and write the report when training ends")
    batch_size: int = Field(256, ge=1, le=2**24, description="images per forward pass on one rank")
    folds: int = Field(5, ge=2, le=1000, description="of the cross-fitted temperature")
    confidence: ScoreKeys = Field(
        [], description="scores to compute beside those of logits: [trust_score, mc_dropout]"
    )


class WandbConfig(Section):
    mode: Literal["offline", "online", "disabled"] = Field(
        "offline", description="online: offline where W&B cannot be reached"
    )
    project: Label = Field("flatcal_dist", pattern=r"^[^/\\#?%:]+$")
    name: Label | None = None
    group: Label | None = Field(None, description="runs shown together; a sweep's, its name")
    tags: list[Annotated[Text, Field(max_length=64)]] = Field([], max_length=1000)
    log_checkpoints: bool = Field(False, description="send checkpoints as artifacts")
    finish_seconds: float = Field(
        30.0, gt=0, le=600, description="that the end of a run waits for W&B at most"
    )


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sharpness: SharpnessConfig = SharpnessConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _combines(self) -> "Config":
        sharpness = self.sharpness
        scheduled = sharpness.rule != "none" and sharpness.rho_schedule == "learning_rate"
        if scheduled and sharpness.rho_min > sharpness.rho:
            raise ValueError(
                f"sharpness.rho_min={sharpness.rho_min} is above sharpness.rho={sharpness.rho}: "
                "rho falls from the second to the first"
            )
        if self.sharpness.rule == "csam" and self.train.label_smoothing > 0:
            raise ValueError(
                "sharpness.rule=csam is defined for hard labels only: set train.label_smoothing=0, "
                "or sharpness.rule=sam"
            )
        if self.train.keep_best and self.train.validate_every_epochs is None:
            raise ValueError("train.keep_best needs validation: set train.validate_every_epochs")
        if self.sharpness.rule == "csam" and (self.data.mixup or self.data.cutmix):
            raise ValueError(
                "sharpness.rule=csam is defined for hard labels only, and mixing makes soft ones: "
                "set data.mixup=0 and data.cutmix=0, or sharpness.rule=sam"
            )
        return self


# What may differ between two starts of one run: it changes where or how fast the run computes, or
# who watches, not what it is meant to compute (batch norm and dropout do see the micro-batches).
# Everything else belongs to the identity of the run.
MAY_CHANGE = (
    "run.dir", "run.world_size", "run.start_again", "data.workers", "data.micro_batch_size",
    "data.max_bad_samples", "data.cache", "data.cache_limit", "data.stall_timeout", "data.retries",
    "data.allow_pipe",
    "train.log_every_steps", "train.validate_every_epochs", "train.checkpoint_every_epochs",
    "train.checkpoint_every_steps", "train.keep_checkpoints", "train.keep_best",
    "train.stop_after_minutes", "train.stop_margin_minutes", "train.hang_minutes",
    "train.collective_timeout_minutes", "sharpness.allow_other_samples", "evaluate", "wandb",
)  # fmt: skip


def load(path: str | Path | None, overrides: Sequence[str] = (), recorded: bool = False) -> Config:
    """Read a configuration file, and apply overrides of the form `key.sub=value`.

    Keys that only another choice reads have their defaults in the result.

    Args:
        path: The file; None for the defaults.
        overrides: Values that win over those of the file.
        recorded: Whether it is the file of a run that has begun. Values that it does not read are
            then passed over, because earlier versions recorded them.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value does not fit.
    """
    if recorded and path and Path(path).is_fifo():  # it may never end
        raise ConfigError(f"{path} is a named pipe: expected the file that the run wrote")
    layers = read_layers(Path(path) if path is not None else None, overrides)
    try:
        config = Config.model_validate(layers.values)
    except ValidationError as error:
        raise ConfigError(explain(error, layers, list(_known_keys()))) from None
    config = with_chosen_only(config, layers, recorded)
    if config.run.dir is None and path:
        folder, stem = (_word(name) for name in (Path(path).resolve().parent.name, Path(path).stem))
        name = f"{folder}_{stem}-{fingerprint(config)}"
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": f"runs/{name}"})}
        )
    return config


def _word(text: str) -> str:
    """A part of a directory's name; a configuration read from a pipe has an odd one."""
    return re.sub(r"[^\w.+-]+", "_", text)


def fingerprint(config: Config) -> str:
    """Eight hexadecimal digits that identify what the run computes, whatever its directory."""
    kept = {k: identified(v) for k, v in flatten(config) if not _may_change(k)}
    text = json.dumps(kept, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(old: Config, new: Config) -> list[str]:
    """What keeps `new` from continuing the run of `old`: one line per key.

    Another engine does not: a checkpoint is resharded. It has a fingerprint of its own all the
    same, so that engines are compared in different directories. Neither do renewed credentials.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    return [
        f"{key}: the run has {public(before.get(key))!r}, now {public(after.get(key))!r}"
        + " (they differ in what is not shown)"
        * (public(before.get(key)) == public(after.get(key)))
        for key in sorted(before.keys() | after.keys())
        if identified(before.get(key)) != identified(after.get(key))
        and not _may_change(key)
        and key != "train.engine"
    ]


def to_yaml(config: Config) -> str:
    """The resolved configuration, loadable again, without the credentials of URLs."""
    return dump_yaml(public(config.model_dump()))


def write(config: Config, file: Path) -> None:
    """Write it resolved; credentials of URLs beside it, into a file that its owner alone may read.

    `load` finds both. Raises WriteError.
    """
    if private := _only_private(config.model_dump()):
        write_text(private_file(file), dump_yaml(private), private=True)
    else:
        private_file(file).unlink(missing_ok=True)
    write_text(file, to_yaml(config))


def _only_private(values: dict) -> dict:
    """What `public` changes, in the sections where it stands."""
    opened = {k: _only_private(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {k: v for k, v in opened.items() if v and v != public(values[k])}


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value, sections and options opened."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(inner, f"{path}.{key}" if path else str(key))
        else:
            yield path, value

    yield from walk(config.model_dump(), "")


class CommandLine(argparse.ArgumentParser):
    """Leaves what to say, and on which rank, to the program."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def command_line(description: str, default_config: Path | None = None) -> argparse.ArgumentParser:
    """The options that every recipe has; `overrides` takes the dotted ones."""
    parser = CommandLine(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=default_config, metavar="FILE")
    parser.add_argument("--print-config", action="store_true", help="print it resolved, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, two steps on made-up images, stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser


def _may_change(key: str) -> bool:
    return any(key == entry or key.startswith(entry + ".") for entry in MAY_CHANGE)


def _known_keys(section: type[BaseModel] = Config, path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _known_keys(inner, f"{path}{name}.")
        else:
            yield path + name
