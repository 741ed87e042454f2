"""What a step saw and what it reports: figures by name, on one rank and of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatcal_dist.sharpness.engines.move import Measured
from flatcal_dist.sharpness.forward import Evaluated
from flatcal_dist.sharpness.rules import Memory


@dataclass(frozen=True)
class StepResult:
    """What happened in one step. Losses are means over the global batch, norms of its gradients.

    loss and perturbed_loss are of the same objective, that of the ascent, at w and at w + e: their
    difference is the sharpness. A rule without an ascent pass sees one loss only, that at w + e,
    and it stands in loss.
    skipped: a value was not finite on some rank in either pass, so no rank moved. stop: some rank
    passed stop=True. votes: sums of the ranks' own. outputs: of this rank's micro-batches, in the
    first pass: the logits of a pair, or what the user's `forward` returned; without a graph.
    None in a step without an ascent gradient: perturbed_loss and ascent_gradient_norm (of a scope
    smaller than all ranks, the mean of the ranks' own norms). Only with measure=True, means over
    the ranks: cosine, between the perturbation e (SAM's: the ascent gradient) and the descent
    gradient; perturbation_norm, the length of e; and of what the forward pass saw of e, after
    rounding to its precision: effective_rho, its length, to which the noise of rounding adds;
    seen_along, its component along e; seen_cosine, between it and e, which tells whether the
    direction survived.
    """

    loss: float
    perturbed_loss: float | None
    ascent_gradient_norm: float | None
    gradient_norm: float
    skipped: bool
    stop: bool
    loss_scale: float
    cosine: float | None = None
    perturbation_norm: float | None = None
    effective_rho: float | None = None
    seen_along: float | None = None
    seen_cosine: float | None = None
    votes: tuple[float, ...] = ()
    outputs: Sequence[Any] = field(default=(), compare=False, repr=False)


class Sums:
    """Over the micro-batches of one pass, on this rank. loss: a float64 scalar on the device."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.losses: float | Tensor = 0
        self.outputs: list[Any] = []

    def add(self, evaluated: Evaluated) -> None:
        self.loss += evaluated.reported
        self.losses = self.losses + evaluated.count
        self.outputs.append(evaluated.output)


class Seen:
    """What this rank saw in a step, summed over its units; float64 scalars on the device."""

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.loss = self.perturbed_loss = self.ascent_norm = zero
        self.measured = [zero] * len(Measured._fields)
        self.losses: float | Tensor = 0  # their number, in one pass over the whole batch
        self.outputs: list[Any] = []
        self.ascent: Memory | None = None
        self.memory: Memory | None = None

    def add_only(self, sums: Sums) -> None:
        """Of a unit that has one pass."""
        self.add_first(sums)
        self.losses = self.losses + sums.losses

    def add_first(self, sums: Sums) -> None:
        """Of a unit's pass at w, which may be on a share of the batch."""
        self.loss = self.loss + sums.loss
        self.outputs += sums.outputs

    def add_second(self, sums: Sums) -> None:
        """Of a unit's pass at w + e."""
        self.perturbed_loss = self.perturbed_loss + sums.loss
        self.losses = self.losses + sums.losses

    def add_measured(self, measured: Measured) -> None:
        self.measured = [a + b for a, b in zip(self.measured, measured, strict=True)]

    def figures(self) -> dict[str, Tensor]:
        named = {"loss": self.loss, "perturbed_loss": self.perturbed_loss}
        named |= {"ascent_norm": self.ascent_norm}
        return named | dict(zip(Measured._fields, self.measured, strict=True))
