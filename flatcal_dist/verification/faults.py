"""Faults on purpose: each breaks one thing in a step, and the verification must see it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch

from flatcal_dist.config import Config, ConfigError
from flatcal_dist.sharpness import CSAM
from flatcal_dist.sharpness.replay import SameFunctionTwice

Fault = Callable[[type], AbstractContextManager]


@contextmanager
def restore(engine: type) -> Iterator[None]:
    """Weights come back with a little of the perturbation left."""
    original = engine.moved

    @contextmanager
    def moved(self, shards):
        with original(self, shards) as displacement:
            yield displacement
        with torch.no_grad():
            shards.weights[0].add_(1e-3)

    with patch.object(engine, "moved", moved):
        yield


@contextmanager
def norm(engine: type) -> Iterator[None]:
    """The norm is off by a tenth, as when parts of it are missing."""
    original = engine.total
    with patch.object(engine, "total", lambda self, part: original(self, part) * 1.21):
        yield


@contextmanager
def sync(engine: type) -> Iterator[None]:
    """Ranks perturb differently in a scope where they should not."""
    original = engine.moved

    @contextmanager
    def moved(self, shards):
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 1
        for gradient in shards.gradients:
            gradient.mul_(1 + rank)
        with original(self, shards) as displacement:
            yield displacement

    with patch.object(engine, "moved", moved):
        yield


@contextmanager
def rng(engine: type) -> Iterator[None]:
    """The second pass draws its own dropout."""
    with patch.object(SameFunctionTwice, "_set_random_state", lambda self, state: None):
        yield


@contextmanager
def batch_norm(engine: type) -> Iterator[None]:
    """The perturbed pass counts in the running statistics."""
    original = SameFunctionTwice._set_buffers

    def keep(self, state):
        if state is self.buffers_before:
            original(self, state)

    with patch.object(SameFunctionTwice, "_set_buffers", keep):
        yield


@contextmanager
def autocast(engine: type) -> Iterator[None]:
    """Low-precision copies of the weights outlive the first pass."""
    with patch.object(torch, "clear_autocast_cache", lambda: None):
        yield


@contextmanager
def objective(engine: type) -> Iterator[None]:
    """The second pass follows the loss of the first, so that CSAM is SAM."""
    with patch.object(CSAM, "descent_loss", lambda self, loss: loss):
        yield


FAULTS = {f.__name__: f for f in (restore, norm, sync, rng, batch_norm, autocast, objective)}


def refuse_fault(name: str | None, config: Config) -> None:
    """Raises ConfigError for a fault that this configuration cannot have."""
    rule = config.sharpness.build()
    if name == "objective" and (not isinstance(rule, CSAM) or rule.gamma == 0):
        raise ConfigError(
            "--fault objective breaks CSAM's loss: use it with sharpness.rule=csam and a "
            "sharpness.gamma above 0"
        )
    if name == "autocast" and config.train.engine != "ddp":
        raise ConfigError(
            f"--fault autocast keeps autocast's copies of weights, and {config.train.engine} makes "
            "its low-precision copies itself: use it with train.engine=ddp"
        )
