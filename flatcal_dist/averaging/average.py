"""The average of the weights, kept by each engine on its own parts, in fp32."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flatcal_dist.averaging.base import AverageRule, Moment
from flatcal_dist.averaging.norm_statistics import (
    Statistics,
    norm_layers,
    reestimate,
    statistics_of,
)
from flatcal_dist.sharpness.buffers import broadcast
from flatcal_dist.sharpness.engines.base import Engine

Batches = Callable[[], Iterable[tuple[Tensor, bool]]]


class Average:
    """What a rule averages: the trained weights, one copy of this rank's fp32 part.

    The running statistics of norm layers
    belong to the weights, so the average has its own. With `batches` they are estimated anew for
    each average that is looked at (see `norm_statistics.reestimate`). Without, they are averaged as
    the weights are, which costs nothing and is right only once the average has forgotten its
    beginning. All other buffers are the network's. A network without such layers has no cost.

    Args:
        engine: Its network is in training mode; norm layers that are not are frozen, and keep their
            statistics.
        rule: When weights are averaged, and how much they count.
        batches: This rank's training inputs, in the same order each time, and whether they count;
            as `norm_statistics.reestimate` takes them.
    """

    @torch.no_grad()
    def __init__(self, engine: Engine, rule: AverageRule, batches: Batches | None = None) -> None:
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
        """Average after a step if the rule says so: see `Moment` for the arguments."""
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
        """The network is the average inside; itself, bit for bit, after. All ranks.

        Before weights were averaged for the first time it is itself inside, too.
        """
        if self.count == 0:
            yield
            return
        if self.batches is None:
            self.settle()
        own = {name: buffer.clone() for name, buffer in statistics_of(self.layers).items()}
        self._exchange()
        try:
            if not self.current:
                self._reestimate()
            self._put(self.statistics)
            yield
        finally:
            self._put(own)
            self._exchange()

    def settle(self) -> None:
        """Let every rank hold the same statistics, those of the average as it is now. All ranks."""
        if self.count == 0:
            return
        if self.batches is None:  # ranks have seen different batches: rank 0's, as of all buffers
            if self.engine.world_size > 1:
                broadcast(self.statistics.values())
        elif not self.current:
            with self.applied():
                pass

    def _reestimate(self) -> None:
        self.statistics = reestimate(
            self.engine.inference, self.layers, self.batches(), self.engine.world_size
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
        """Be as a saved average was.

        Args:
            weights: This rank's part of it, by name.
            statistics: Those of norm layers, where they are kept.
            count: How often weights had been averaged.
        """
        self.count = count
        for name, average in self.weights.items():
            average.copy_(weights[name].view(average.shape))
        if self.batches is None:
            for name, kept in self.statistics.items():
                kept.copy_(statistics[name])
        else:
            self.current = not self.layers
