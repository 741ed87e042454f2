"""Two passes through a network that count as one."""

from types import TracebackType

import torch
from torch import Tensor, nn


class SameFunctionTwice:
    """Makes the two passes see one function, and count once.

    The random state of the first pass is replayed in the second (the same dropout and drop-path
    masks), and ends where one pass would have left it. Buffers (running statistics of norm layers)
    keep what the first pass, at w, made of them. An exception, or `undo`, gives them back as they
    were before the step.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.buffers = list(module.buffers())
        self.device = device

    def __enter__(self) -> "SameFunctionTwice":
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        return self

    def begin(self) -> None:
        """Before the first pass."""
        self.random_before = self._random_state()

    def rewind(self) -> None:
        """After the first pass: go back to the random state before it, remember what it made."""
        self.buffers_after = [buffer.clone() for buffer in self.buffers]
        self.random_after = self._random_state()
        self._set_random_state(self.random_before)

    def forward(self) -> None:
        """After the second pass: leave everything as the first pass left it."""
        self._set_buffers(self.buffers_after)
        self._set_random_state(self.random_after)

    def undo(self) -> None:
        """The step does not count: buffers as before it."""
        self._set_buffers(self.buffers_before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.undo()

    def _set_buffers(self, values: list[Tensor]) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, values)

    def _random_state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        if self.device.type != "cpu":
            state.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return state

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(state[1], self.device)
