"""What a step saw and what it reports: figures by name, on one rank and on all ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatcal_dist.sharpness.engines.move import Measured
from flatcal_dist.sharpness.passes.forward import Evaluated
from flatcal_dist.sharpness.rules import Memory


@dataclass(frozen=True)
class StepResult:
    """What happened in one step. Losses are means over the global batch.

    Both losses are values of one objective, that of the ascent. So their difference is the
    sharpness. Means over ranks are taken where a scope smaller than all ranks has several values.

    Args:
        loss: The loss at w. A rule without an ascent pass sees only the loss at w + e, and it
            stands here.
        perturbed_loss: The loss at w + e. None in a step without an ascent gradient.
        ascent_gradient_norm: The norm of the ascent gradient. None in a step without one.
        gradient_norm: The norm of the gradient that the optimizer got, before clipping.
        skipped: Whether a value was not finite on some rank in either pass, so that no rank moved.
        stop: Whether some rank passed stop=True.
        loss_scale: The loss scale after the step, 1 but in fp16.
        cosine: The cosine between the perturbation e (for SAM: the ascent gradient) and the descent
            gradient. This and the next four are there only with measure=True.
        perturbation_norm: The length of e.
        effective_rho: The length of what the forward pass saw of e after rounding to its
            precision. The noise of rounding adds to it.
        seen_along: The component along e of what the forward pass saw.
        seen_cosine: The cosine between e and what the forward pass saw. It tells whether the
            direction survived.
        votes: The sums over ranks of the votes.
        outputs: The outputs of this rank's micro-batches in the first pass, without a graph: the
            logits of a pair, or what the user's `forward` returned.
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
    """What one pass saw on this rank, summed over its micro-batches.

    `loss` is a float64 scalar on the device, `losses` is the number of losses.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.losses: float | Tensor = 0
        self.outputs: list[Any] = []

    def add(self, evaluated: Evaluated) -> None:
        """Add a micro-batch."""
        self.loss += evaluated.reported
        self.losses = self.losses + evaluated.losses
        self.outputs.append(evaluated.output)


class Seen:
    """What this rank saw in a step, summed over its units, in float64 scalars on the device.

    `losses` is the number of losses in one pass over the whole batch.
    """

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.loss = self.perturbed_loss = self.ascent_norm = zero
        self.measured = [zero] * len(Measured._fields)
        self.losses: float | Tensor = 0
        self.outputs: list[Any] = []
        self.ascent: Memory | None = None
        self.kept_norm: Tensor | None = None
        self.memory: Memory | None = None
        self.watched: list[Tensor] = []  # scalars that have to be finite, and are not reported

    def add_only(self, sums: Sums) -> None:
        """Add the only pass of a unit."""
        self.add_first(sums)
        self.losses = self.losses + sums.losses

    def add_first(self, sums: Sums) -> None:
        """Add a unit's pass at w, which may be on a share of the batch."""
        self.loss = self.loss + sums.loss
        self.outputs += sums.outputs

    def add_second(self, sums: Sums) -> None:
        """Add a unit's pass at w + e."""
        self.perturbed_loss = self.perturbed_loss + sums.loss
        self.losses = self.losses + sums.losses

    def add_measured(self, measured: Measured) -> None:
        """Add what was measured of a unit's perturbation."""
        self.measured = [a + b for a, b in zip(self.measured, measured, strict=True)]

    def agree(
        self,
        summed: Callable[[Sequence[Tensor | float]], list[float]],
        norm: Tensor,
        stop: bool,
        votes: Sequence[float],
    ) -> "Agreed":
        """Sum the figures of all ranks in one reduction.

        Args:
            summed: Sums scalars over ranks (`Engine.sum`).
            norm: The norm of the gradient.
            stop: Whether this rank wishes to end.
            votes: The votes of this rank, as many on every rank.
        """
        figures = {"loss": self.loss, "perturbed_loss": self.perturbed_loss}
        figures |= {"ascent_norm": self.ascent_norm}
        figures |= dict(zip(Measured._fields, self.measured, strict=True))
        figures |= {"norm": norm.double()}
        watched = [value.to(norm.device).double() for value in self.watched]
        skip = 1 - torch.stack([*figures.values(), *watched]).isfinite().all().double()
        total = summed([*figures.values(), skip, float(stop), self.losses, *votes])
        skips, stops, losses, *sums = total[len(figures) :]
        by_name = dict(zip(figures, total, strict=False))
        return Agreed(by_name, skips > 0, stops > 0, losses, tuple(sums))


class Agreed(NamedTuple):
    """What all ranks saw together.

    `total` has the sums of the figures by name, `losses` the number of losses. `skipped` says
    whether some rank has a value that is not finite.
    """

    total: dict[str, float]
    skipped: bool
    stop: bool
    losses: float
    votes: tuple[float, ...]
