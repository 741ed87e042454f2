"""What an objective is: a loss for each sample, from logits and labels."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from flatcal_dist.choices import check


class Objective(ABC):
    """A loss for each sample: called with logits [N, K] and labels, it gives losses [N].

    Labels are class indices [N], or probabilities [N, K] of mixed samples. Raises ValueError for
    probabilities if the objective is defined for class indices only. The fields of an objective are
    keys of the configuration's section `objective`, and its `name` is what the section calls it.
    """

    name: ClassVar[str]
    hard_labels: ClassVar[bool] = False  # class indices only

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.hard_labels and (labels.is_floating_point() or labels.ndim != 1):
            raise ValueError(
                f"{type(self).__name__} is defined for hard labels only: they must be class "
                f"indices of shape [N], not {labels.dtype} of shape {list(labels.shape)}"
            )
        return self.losses(logits, labels)

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[N], in float32 or the logits' wider type."""


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Per-sample losses [N] to "mean", "sum", or "none"."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not '{reduction}'")
    return losses.mean() if reduction == "mean" else losses.sum()


def at_least_float32(logits: Tensor) -> Tensor:
    """In float32, or the input's wider type."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
