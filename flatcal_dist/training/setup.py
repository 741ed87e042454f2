"""What a run is made of before its directory is entered: data, network, step, schedule, average."""

from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler

from flatcal_dist import batch_sizes, inputs
from flatcal_dist.averaging.average import Average
from flatcal_dist.config import Config
from flatcal_dist.config.checking.run_length import length_of, no_average
from flatcal_dist.data import Index, steps_per_epoch
from flatcal_dist.data.shards.listing import Stream
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.sharpness import Engine, SharpnessAwareStep
from flatcal_dist.training.build import build_step
from flatcal_dist.training.objectives import refuse_unfit
from flatcal_dist.training.on_device import OnDevice, statistics_inputs
from flatcal_dist.training.optimizers import build_schedule
from flatcal_dist.training.watchdog import Watchdog


@dataclass(frozen=True)
class Setup:
    """The parts of a run, as they are at step 0.

    Attributes:
        config: The configuration.
        directory: The run directory, which is not entered yet.
        accelerator: This rank among the others.
        train: The training data.
        validation: The data to validate on.
        step: The step, with engine, network and optimizer.
        schedule: The schedule of the learning rate.
        on_device: Brings batches to the device of this rank.
        average: The average of the weights, or None.
        epoch_steps: The number of steps of an epoch.
        total_steps: The number of steps of the run.
    """

    config: Config
    directory: RunDirectory
    accelerator: Accelerator
    train: Index | Stream
    validation: Index
    step: SharpnessAwareStep
    schedule: Scheduler
    on_device: OnDevice
    average: Average | None
    epoch_steps: int
    total_steps: int

    @property
    def engine(self) -> Engine:
        return self.step.engine

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.accelerator.is_main_process


def prepare(
    config: Config, directory: RunDirectory, accelerator: Accelerator, watchdog: Watchdog
) -> Setup:
    """Open the data, and build everything that a run needs. Called by all ranks.

    Args:
        config: The configuration.
        directory: The run directory.
        accelerator: This rank among the others.
        watchdog: It is told that this rank is alive while shards are downloaded.

    Raises:
        FailedTogether: Something does not fit; the message names it.
    """
    train, validation = _open_data(config, accelerator, watchdog)
    objective = on_all_ranks(config.objective.build)
    on_all_ranks(partial(refuse_unfit, objective, config, train, accelerator.num_processes))
    batch_sizes.check_room(config)
    step = build_step(config, accelerator)
    epoch_steps = steps_per_epoch(len(train), config.data.global_batch_size)
    total_steps = config.train.max_steps or config.train.epochs * epoch_steps
    schedule = on_all_ranks(
        lambda: build_schedule(config, step.engine.optimizer, total_steps, epoch_steps)
    )
    if remark := no_average(config, length_of(config, total_steps, epoch_steps)):
        accelerator.print(f"warning: {remark}")  # where train.max_steps cuts a run short
    on_device = OnDevice(config, accelerator.device)
    step.loss.begin(len(train), accelerator.device)
    average: Average | None = None
    if (rule := config.average.build()) is not None:
        reestimate = rule.norm_statistics == "reestimate"
        batches = partial(statistics_inputs, config, train, accelerator, on_device)
        average = Average(step.engine, rule, batches if reestimate else None)
    return Setup(
        config, directory, accelerator, train, validation, step, schedule, on_device, average,
        epoch_steps, total_steps,
    )  # fmt: skip


def _open_data(
    config: Config, accelerator: Accelerator, watchdog: Watchdog
) -> tuple[Index | Stream, Index]:
    """Return training and validation data. Shards are written or downloaded first if need be."""

    def make_digits() -> None:
        if accelerator.is_main_process:
            inputs.prepare(config.data)

    on_all_ranks(make_digits)
    inputs.download(config.data, accelerator, "train", "validation", alive=watchdog.beat)
    classes = config.model.num_classes
    opened = on_all_ranks(
        lambda: (
            inputs.open_training(config.data, classes),
            inputs.open_index(config.data, "validation", classes),
        )
    )
    on_all_ranks(partial(inputs.check_classes, config.data))
    inputs.agree_on_decoder(config.data)
    return opened
