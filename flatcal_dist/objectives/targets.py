"""The targets of a batch: labels, and the samples and the epoch that they belong to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """What the mixed images of a micro-batch have to be, where they come beside the clean ones.

    Args:
        labels: Probabilities [N, K] of the mixed images.
        weight: What their cross-entropy weighs beside the loss of the clean images.
    """

    labels: Tensor
    weight: float


@dataclass(frozen=True)
class Batch:
    """What the loss of a sample has to know of all other samples of a step.

    Args:
        facts: The facts of all samples of all ranks and micro-batches, [B, F], without a graph.
        first: The place of this micro-batch's first sample among them.
    """

    facts: Tensor
    first: int


@dataclass(frozen=True)
class Targets:
    """The targets of the N samples of a micro-batch.

    Args:
        labels: Class indices [N], or probabilities [N, K] of mixed samples.
        samples: The number of each sample in the training data, [N] int64, or None where samples
            have no numbers. A number means the same sample in every epoch and on every rank.
        epoch: The number of the epoch, counted from 0.
        mixed: The targets of mixed images beside the clean ones, or None. Inputs and outputs then
            hold a clean image and a mixed one in turn, 2N in all.
        at_w: The network's output at w, for a loss at w + e that follows it. The step sets it.
        batch: The facts of all samples of the step, for objectives over the whole batch. The step
            sets it.

    Raises:
        ValueError: samples are not N whole numbers.
    """

    labels: Tensor  # first: a batch is counted by its first tensor
    samples: Tensor | None = None
    epoch: int = 0
    mixed: Mixed | None = None
    at_w: Tensor | None = None
    batch: Batch | None = None

    def __post_init__(self) -> None:
        numbers = self.samples
        if numbers is not None and (
            numbers.shape != self.labels.shape[:1] or numbers.dtype != torch.int64
        ):
            raise ValueError(
                f"Targets.samples must be int64 of shape [{len(self.labels)}], a number for each "
                f"label, not {numbers.dtype} of shape {list(numbers.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> "Targets":
        """Return the targets of a part of the samples."""
        samples = None if self.samples is None else self.samples[part]
        mixed = self.mixed and replace(self.mixed, labels=self.mixed.labels[part])
        return replace(self, labels=self.labels[part], samples=samples, mixed=mixed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """Return the same targets on another device."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        samples = None if self.samples is None else moved(self.samples)
        mixed = self.mixed and replace(self.mixed, labels=moved(self.mixed.labels))
        return replace(self, labels=moved(self.labels), samples=samples, mixed=mixed)


def as_targets(targets: Tensor | Targets) -> Targets:
    """Return targets as they are, and a tensor of labels as targets without sample numbers."""
    return targets if isinstance(targets, Targets) else Targets(targets)


def labels_of(targets: Tensor | Targets) -> Tensor:
    """Return the labels in targets, and a tensor of labels as it is."""
    return targets.labels if isinstance(targets, Targets) else targets
