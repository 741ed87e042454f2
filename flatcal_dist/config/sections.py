"""The keys of sections without a choice, except `data`: type, bounds, default and meaning."""

from typing import Annotated, Literal

from pydantic import Field

from flatcal_dist.config.kinds import (
    MANY,
    Label,
    Options,
    PathText,
    ScoreKeys,
    Section,
    Text,
)

WEEK = 7 * 24 * 60.0  # minutes


class RunConfig(Section):
    """Which run it is, where it lies, and its seed."""

    dir: PathText | None = Field(
        None, description="The run directory. Default: runs/NAME-HASH, which follows from the rest."
    )
    start_again: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="Begin at step 0 although all checkpoints are lost. The value is how often the "
        "run was started so far, so that it holds for one start only.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**64,
        description="The seed of weights, order, augmentation and dropout.",
    )
    axes: dict[Label, Label] = Field(
        {}, description="The place of the run on each axis of its study, which sets it."
    )
    world_size: int | None = Field(
        None, ge=1, le=2**20, description="Refuse to run on another number of ranks than this."
    )


class ModelConfig(Section):
    """The network."""

    name: Text = Field(
        "resnet50",
        description="The network: one of timm's, torchvision:NAME, or one of this package, such as "
        "mlp and wrn_28_10 (flatcal_dist/networks/README.md).",
    )
    num_classes: int = Field(1000, ge=2, le=1_000_000, description="The number of classes.")
    options: Options = Field({}, description="What is passed to the builder of the network.")
    channels_last: bool = Field(
        False,
        description="Whether images lie in memory channel by channel within a pixel, which is "
        "faster for convolutions on a GPU.",
    )


class OptimizerConfig(Section):
    """The base optimizer, and the peak of its learning rate."""

    name: Text = Field(
        "sgd", description="The optimizer: 'sgd' (without Nesterov), or any of timm's."
    )
    learning_rate: float = Field(
        0.1, gt=0, le=1e6, description="The learning rate at the end of the warm-up."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="The momentum of optimizers that have it.")
    weight_decay: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="The weight decay of the weights that `decayed` names.",
    )
    decayed: Literal["matrices", "all"] = Field(
        "matrices",
        description="Which weights are decayed. matrices: not biases, norm weights, and what a "
        "network of timm exempts, such as position embeddings. all: every weight.",
    )
    layer_decay: float = Field(
        1.0,
        ge=0.01,
        le=1,
        description="What the learning rate of a layer is, as a share of that of the layer above "
        "it. 1: all layers have one rate.",
    )
    clip_norm: float | None = Field(
        None,
        gt=0,
        le=1e30,
        description="The largest norm of the descent gradient of all ranks. Default: no limit.",
    )
    warmup_epochs: float = Field(
        0.0, ge=0, le=1e6, description="In how many epochs the learning rate rises to its peak."
    )
    options: Options = Field(
        {}, description="What is passed to the optimizer besides, such as betas."
    )


class TrainConfig(Section):
    """How long and how training goes, what it saves, and when it stops."""

    engine: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = Field(
        "ddp",
        description="Who holds the weights: every rank (ddp), or parts of them (ZeRO's stages, "
        "FSDP2).",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="The precision of forward and backward passes."
    )
    epochs: int = Field(90, ge=1, le=10**6, description="How often all images are seen.")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="The number of optimizer steps. It wins over `epochs`.",
    )
    log_every_steps: int = Field(
        50, ge=1, le=MANY, description="After how many steps figures are logged."
    )
    validate_every_epochs: int | None = Field(
        1,
        ge=1,
        le=MANY,
        description="After how many epochs the network is validated. null: only at the end.",
    )
    checkpoint_every_epochs: int = Field(
        1, ge=1, le=MANY, description="After how many epochs a checkpoint is written."
    )
    checkpoint_every_steps: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="After how many steps a checkpoint is written besides.",
    )
    keep_checkpoints: int = Field(
        2, ge=1, le=MANY, description="How many of the newest checkpoints are kept."
    )
    keep_best: Literal["accuracy", "nll", "refined_nll"] | None = Field(
        None,
        description="Keep the checkpoint with the best validation, too. Each validation then "
        "writes a checkpoint. refined_nll: NLL after cross-fitted temperature.",
    )
    stop_after_minutes: float | None = Field(
        None,
        gt=0,
        le=52 * WEEK,
        description="After how many minutes of this start the run writes a checkpoint and ends as "
        "preempted.",
    )
    stop_margin_minutes: float = Field(
        5.0,
        ge=0,
        le=WEEK,
        description="How many minutes before the end of a SLURM job the run does the same.",
    )
    hang_minutes: float | None = Field(
        30.0,
        ge=0.01,
        le=WEEK,
        description="Abort a rank that completes no step for this long, and print its stacks. It "
        "must exceed the time of one validation and one checkpoint.",
    )
    collective_timeout_minutes: float = Field(
        10.0, ge=0.01, le=WEEK, description="How long a rank waits for the others."
    )


class EvaluateConfig(Section):
    """The evaluation at the end."""

    at_end: bool = Field(
        True, description="Whether to evaluate and write the report when training ends."
    )
    batch_size: int = Field(
        256, ge=1, le=2**24, description="The number of images of one forward pass on one rank."
    )
    folds: int = Field(
        5, ge=2, le=1000, description="The number of folds of the cross-fitted temperature."
    )
    confidence: ScoreKeys = Field(
        [],
        description="Confidence scores to compute besides those of logits, such as [trust_score, "
        "mc_dropout].",
    )


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = Field(
        "offline",
        description="Whether W&B is used. online: also offline, where W&B cannot be reached.",
    )
    project: Label = Field(
        "flatcal_dist", pattern=r"^[^/\\#?%:]+$", description="The project in W&B."
    )
    name: Label | None = Field(None, description="The name of the run in W&B.")
    group: Label | None = Field(
        None, description="Runs of one group are shown together. By default a study sets its name."
    )
    tags: list[Annotated[Text, Field(max_length=64)]] = Field(
        [], max_length=1000, description="Words by which W&B finds the run."
    )
    log_checkpoints: bool = Field(
        False, description="Whether checkpoints are sent to W&B as artifacts."
    )
    finish_seconds: float = Field(
        30.0,
        gt=0,
        le=600,
        description="How many seconds the end of a run waits for W&B at most.",
    )
