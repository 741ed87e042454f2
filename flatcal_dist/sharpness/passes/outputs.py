"""The output of a network: one tensor of logits, or an error that says how to get it."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from flatcal_dist.sharpness.errors import StepError


def logits_of(output: Any) -> Tensor:
    """Return the output, if it is a tensor.

    Raises StepError for anything else: a tuple, a mapping, a dataclass or an object of a library.
    The message names the tensors in it.
    """
    if isinstance(output, Tensor):
        return output
    found = _tensors_in(output)
    candidates = [(way, tensor) for way, tensor in found if tensor.dim() == 2]
    if not found:
        remedy = "it holds no tensor at all"
    else:
        held = ", ".join(f"output{way} of shape {list(t.shape)}" for way, t in found[:5])
        way = (candidates or found)[0][0]
        remedy = (
            f"it holds {held}. Wrap the network in a module whose forward returns its logits, "
            f"such as `return self.network(inputs){way}`, before an engine gets it"
        )
        if "aux" in held:
            remedy += "; or build it without auxiliary heads"
    raise StepError(
        "the step needs a network that gives one tensor of logits [N, K], and this one gave a "
        f"{type(output).__name__}: {remedy}"
    )


def _tensors_in(output: Any) -> list[tuple[str, Tensor]]:
    """Return each tensor in the output, and the expression that reaches it."""
    if isinstance(output, Mapping):  # also the outputs of transformers
        parts = [(f"[{key!r}]", value) for key, value in output.items()]
    elif hasattr(output, "_fields"):  # a named tuple
        parts = [(f".{name}", getattr(output, name)) for name in output._fields]
    elif isinstance(output, tuple | list):
        parts = [(f"[{place}]", value) for place, value in enumerate(output)]
    elif is_dataclass(output):
        parts = [(f".{field.name}", getattr(output, field.name)) for field in fields(output)]
    else:
        parts = [(f".{name}", value) for name, value in getattr(output, "__dict__", {}).items()]
    return [(way, value) for way, value in parts if isinstance(value, Tensor)]
