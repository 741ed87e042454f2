"""Functional SAM."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flatcal_dist.objectives.base import at_least_float32
from flatcal_dist.objectives.targets import Targets
from flatcal_dist.sharpness.rules.base import Context, Loss, Rule, Shards, along_gradient_


@dataclass(frozen=True)
class FunctionalSAM(Rule):
    """Functional SAM (Singh et al., ICML 2025, arXiv 2502.02407): perturb the function alone.

    With F the network, L the loss of its logits, and e SAM's perturbation, the descent gradient is

        grad_w F(w + e)^T  grad_F L(F(w)),

    so the slope of the loss with respect to the logits is that of the clean pass. SAM takes it at
    w + e as well, which is the part ("logit path") through which SAM lowers confidence. A rule for
    experiments: compared with SAM and CSAM it tells how much of their calibration comes from there.
    At rho 0 the rule is plain training.
    """

    name: ClassVar[str] = "functional_sam"
    follows_outputs: ClassVar[bool] = True

    def perturb_(self, shards: Shards, context: Context) -> Tensor:
        return along_gradient_(shards, context)

    def descent_loss(self, loss: Loss) -> Loss:
        def slope_times_logits(logits: Tensor, targets: Any) -> Tensor:
            assert isinstance(targets, Targets)
            assert targets.at_w is not None
            clean = at_least_float32(targets.at_w.detach()).requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(loss(clean, targets).sum(), clean)
            return (slope * logits).reshape(len(targets), -1).sum(1)

        return slope_times_logits
