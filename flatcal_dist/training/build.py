"""Build network, engine, rule and step of a configuration."""

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from flatcal_dist.calibration.confidence.sources import requested
from flatcal_dist.config import Config
from flatcal_dist.evaluation.predicting import check_sources
from flatcal_dist.networks.registry import build, check_images
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.sharpness import Engine, SharpnessAwareStep
from flatcal_dist.sharpness.engines.registry import ENGINES, Plan
from flatcal_dist.sharpness.scope import ranks_of
from flatcal_dist.training.optimizers import build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_step(
    config: Config,
    accelerator: Accelerator,
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> SharpnessAwareStep:
    """Return the step of a configuration, with the same initial weights on every rank.

    `wrap` is applied to the network before the engine gets it.
    """
    data, model, sharpness = config.data, config.model, config.sharpness
    wanted = (model.name, model.num_classes, data.channels, data.image_size, model.options)
    on_all_ranks(partial(check_images, *wanted))
    torch.manual_seed(config.run.seed)
    network = on_all_ranks(partial(build, *wanted))
    if config.evaluate.at_end:  # before hours of training, not after
        scores = requested(config.evaluate.confidence)
        on_all_ranks(lambda: check_sources(config, network, scores))
    if model.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = wrap(network).train()
    engine = build_engine(config, network, accelerator)
    rule, objective = sharpness.build(), config.objective.build()
    return on_all_ranks(
        lambda: SharpnessAwareStep(
            engine,
            rule,
            loss=None if rule and rule.own_loss else objective,
            scope=sharpness.scope,
            per_micro_batch=sharpness.per_micro_batch,
            clip_norm=config.optimizer.clip_norm,
        )
    )


def build_engine(config: Config, network: nn.Module, accelerator: Accelerator) -> Engine:
    """Build the engine that `train.engine` names, around the network, with its optimizer."""
    world_size, size = accelerator.num_processes, config.data.image_size
    ranks = ranks_of(config.sharpness.scope, world_size)
    grouped = config.sharpness.rule != "none" and 1 < ranks < world_size
    plan = Plan(
        accelerator,
        partial(build_optimizer, config.optimizer),
        DTYPES[config.train.precision],
        config.optimizer.clip_norm,
        ranks if grouped else None,
        (config.data.channels, size, size),
    )
    return ENGINES[config.train.engine].build(network, plan)


def samples_per_perturbation(config: Config, world_size: int) -> int | None:
    """m of m-sharpness; None without a perturbation."""
    if config.sharpness.rule == "none":
        return None
    ranks = ranks_of(config.sharpness.scope, world_size)
    samples = config.data.global_batch_size * ranks // world_size
    if config.sharpness.per_micro_batch and config.data.micro_batch_size:
        return min(samples, config.data.micro_batch_size * ranks)
    return samples
