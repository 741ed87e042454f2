"""Two passes through a network that count as one."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from flatcal_dist.sharpness.passes.buffers import BufferState

# What puts a generator of random numbers back, and the state that it is given.
RandomState = list[tuple[Callable[[Any], Any], Any]]


class SameFunctionTwice:
    """Makes the two passes see one function, and count once.

    The second pass starts from the buffers that the first one started from, so that a network
    whose forward pass reads them (batch renormalisation, spectral norm, queues, codebooks) is one
    function; the step ends with the buffers that the first pass, at w, left. The random state of
    the first pass is replayed in the second (the same dropout and drop-path masks), and ends where
    one pass would have left it. This holds for torch, Python, NumPy, and generators which modules
    hold as attributes. An exception, or `undo`, gives buffers back as they were before the step.

    State that this class cannot see is not replayed: other attributes of modules (a counter that is
    a plain number, a tensor that is no buffer), generators outside modules, files and processes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.modules = list(module.modules())  # each once, however many names it has
        self.device = device

    def __enter__(self) -> "SameFunctionTwice":
        self.buffers_before = self.buffers_at_start = BufferState(self.modules)
        return self

    def start_from_here(self) -> None:
        """Take note that buffers were changed for all passes of the step."""
        self.buffers_at_start = BufferState(self.modules)

    def begin(self) -> None:
        """Remember the random state before the first pass."""
        self.random_before = self._random_state()

    def rewind(self) -> None:
        """Remember what the first pass left, and go back to the state before it."""
        self.buffers_after = BufferState(self.modules)
        self.random_after = self._random_state()
        self._set_buffers(self.buffers_at_start)
        self._set_random_state(self.random_before)

    def forward(self) -> None:
        """Leave everything as the first pass left it, after the second pass."""
        self._set_buffers(self.buffers_after)
        self._set_random_state(self.random_after)
        self.buffers_at_start = self.buffers_after  # of the step's next unit

    def undo(self) -> None:
        """Give buffers back as before the step, which does not count."""
        self._set_buffers(self.buffers_before)

    def forget(self) -> None:
        """Give buffers and random numbers back as before the first pass. No pass counts."""
        self.undo()
        self._set_random_state(self.random_before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.undo()

    def _set_buffers(self, state: BufferState) -> None:
        state.restore()

    def _random_state(self) -> RandomState:
        state: RandomState = [
            (torch.set_rng_state, torch.get_rng_state()),
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state()),
        ]
        if self.device.type != "cpu":
            of_device = torch.get_device_module(self.device)
            put = partial(of_device.set_rng_state, device=self.device)
            state.append((put, of_device.get_rng_state(self.device)))
        return state + [_state_of(generator) for generator in _generators(self.modules)]

    def _set_random_state(self, state: RandomState) -> None:
        for put, value in state:
            put(value)


GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState


def _generators(modules: Sequence[nn.Module]) -> Iterator[Generator]:
    """Yield generators that are attributes of modules, or in a container that is one."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, dict):
                value = tuple(value.values())
            for held in value if isinstance(value, list | tuple) else (value,):
                # SystemRandom is a Random without a state.
                if isinstance(held, GENERATORS) and not isinstance(held, random.SystemRandom):
                    yield held


def _state_of(generator: Generator) -> tuple[Callable[[Any], Any], Any]:
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state"), bits.state
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    return generator.set_state, generator.get_state()


@contextmanager
def no_weights_in_autocast() -> Iterator[None]:
    """Drop autocast's low-precision copies of weights on the way out.

    Inside an outer autocast block they are kept. Code after the step would then see copies of
    w + e, or of w before the optimizer's step.
    """
    try:
        yield
    finally:
        torch.clear_autocast_cache()
