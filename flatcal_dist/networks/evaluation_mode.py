"""Evaluation in the midst of training, which goes on as if there had been none."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from flatcal_dist.sharpness.passes.replay import SameFunctionTwice


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside, and restore everything afterwards.

    Training goes on as if there had been no evaluation. Each module gets back its mode, frozen
    layers included. Buffers and random numbers are restored, too, because some networks count
    passes, or draw a dropout, in either mode.
    """
    modes = {module: module.training for module in model.modules()}
    passes = SameFunctionTwice(model, next(model.parameters()).device)
    model.eval()
    with passes:
        passes.begin()
        try:
            yield
        finally:
            passes.forget()
            for module, training in modes.items():
                module.training = training
