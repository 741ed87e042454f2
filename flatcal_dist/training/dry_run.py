"""`--dry-run` builds everything, takes two steps on made-up images, and describes the run."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from flatcal_dist import batch_sizes, inputs
from flatcal_dist.config import Config
from flatcal_dist.config.checking.run_length import length_of, no_average, refuse_short
from flatcal_dist.data import DataError, steps_per_epoch
from flatcal_dist.data.order import micro_batch_count, micro_batches, rank_share
from flatcal_dist.files import write_json
from flatcal_dist.networks.evaluation_mode import in_evaluation_mode
from flatcal_dist.objectives import Targets
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.sharpness.engines.registry import ENGINES
from flatcal_dist.training.build import build_step

STEPS = 2
CPU_IMAGES = 2  # in a micro-batch on a CPU; batch norm needs two
CPU_MICRO_BATCHES = 2
TIMED_STEPS, TIMED_IMAGES = 6, 32  # for an estimate; the first step is left out


def dry_run(config: Config, accelerator: Accelerator, timing: Path | None = None) -> None:
    """Print batch arithmetic, parameters, FLOPs, memory and time of two steps.

    It writes nothing, except how long the run would take, into the file `timing` if one is named.
    """
    # The import takes seconds, and prints to standard output.
    from deepspeed.profiling.flops_profiler import get_model_profile

    say = accelerator.print
    objective = config.objective.build()
    images = _images(config)
    say(batch_sizes.batch_arithmetic(config, accelerator.num_processes, images, objective))
    if images is not None:
        say(phases_in_words(config, steps_per_epoch(images, config.data.global_batch_size)))
    say(batch_sizes.check_room(config))
    step = build_step(config, accelerator)
    module = step.engine.module
    sizes = _micro_batch_sizes(config, accelerator)
    timed = _micro_batch_sizes(config, accelerator, TIMED_IMAGES, 1)
    step.loss.begin(max(*sizes, *timed), accelerator.device)
    # The module of ZeRO holds low-precision weights, and nothing casts the images here.
    # A norm without running statistics needs at least two images.
    two = _made_up(config, 2, accelerator.device)[0].to(next(module.parameters()).dtype)
    with in_evaluation_mode(module):
        flops, macs, parameters = get_model_profile(
            module, args=[two], print_profile=False, as_string=False, warm_up=0
        )
    flops, macs = flops / 2, macs / 2
    forwards, passes = _passes(step, config, len(sizes))
    step_flops = forwards * flops * config.data.global_batch_size * _images_beside(config)
    say(
        f"network {config.model.name}: {parameters:,} parameters; forward, an image takes "
        f"{_scaled(flops)}FLOP ({_scaled(macs)}MAC); a step is {passes}, on average "
        f"{_scaled(step_flops)}FLOP over all ranks"
    )
    seconds = [_timed_step(step, config, sizes, accelerator.device) for _ in range(STEPS)]
    say(
        f"{STEPS} steps on made-up images, {sum(sizes)} per rank in {len(sizes)} micro-batches "
        f"({step.engine.device.type}, {config.train.precision}): "
        + ", ".join(f"{value:.2f} s" for value in seconds)
    )
    say(memory_in_words(step, config.train.engine))
    if timing is not None:
        estimate = time_of_run(step, config, accelerator, timed, images)
        if accelerator.is_main_process:
            write_json(timing, estimate)
    say("dry run: nothing was written" if timing is None else f"dry run: wrote {timing} alone")


def time_of_run(
    step: SharpnessAwareStep,
    config: Config,
    accelerator: Accelerator,
    sizes: list[int],
    images: int | None,
) -> dict[str, float | int | None]:
    """Measure some steps, and return `step_seconds`, `steps` and `seconds` of the whole run.

    A step on a CPU is measured on a part of its images and multiplied. The estimate leaves out
    start-up, loading, validation and evaluation. `seconds` is None where the number of images is
    not known.

    Args:
        step: The step, ready to be taken.
        config: The configuration of the run.
        accelerator: The ranks.
        sizes: The sizes of this rank's micro-batches in a measured step.
        images: The number of training images.
    """
    share = -(-config.data.global_batch_size // accelerator.num_processes)
    times = [_timed_step(step, config, sizes, accelerator.device) for _ in range(TIMED_STEPS)]
    seconds = statistics.median(times[1:]) * share / sum(sizes)
    epoch = steps_per_epoch(images, config.data.global_batch_size) if images else None
    steps = config.train.max_steps or (config.train.epochs * epoch if epoch else None)
    whole = None if steps is None else seconds * steps
    return {"step_seconds": seconds, "steps": steps, "seconds": whole}


def phases_in_words(config: Config, epoch_steps: int) -> str:
    """Say how many weights are averaged in a run with this many steps in an epoch.

    Raises ConfigError if the run is too short for its schedule.
    """
    length = length_of(
        config, config.train.max_steps or config.train.epochs * epoch_steps, epoch_steps
    )
    refuse_short(config, length)
    if remark := no_average(config, length):
        return f"warning: {remark}"
    if length.snapshots is None:
        return f"schedule.name={config.schedule.name}, average.name={config.average.name}"
    count = length.snapshots.count(length.epoch, length.total)
    return (
        f"schedule.name={config.schedule.name}; {count} weights are averaged, at the ends of "
        f"epochs after {length.snapshots.begin / length.epoch:g}"
    )


def _scaled(count: float) -> str:
    power = min(int(math.log10(max(count, 1)) // 3), 6)
    return f"{count / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def _images(config: Config) -> int | None:
    """Return the number of training images, or None if this machine alone cannot tell."""
    if inputs.remote(config.data.train or []):
        return config.data.epoch_samples
    try:
        return len(inputs.open_index(config.data, "train", config.model.num_classes))
    except DataError:
        return None


def _passes(step: SharpnessAwareStep, config: Config, micro_batches: int) -> tuple[float, str]:
    """Return the cost of a step, on average, in forward passes over its images, and in words."""
    rule, objective = step.rule, step.loss
    looks = objective.whole_batch and micro_batches > 1
    each = 3.0 + looks  # a backward pass costs two forward ones
    ahead = ", each behind one more forward pass" if looks else ""
    if rule is None or rule.ascent_share == 0:
        return each, f"a forward and a backward pass{ahead}"
    words = f"two forward and two backward passes{ahead}"
    if rule.ascent_share < 1:
        words += f" (the first over {rule.ascent_share:g} of the batch)"
    if rule.every > 1:
        words += f" in one of {rule.every} steps, one of each in the others"
    begins, ends = config.sharpness.phase
    if begins > 0 or ends is not None:
        words += f", from epoch {begins:g}" + (f" to epoch {ends:g}" if ends is not None else "")
    return each * (1 + rule.ascent_share / rule.every), words


def _images_beside(config: Config) -> int:
    """Return how many images the network sees for each image of the batch."""
    mixing = config.mixing.mixing(config.model.num_classes)
    return 2 if mixing is not None and mixing.beside is not None else 1


def _micro_batch_sizes(
    config: Config,
    accelerator: Accelerator,
    largest: int = CPU_IMAGES,
    most: int = CPU_MICRO_BATCHES,
) -> list[int]:
    """Return the sizes of this rank's micro-batches: on a CPU `most`, and none over `largest`."""
    data, world_size = config.data, accelerator.num_processes
    micro = batch_sizes.micro_batch_size(data, world_size)
    count = micro_batch_count(data.global_batch_size, micro, world_size)
    share = rank_share(
        torch.arange(data.global_batch_size).numpy(), accelerator.process_index, world_size
    )
    sizes = [len(part) for part in micro_batches(share, count)]
    if accelerator.device.type == "cpu":
        sizes = [min(size, largest) for size in sizes[:most]]
    return sizes


