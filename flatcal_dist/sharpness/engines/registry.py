"""The engines that a run can choose (`train.engine`): one row each, with all facts about it.

Code outside of an engine asks its row and never compares names. A new engine is one module with a
class that follows `engines/base.py`, and one row here.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flatcal_dist.sharpness.engines.base import Engine


@dataclass(frozen=True)
class Plan:
    """What a run asks of its engine.

    Args:
        accelerator: Knows the device and the ranks.
        optimizer: Builds the optimizer of a network.
        precision: The type in which forward and backward passes compute.
        clip_norm: The largest norm of the gradient, or None.
        ranks_per_group: The ranks that perturb together, where they are neither all nor one alone.
        image: The shape [C, H, W] of an image.
    """

    accelerator: Accelerator
    optimizer: Callable[[nn.Module], Optimizer]
    precision: torch.dtype
    clip_norm: float | None
    ranks_per_group: int | None
    image: tuple[int, int, int]


@dataclass(frozen=True)
class Plugin:
    """The variables by which `accelerate launch` tells its processes of an engine."""

    switch: str  # is "true"
    key: str
    value: str

    def asked(self, environment: Mapping[str, str]) -> bool:
        """Return whether the environment asks for this plugin."""
        on = environment.get(self.switch, "false").lower() == "true"
        return on and environment.get(self.key) == self.value

    def switched_off(self, environment: Mapping[str, str]) -> bool:
        """Return whether the environment asks for no plugin of this kind."""
        return environment.get(self.switch, "false").lower() != "true"


@dataclass(frozen=True)
class Entry:
    """One engine.

    Args:
        name: Its name in `train.engine`, and in the files configs/accelerate/*_NAME.yaml.
        path: Its class, as "module:class". The module is imported at first use, since DeepSpeed
            takes seconds.
        build: Builds it around a network.
        plugin: How `accelerate launch` asks for it. None: the launcher starts plain processes.
        autocasts: Whether autocast casts its weights, so that Accelerate has to know the
            precision. Other engines keep low-precision copies.
        sharded: Whether each rank holds a part of weights or optimizer state alone. A checkpoint
            then has a file for each rank. Otherwise rank 0 has a whole copy and saves it.
        has_master: Whether a perturbation goes back to a master copy, and needs no backup.
    """

    name: str
    path: str
    build: Callable[[nn.Module, Plan], Engine]
    plugin: Plugin | None
    autocasts: bool
    sharded: bool
    has_master: bool

    def engine_class(self) -> type[Engine]:
        """Import the module of the engine and return its class."""
        found: type[Engine] = pkgutil.resolve_name(self.path)
        return found


def _replicated(network: nn.Module, plan: Plan) -> Engine:
    from flatcal_dist.sharpness.engines.replicated import ReplicatedEngine
    from flatcal_dist.sharpness.engines.replicated_start import arrange_buckets

    # This brings the network to the device, and puts autocast and DistributedDataParallel around.
    prepared: nn.Module = plan.accelerator.prepare_model(network)
    if isinstance(prepared, DistributedDataParallel):
        arrange_buckets(prepared, plan.image, plan.accelerator.device)
    return ReplicatedEngine(prepared, plan.optimizer(network), plan.precision)


def _sharded(network: nn.Module, plan: Plan) -> Engine:
    from flatcal_dist.sharpness.engines.fsdp2.engine import ShardedEngine
    from flatcal_dist.sharpness.engines.fsdp2.start import shard

    device, ranks = plan.accelerator.device, plan.ranks_per_group
    sharded = shard(network, device, plan.precision, ranks_per_group=ranks)
    return ShardedEngine(sharded, plan.optimizer(sharded), plan.precision)


def _zero(stage: int, network: nn.Module, plan: Plan) -> Engine:
    from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine
    from flatcal_dist.sharpness.engines.zero.start import start_zero

    network = network.to(plan.accelerator.device)
    optimizer = plan.optimizer(network)
    return ZeroEngine(start_zero(network, optimizer, stage, plan.precision, plan.clip_norm))


def _zero_entry(stage: int) -> Entry:
    return Entry(
        name=f"zero{stage}",
        path="flatcal_dist.sharpness.engines.zero.engine:ZeroEngine",
        build=partial(_zero, stage),
        plugin=Plugin("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage)),
        autocasts=False,
        sharded=True,
        has_master=True,
    )


_ENTRIES = (
    Entry(
        name="ddp",
        path="flatcal_dist.sharpness.engines.replicated:ReplicatedEngine",
        build=_replicated,
        plugin=None,
        autocasts=True,
        sharded=False,
        has_master=False,
    ),
    *(_zero_entry(stage) for stage in (1, 2, 3)),
    Entry(
        name="fsdp2",
        path="flatcal_dist.sharpness.engines.fsdp2.engine:ShardedEngine",
        build=_sharded,
        plugin=Plugin("ACCELERATE_USE_FSDP", "FSDP_VERSION", "2"),
        autocasts=False,
        sharded=True,
        has_master=False,
    ),
)

ENGINES: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}

PLUGINS: tuple[Plugin, ...] = tuple(e.plugin for e in _ENTRIES if e.plugin is not None)


def launched_engine(environment: Mapping[str, str]) -> str | None:
    """Return the name of the engine that `accelerate launch` asks for.

    None: it asks for a plugin that belongs to no engine here, such as the first version of FSDP.
    """
    for entry in ENGINES.values():
        if entry.plugin is not None and entry.plugin.asked(environment):
            return entry.name
    if not all(plugin.switched_off(environment) for plugin in PLUGINS):
        return None
    return next(entry.name for entry in ENGINES.values() if entry.plugin is None)
