"""The targets of a batch: labels, and the samples and the epoch that they belong to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The targets of the N samples of a micro-batch.

    Args:
        labels: Class indices [N], or probabilities [N, K] of mixed samples.
        samples: The number of each sample in the training data, [N] int64, or None where samples
            have no numbers. A number means the same sample in every epoch and on every rank.
        epoch: The number of the epoch, counted from 0.

    Raises:
        ValueError: samples are not N whole numbers.
    """

    labels: Tensor  # first: a batch is counted by its first tensor
    samples: Tensor | None = None
    epoch: int = 0

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
        return replace(self, labels=self.labels[part], samples=samples)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """Return the same targets on another device."""
        samples = None
        if self.samples is not None:
            samples = self.samples.to(device, non_blocking=non_blocking)
        return replace(
            self, labels=self.labels.to(device, non_blocking=non_blocking), samples=samples
        )


def as_targets(targets: Tensor | Targets) -> Targets:
    """Return targets as they are, and a tensor of labels as targets without sample numbers."""
    return targets if isinstance(targets, Targets) else Targets(targets)


def labels_of(targets: Tensor | Targets) -> Tensor:
    """Return the labels in targets, and a tensor of labels as it is."""
    return targets.labels if isinstance(targets, Targets) else targets
