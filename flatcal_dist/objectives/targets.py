"""What a batch is compared with: labels, and which samples of which epoch they belong to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The targets of the N samples of a micro-batch.

    Args:
        labels: Class indices [N], or probabilities [N, K] of mixed samples.
        samples: Which sample of the training data each one is, [N] int64, or None where samples
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
        """The targets of a part of the samples."""
        samples = None if self.samples is None else self.samples[part]
        return replace(self, labels=self.labels[part], samples=samples)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """The same targets on another device."""
        samples = None
        if self.samples is not None:
            samples = self.samples.to(device, non_blocking=non_blocking)
        return replace(
            self, labels=self.labels.to(device, non_blocking=non_blocking), samples=samples
        )


def as_targets(targets: Tensor | Targets) -> Targets:
    """Targets as they are; or a tensor of labels as targets without sample numbers."""
    return targets if isinstance(targets, Targets) else Targets(targets)


def labels_of(targets: Tensor | Targets) -> Tensor:
    """The labels in targets; or a tensor of labels as it is."""
    return targets.labels if isinstance(targets, Targets) else targets
