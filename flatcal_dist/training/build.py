"""From a configuration to network, engine, rule and step: where an engine is chosen."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.calibration.confidence.sources import requested
from flatcal_dist.config import Config
from flatcal_dist.evaluation.predicting import check_sources
from flatcal_dist.networks.registry import build, in_evaluation_mode
from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.sharpness import Engine, SharpnessAwareStep
from flatcal_dist.sharpness.engines.replicated import ReplicatedEngine
from flatcal_dist.sharpness.outputs import logits_of
from flatcal_dist.sharpness.scope import ranks_of
from flatcal_dist.training.optimizers import build_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_step(
    config: Config,
    accelerator: Accelerator,
    wrap: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> SharpnessAwareStep:
    """Network, engine and step of a configuration, the same initial weights on every rank.

    wrap: what to put around the network before an engine gets it.
    """
    torch.manual_seed(config.run.seed)
    data, model, sharpness = config.data, config.model, config.sharpness
    network = on_all_ranks(
        lambda: build(model.name, model.num_classes, data.channels, data.image_size, model.options)
    )
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
    """The engine that `train.engine` names, around the network, with its optimizer."""
    name, dtype = config.train.engine, DTYPES[config.train.precision]
    if name == "ddp":
        prepared = accelerator.prepare_model(network)  # device, autocast, DistributedDataParallel
        if isinstance(prepared, DistributedDataParallel):
            size = config.data.image_size
            arrange_buckets(prepared, (config.data.channels, size, size), accelerator.device)
        return ReplicatedEngine(prepared, build_optimizer(config.optimizer, network), dtype)
    if name == "fsdp2":
        from flatcal_dist.sharpness.engines.fsdp2 import ShardedEngine
        from flatcal_dist.sharpness.engines.fsdp2_start import shard

        world_size = accelerator.num_processes
        ranks = ranks_of(config.sharpness.scope, world_size)
        grouped = ranks if config.sharpness.rule != "none" and 1 < ranks < world_size else None
        sharded = shard(network, accelerator.device, dtype, ranks_per_group=grouped)
        return ShardedEngine(sharded, build_optimizer(config.optimizer, sharded), dtype)
    from flatcal_dist.sharpness.engines.zero import (  # DeepSpeed takes seconds
        ZeroEngine,
        start_zero,
    )

    network = network.to(accelerator.device)
    optimizer = build_optimizer(config.optimizer, network)
    stage = int(name.removeprefix("zero"))
    return ZeroEngine(start_zero(network, optimizer, stage, dtype, config.optimizer.clip_norm))


def arrange_buckets(
    model: DistributedDataParallel, shape: tuple[int, ...], device: torch.device
) -> None:
    """Have DDP arrange its buckets in the order of a backward pass before the first step.

    By itself it does so after the first step. A gradient's place in a bucket decides in which order
    more than two ranks are added up, so a run that goes on would differ from one that never
    stopped, by rounding, in the step after. shape: [C, H, W] of an image.
    """
    with in_evaluation_mode(model):
        # Two images: a norm that never keeps statistics takes no single one.
        logits_of(model(torch.zeros(2, *shape, device=device))).sum().backward()
    model.zero_grad(set_to_none=True)


def samples_per_perturbation(config: Config, world_size: int) -> int | None:
    """m of m-sharpness; None without a perturbation."""
    if config.sharpness.rule == "none":
        return None
    ranks = ranks_of(config.sharpness.scope, world_size)
    samples = config.data.global_batch_size * ranks // world_size
    if config.sharpness.per_micro_batch and config.data.micro_batch_size:
        return min(samples, config.data.micro_batch_size * ranks)
    return samples
