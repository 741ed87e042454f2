"""Faults on purpose: each breaks one thing in a step, and the verification must see it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from flatcal_dist.config import Config, ConfigError
from flatcal_dist.sharpness import CSAM, Engine, FunctionalSAM, Rule, SharpnessAwareStep
from flatcal_dist.sharpness import step as step_module
from flatcal_dist.sharpness.engines.move import Displacement
from flatcal_dist.sharpness.engines.registry import ENGINES
from flatcal_dist.sharpness.passes.buffers import BufferState
from flatcal_dist.sharpness.passes.replay import SameFunctionTwice
from flatcal_dist.sharpness.result import Agreed
from flatcal_dist.sharpness.rules import Context, Loss, Shards
from flatcal_dist.sharpness.rules.base import Total

Fault = Callable[[type[Engine]], AbstractContextManager[None]]


@contextmanager
def restore(engine: type[Engine]) -> Iterator[None]:
    """Weights come back with a little of the perturbation left."""
    original = engine.moved

    @contextmanager
    def moved(self: Engine, shards: Shards) -> Iterator[Displacement]:
        with original(self, shards) as displacement:
            yield displacement
        with torch.no_grad():
            shards.weights[0].add_(1e-3)

    with patch.object(engine, "moved", moved):
        yield


@contextmanager
def norm(engine: type[Engine]) -> Iterator[None]:
    """The norm is off by a tenth, as when parts of it are missing."""

    def context(rho: float, memory: Any, total: Total, **others: Any) -> Context:
        def too_much(part: Tensor) -> Tensor:
            return total(part) * 1.21

        return Context(rho, memory, too_much, **others)

    with patch.object(step_module, "Context", context):
        yield


@contextmanager
def sync(engine: type[Engine]) -> Iterator[None]:
    """Ranks perturb differently in a scope where they should not."""
    original = engine.moved

    @contextmanager
    def moved(self: Engine, shards: Shards) -> Iterator[Displacement]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 1
        for gradient in shards.gradients:
            gradient.mul_(1 + rank)
        with original(self, shards) as displacement:
            yield displacement

    with patch.object(engine, "moved", moved):
        yield


@contextmanager
def rng(engine: type[Engine]) -> Iterator[None]:
    """The second pass draws other dropout masks than the first."""
    with patch.object(SameFunctionTwice, "_set_random_state", lambda self, state: None):
        yield


@contextmanager
def batch_norm(engine: type[Engine]) -> Iterator[None]:
    """The perturbed pass counts in the running statistics."""
    original = SameFunctionTwice._set_buffers

    def keep(self: SameFunctionTwice, state: BufferState) -> None:
        if state is self.buffers_before:
            original(self, state)

    with patch.object(SameFunctionTwice, "_set_buffers", keep):
        yield


@contextmanager
def autocast(engine: type[Engine]) -> Iterator[None]:
    """Low-precision copies of the weights outlive the first pass."""
    with patch.object(torch, "clear_autocast_cache", lambda: None):
        yield


@contextmanager
def objective(engine: type[Engine]) -> Iterator[None]:
    """The second pass follows the loss of the first, so that CSAM and Functional SAM are SAM."""

    def as_first(self: Rule, loss: Loss) -> Loss:
        return loss

    with (
        patch.object(CSAM, "descent_loss", as_first),
        patch.object(FunctionalSAM, "descent_loss", as_first),
    ):
        yield


@contextmanager
def memory(engine: type[Engine]) -> Iterator[None]:
    """The rule remembers nothing from step to step."""
    original = step_module.SharpnessAwareStep._take

    def take(self: SharpnessAwareStep, *arguments: Any) -> Agreed:
        agreed = original(self, *arguments)
        self.memory = None
        return agreed

    with patch.object(step_module.SharpnessAwareStep, "_take", take):
        yield


FAULTS: dict[str, Fault] = {
    "restore": restore,
    "norm": norm,
    "sync": sync,
    "rng": rng,
    "batch_norm": batch_norm,
    "autocast": autocast,
    "objective": objective,
    "memory": memory,
}


def refuse_fault(name: str | None, config: Config) -> None:
    """Raise ConfigError for a fault that this configuration cannot have."""
    rule = config.sharpness.build()
    differs = isinstance(rule, FunctionalSAM) or (isinstance(rule, CSAM) and rule.gamma > 0)
    if name == "objective" and not differs:
        raise ConfigError(
            "--fault objective breaks a loss at w + e that is not the loss at w: use it with "
            "sharpness.rule=csam and a sharpness.gamma above 0, or sharpness.rule=functional_sam"
        )
    if name == "memory" and (rule is None or not rule.remembers):
        raise ConfigError(
            "--fault memory loses what a rule remembers: use it with a rule that does, such as "
            "sharpness.rule=friendly_sam"
        )
    if name == "autocast" and not ENGINES[config.train.engine].autocasts:
        usable = " or ".join(entry.name for entry in ENGINES.values() if entry.autocasts)
        raise ConfigError(
            f"--fault autocast keeps autocast's copies of weights, and {config.train.engine} makes "
            f"its low-precision copies itself: use it with train.engine={usable}"
        )
