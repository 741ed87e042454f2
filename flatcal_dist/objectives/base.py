"""What an objective is: a loss for each sample, from logits and targets."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """What is known of the N samples of a micro-batch.

    labels: class indices [N], or probabilities [N, K] of mixed samples. samples: the number of each
    sample in its data set, [N], or None where there are no such numbers. epoch: from 0 on.
    """

    labels: Tensor
    samples: Tensor | None = None
    epoch: int = 0

    @classmethod
    def of(cls, target: "Tensor | Targets") -> "Targets":
        """Labels alone are targets, too."""
        return target if isinstance(target, Targets) else cls(target)

    @property
    def hard(self) -> bool:
        """Whether the labels are class indices."""
        return not self.labels.is_floating_point()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "Targets":
        samples = None if self.samples is None else self.samples[part]
        return replace(self, labels=self.labels[part], samples=samples)


class Objective:
    """A loss for each sample, the same on any number of ranks.

    An objective is called with logits [N, K] and targets, and gives losses [N].
    """

    # Samples 2i and 2i + 1 of a micro-batch belong together, and are never cut apart.
    pairs: ClassVar[Literal["none", "any"]] = "none"
    # It is defined for class indices only, not for probabilities.
    hard_labels: ClassVar[bool] = False

    def __call__(self, logits: Tensor, target: Tensor | Targets) -> Tensor:
        return self.losses(logits, Targets.of(target))

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        """[N], in float32 or the logits' wider type."""
        raise NotImplementedError


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