def _made_up(config: Config, images: int, device: torch.device) -> tuple[Tensor, Targets]:
    data = config.data
    shape = (images, data.channels, data.image_size, data.image_size)
    labels = torch.randint(config.model.num_classes, (images,), device=device)
    layout = torch.channels_last if config.model.channels_last else torch.contiguous_format
    targets = Targets(labels, torch.arange(images, device=device))
    return torch.randn(shape, device=device).contiguous(memory_format=layout), targets


def _timed_step(
    step: SharpnessAwareStep, config: Config, sizes: list[int], device: torch.device
) -> float:
    start = time.monotonic()
    step([_made_up(config, size, device) for size in sizes])  # ends with a wait for the device
    return time.monotonic() - start


def memory_in_words(step: SharpnessAwareStep, engine: str) -> str:
    """Say how much memory weights, gradients, optimizer state and the backup take on one rank."""
    weights = sum(w.numel() * w.element_size() for w in step.engine.module.parameters())
    state = sum(t.numel() * t.element_size() for t in _tensors(step.engine.optimizer.state))
    needs_backup = step.rule is not None and not ENGINES[engine].has_master
    backup = weights if needs_backup else 0
    text = (
        f"memory per rank: weights {weights / 2**20:,.1f} MiB, gradients the same, optimizer state "
        f"{state / 2**20:,.1f} MiB, copy of the weights while they are perturbed "
        f"{backup / 2**20:,.1f} MiB; besides activations"
    )
    if torch.cuda.is_available():
        return f"{text}; peak on the device {torch.cuda.max_memory_allocated() / 2**30:,.2f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{text}; peak of this process {peak / 2**30:,.2f} GiB"


def _tensors(state: dict) -> Iterator[Tensor]:
    for value in state.values():
        yield from (tensor for tensor in value.values() if isinstance(tensor, Tensor))
