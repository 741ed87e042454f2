"""Find the layer and the pass in which values become not finite, after many skipped steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from flatcal_dist.ranks.distributed import on_all_ranks
from flatcal_dist.runs.directory import RunError
from flatcal_dist.sharpness import SharpnessAwareStep


def explain_divergence(
    step: SharpnessAwareStep,
    take: Callable[[], Any],
    micro_batches: int,
    done: int,
    skipped: int,
    saved: int,
) -> NoReturn:
    """Raise FailedTogether, with the layer and the pass where the last step is first not finite.

    take: takes that step again, with its number (`at`). micro_batches: in it. done: steps so far,
    the last `skipped` without a finite gradient. saved: the step of the last checkpoint, or 0.
    Called by all ranks.
    """
    findings = gather_object([first_not_finite(step, micro_batches, take)])
    where = [f"{found}, on rank {rank}" for rank, found in enumerate(findings) if found]
    first = where[0] if where else "the norm of the gradients, each of which is finite"

    kept = f"The checkpoint of step {saved} is kept" if saved else "There is no checkpoint yet"

    def fail() -> NoReturn:
        raise RunError(
            f"no finite gradient in {skipped} steps in a row, up to step {done}: training has "
            f"diverged. The first value that is not finite is {first}. {kept}. "
            "Begin another run with a lower optimizer.learning_rate or "
            "sharpness.rho, or a longer optimizer.warmup_epochs"
        )

    on_all_ranks(fail)
    raise AssertionError("all ranks fail")


def first_not_finite(
    step: SharpnessAwareStep, micro_batches: int, take: Callable[[], Any]
) -> str | None:
    """Take a step again, and return the first value on this rank that is not finite, or None.

    Called by all ranks.

    Args:
        step: The step.
        micro_batches: The number of its micro-batches.
        take: It takes the step again.
    """
    findings: list[str] = []
    with _watched(step, micro_batches, findings):
        take()
    return findings[0] if findings else None


@contextmanager
def _watched(step: SharpnessAwareStep, micro_batches: int, findings: list[str]) -> Iterator[None]:
    passes = 0

    def current() -> str:
        if step.rule is None or not step.perturbs:
            return "the pass"
        if not step.rule.ascent_share:
            return "the pass, at the perturbed weights"
        first = passes % 2 == 1 if step.per_micro_batch else passes <= micro_batches
        return "the first pass" if first else "the second pass, at the perturbed weights"

    def begin(module: nn.Module, inputs: tuple) -> None:
        nonlocal passes
        passes += 1
        for tensor in inputs:
            note(tensor, "the network's input")

    def note(tensor: Any, what: str) -> None:
        if hasattr(tensor, "to_local"):
            tensor = tensor.to_local()
        tensors = tensor if isinstance(tensor, tuple | list) else [tensor]
        for t in tensors:
            if isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all():
                findings.append(f"{what}, in {current()}")

    def layer(name: str) -> Callable:
        def after(module: nn.Module, inputs: tuple, output: Any) -> None:
            title = f"{name or 'the network'} ({type(module).__name__})"
            for held, weight in module.named_parameters(recurse=False):
                note(weight, f"{title}.{held}")
            note(output, f"the output of {title}")
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda g: note(g, f"the gradient at the output of {title}"))

        return after

    module = step.engine.module
    handles = [module.register_forward_pre_hook(begin)]
    for name, inner in module.named_modules():
        if not any(True for _ in inner.children()):
            handles.append(inner.register_forward_hook(layer(name)))
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
