"""One forward pass of one micro-batch: from a network and a batch of any form to losses.

The simple batch is a pair (inputs, target): the network gives logits, and the objective a loss for
each sample. For everything else the user gives a function `forward(model, batch)`, which returns

    losses                      a tensor with one loss for each sample, token or pixel
    (loss, weight)              a mean over `weight` samples, tokens or pixels
    an object with `losses`     an attribute or a key; and `weight`, if losses is a mean
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatcal_dist.objectives import Objective, Targets
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.passes.outputs import logits_of
from flatcal_dist.sharpness.passes.whole_batch import WholeBatch
from flatcal_dist.sharpness.rules import Loss

Forward = Callable[[nn.Module, Any], Any]


class Evaluated(NamedTuple):
    """What a forward pass of one micro-batch gave.

    `total` is the sum of the losses that are followed, with a graph. `reported` is the sum of the
    losses that are reported, without a graph. `losses` is their number. `output` is the logits of a
    pair, or what the user's function returned, without a graph.
    """

    total: Tensor
    reported: Tensor
    losses: float | Tensor
    output: Any


Pass = Callable[[nn.Module, Any], Evaluated]


def pair(loss: Loss, reported: Objective, scales_losses: bool, batch_of: WholeBatch) -> Pass:
    """Return the forward pass of a pair (inputs, target).

    Args:
        loss: The loss that is followed.
        reported: The loss that is reported. It may be the same.
        scales_losses: Whether the engine scales losses, which logits in float16 need.
        batch_of: Finds the facts of all samples of the step, for an objective that needs them.
    """

    def forward(model: nn.Module, batch: Any) -> Evaluated:
        inputs, target = batch
        output = model(inputs)
        if not reported.whole_output:
            output = logits_of(output)
        mixes = isinstance(target, Targets) and target.mixed is not None
        samples = len(target if reported.whole_output or mixes else output)
        target = batch_of.known(reported, output, target)
        losses = loss(output, target)
        if losses.shape != (samples,):
            raise StepError(
                f"the loss gave {list(losses.shape)} for {samples} samples: the step weighs "
                "samples itself and needs one value each, as reduction='none' gives"
            )
        if not scales_losses and any(t.dtype == torch.float16 for t in _tensors(output)):
            raise StepError(
                "the network computes in float16, where small gradients vanish: give the engine "
                "compute_dtype=torch.float16, so that it scales losses"
            )
        total, output = losses.sum(), without_graph(output)
        seen = losses if reported is loss else reported(output, target)
        return Evaluated(total, seen.detach().sum(), len(losses), output)

    return forward


def of_user(forward: Forward, wrapped: bool) -> Pass:
    """Return the forward pass of any batch, by a function that the user wrote.

    `wrapped` says whether a wrapper is around the network, which has to see the call. The pass
    raises StepError unless the function calls the model that it gets, and returns losses in one of
    the forms above.
    """

    def evaluated(model: nn.Module, batch: Any) -> Evaluated:
        with _called(model, wrapped):
            output = forward(model, batch)
        losses, weight = _losses_in(output)
        if not isinstance(losses, Tensor) or not losses.is_floating_point():
            raise StepError(
                f"forward(model, batch) gave a {type(output).__name__} without losses: return a "
                "tensor of losses, a pair (loss, weight), or an object with `losses`"
            )
        if weight is None and losses.dim() == 0:
            raise StepError(
                "forward(model, batch) gave one number, and the step cannot know the mean of how "
                "many it is: return one loss for each sample (reduction='none'), or a pair "
                "(loss, number of samples)"
            )
        if isinstance(weight, Tensor) and weight.dim() == 0:
            weight = weight.detach()
        elif weight is not None and not isinstance(weight, int | float):
            raise StepError(
                f"forward(model, batch) gave a {type(weight).__name__} beside the loss, where a "
                "number is expected: the number of samples that the loss is the mean of. To get "
                "other things back, return an object with `losses`"
            )
        if weight is not None and losses.dim() != 0:
            raise StepError(
                f"forward(model, batch) gave a weight beside losses of shape {list(losses.shape)}: "
                "a weight belongs to one mean"
            )
        if weight is None:
            weight = losses.numel()
        else:
            losses = losses * weight
        total = losses.sum()
        return Evaluated(total, total.detach(), weight, without_graph(output))

    return evaluated


@contextmanager
def _called(model: nn.Module, wrapped: bool) -> Iterator[None]:
    """Raise StepError if the wrapped model is not called inside.

    Its gradients would not be reduced.
    """
    calls: list[None] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(None)) if wrapped else None
    try:
        yield
    finally:
        if hook:
            hook.remove()
    if wrapped and not calls:
        raise StepError(
            "forward(model, batch) did not call the model that it was given, but another one: on "
            "several ranks gradients would not be reduced. Call `model`, once for each batch"
        )


def _losses_in(output: Any) -> tuple[Any, Any]:
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, Mapping):
        return output.get("losses"), output.get("weight")
    if hasattr(output, "losses"):
        return output.losses, getattr(output, "weight", None)
    if isinstance(output, tuple | list) and len(output) == 2:
        return output[0], output[1]
    return None, None


def without_graph(output: Any) -> Any:
    """Return the same containers, with tensors that keep no graph alive."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        return {key: without_graph(value) for key, value in output.items()}
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(*map(without_graph, output))
    if isinstance(output, tuple | list):
        return type(output)(map(without_graph, output))
    if is_dataclass(output) and not isinstance(output, type):
        held = {field.name: getattr(output, field.name) for field in fields(output) if field.init}
        return replace(output, **{name: without_graph(value) for name, value in held.items()})
    return output


def size_of(batch: Any, is_pair: bool) -> int | None:
    """Return the number of samples in a batch, by the first tensor in it that has a dimension.

    The target of a pair comes before its inputs. The losses are counted later, so that a wrong
    guess is found. None is returned if no tensor has a dimension.
    """
    parts = batch[::-1] if is_pair else [batch]
    for tensor in (tensor for part in parts for tensor in _tensors(part)):
        if tensor.dim() > 0:
            return len(tensor)
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _head(batch: Any, share: float, even: bool) -> Any:
    """Return the first samples of a pair of tensors.

    Args:
        batch: The pair, with one row a sample. StepError is raised for anything else.
        share: The share of the samples. At least one is taken.
        even: Whether an even number is taken.
    """
    if not all(isinstance(part, Tensor | Targets) for part in batch):
        raise StepError(
            "the rule takes the ascent gradient on a share of each micro-batch, for which inputs "
            "and target must be tensors with one row a sample"
        )
    inputs, target = batch
    count = math.ceil(round(len(target) * share, 6))  # 0.1 of 30 is 3, whatever floats say
    count = max(count, min(len(target), 1))
    count += count % 2 if even else 0
    each = len(inputs) // max(len(target), 1)  # 2 where a mixed image comes beside each clean one
    return inputs[: each * count], target[:count]


def on_a_share(forward: Pass, share: float, even: bool) -> Pass:
    """Return the pass on the first samples of a micro-batch, weighed as if they were all of it.

    Args:
        forward: The pass on a whole micro-batch.
        share: The share of the samples.
        even: Whether an even number is taken, for whole pairs.
    """

    def evaluated(model: nn.Module, batch: Any) -> Evaluated:
        part = _head(batch, share, even)
        found = forward(model, part)
        weight = len(batch[1]) / max(len(part[1]), 1)
        return found._replace(
            total=found.total * weight,
            reported=found.reported * weight,
            losses=found.losses * weight,
        )

    return evaluated
