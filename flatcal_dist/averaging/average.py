"""The average of the weights, kept by each engine on its own parts, in fp32."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flatcal_dist.averaging.base import AverageRule, Moment
from flatcal_dist.averaging.norm_statistics import (
    Statistics,
    norm_layers,
    reestimate,
    statistics_of,
)
from flatcal_dist.sharpness.passes.buffers import broadcast

if TYPE_CHECKING:
    from flatcal_dist.sharpness.engines.base import Engine

Batches = Callable[[], Iterable[tuple[Tensor, bool]]]


class Average:
    """The average of the trained weights, one copy of this rank's fp32 part.

    The running statistics of norm layers belong to the weights, so the average has other statistics
    than the network. With `batches` they are estimated again for each average that is evaluated
    (see `norm_statistics.reestimate`). Without, they are averaged as the weights are, which costs
    nothing and is right only once the average has forgotten its beginning. All other buffers are
    the network's. A network without such layers has no cost.

    Args:
        engine: The engine, whose network is in training mode. Norm layers in evaluation mode are
            frozen, and keep their statistics.
        rule: When weights are averaged, and how much they count.
        batches: Gives this rank's training inputs, in the same order each time, and whether they
            count, as `norm_statistics.reestimate` takes them.
    """

    @torch.no_grad()
    def __init__(self, engine: "Engine", rule: AverageRule, batches: Batches | None = None) -> None:
        self.engine, self.rule, self.batches = engine, rule, batches
        self.count = 0  # how often weights were averaged
        self.weights = {name: w.detach().clone() for name, w in engine.masters().items()}
        self.layers = norm_layers(engine.named)
        self.statistics: Statistics = {
            name: buffer.detach().float().clone()
            for name, buffer in statistics_of(self.layers).items()
        }
        self.current = not self.layers or batches is None  # whether they belong to the weights

    @torch.no_grad()
    def update(self, step: int, skipped: bool, epoch_steps: int, total_steps: int) -> None:
        """Average after a step, if the rule says so.

        Args:
            step: The number of optimizer steps that were taken.
            skipped: Whether the last step moved nothing.
            epoch_steps: The number of steps in an epoch.
            total_steps: The number of steps in the whole run.
        """
        share = self.rule.share(Moment(step, skipped, epoch_steps, total_steps, self.count))
        if share is None:
            return
        self.count += 1
        now = self.engine.masters()
        if self.weights:  # a rank of ZeRO may hold none
            torch._foreach_lerp_(
                list(self.weights.values()), [now[name] for name in self.weights], share
            )
        if self.batches is not None:
            self.current = not self.layers
            return
        for name, buffer in statistics_of(self.layers).items():
            self.statistics[name].lerp_(buffer.float(), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the network be the average inside. Called by all ranks.

        Afterwards it is what it was, bit for bit. Before weights were averaged for the first time
        the network is not changed.
        """
        if self.count == 0:
            yield
            return
        if self.batches is None:
            self.settle()
        own = {name: buffer.clone() for name, buffer in statistics_of(self.layers).items()}
        self._exchange()
        try:
            if not self.current and self.batches is not None:
                self._reestimate(self.batches())
            self._put(self.statistics)
            yield
        finally:
            self._put(own)
            self._exchange()

    def settle(self) -> None:
        """Let every rank hold the statistics of the present average. Called by all ranks."""
        if self.count == 0:
            return
        if self.batches is None:  # ranks saw different batches: take rank 0's, as for all buffers
            if self.engine.world_size > 1:
                broadcast(self.statistics.values())
        elif not self.current:
            with self.applied():
                pass

    def _reestimate(self, batches: Iterable[tuple[Tensor, bool]]) -> None:
        self.statistics = reestimate(
            self.engine.inference, self.layers, batches, self.engine.world_size
        )
        self.current = True

    @torch.no_grad()
    def _put(self, statistics: Statistics) -> None:
        for name, buffer in statistics_of(self.layers).items():
            buffer.copy_(statistics[name])

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, master in self.engine.masters().items():
            own = master.clone()
            master.copy_(self.weights[name])
            self.weights[name].copy_(own)
        self.engine.rewritten()

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], statistics: Statistics | None, count: int) -> None:
        """Go on from a saved average.

        Args:
            weights: This rank's part of the average, by name.
            statistics: The statistics of norm layers, where they are averaged.
            count: How often weights had been averaged.
        """
        self.count = count
        for name, average in self.weights.items():
            average.copy_(weights[name].view(average.shape))
        if self.batches is None:
            saved = statistics or {}
            for name, kept in self.statistics.items():
                kept.copy_(saved[name])
        else:
            self.current = not self.layers
