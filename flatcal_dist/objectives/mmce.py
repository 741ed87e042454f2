"""Maximum mean calibration error."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective, at_least_float32
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets

WIDTH = 0.4  # of the Laplacian kernel (Kumar et al., section 3.2)
TINY = 1e-10  # below a square root, whose slope at 0 is infinite


@dataclass(frozen=True)
class MMCE(Objective):
    """Cross-entropy, and a kernel measure of calibration (Kumar et al., ICML 2018).

    With c the confidence of a sample (its largest probability), a = 1 where its class is predicted
    and 0 elsewhere, and the kernel k(c, c') = exp(-|c - c'| / 0.4), the loss is

        mean of -log p + weight * M,

    where M is over all B samples of the step, on all ranks:

    plain          sum_ij (a_i - c_i) (a_j - c_j) k_ij / B^2. Kumar et al. (equation 6) take the
                   square root of it, the code of Mukhoti et al. (NeurIPS 2020) does not.
    weighted       the square root of: the mean of (1 - c)(1 - c') k over pairs of right samples,
                   plus that of c c' k over pairs of wrong ones, minus twice that of (1 - c) c' k
                   over pairs of a right and a wrong one (Kumar et al., section 4.2).
    weighted_2020  the same, but each mean is divided once more by its number of pairs, as in the
                   code of Mukhoti et al. (torrvision/focal_calibration). So M depends on the batch.

    Without a right or without a wrong sample both weighted forms are 0. Every loss of the batch
    holds the same M. A step compares all its samples: with several micro-batches each pass begins
    with one more forward pass, which finds the confidences, if `accumulation` allows it.

    With weight 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "mmce"
    hard_labels: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True

    weight: Annotated[
        float, Field(ge=0, le=1000, description="The weight of the calibration measure.")
    ] = 2.0
    form: Annotated[
        Literal["plain", "weighted", "weighted_2020"],
        Field(description="The form of the measure. See the README of the objectives."),
    ] = "weighted"
    accumulation: Annotated[
        Literal["refuse", "second_pass"],
        Field(
            description="What happens where a step has several micro-batches. second_pass: one "
            "more forward pass finds the confidences of the whole batch first."
        ),
    ] = "refuse"

    @property
    def accumulates(self) -> bool:
        return self.accumulation == "second_pass"

    def facts(self, output: Tensor, targets: Targets) -> Tensor:
        """Return confidence and correctness of each sample, [N, 2]."""
        confidence, predicted = at_least_float32(output).softmax(1).max(1)
        return torch.stack([confidence, (predicted == targets.labels).to(confidence.dtype)], dim=1)

    def losses(self, output: Tensor, targets: Targets) -> Tensor:
        plain = cross_entropy(output, targets.labels, "none")
        if self.weight == 0 or not len(plain):
            return plain
        own = self.facts(output, targets)
        if targets.batch is None:
            facts, scale = own, 1.0
        else:
            whole, first, count = targets.batch.facts, targets.batch.first, len(own)
            facts = torch.cat([whole[:first], own, whole[first + count :]])
            scale = len(whole) / count
        measure = self.measure(facts[:, 0], facts[:, 1])
        # Its value stands in every loss. Its slope is shared by this micro-batch's losses, so that
        # their mean over the whole batch has it once.
        return plain + self.weight * (measure.detach() + scale * (measure - measure.detach()))

    def measure(self, confidence: Tensor, correct: Tensor) -> Tensor:
        """Return M of samples with these confidences [B] and correctness [B], a scalar."""
        kernel = torch.exp(-(confidence[:, None] - confidence[None, :]).abs() / WIDTH)
        if self.form == "plain":
            gap = correct - confidence
            return gap @ kernel @ gap / len(gap) ** 2
        right, wrong = correct.sum(), (1 - correct).sum()
        if not right or not wrong:
            return confidence.sum() * 0
        of_right, of_wrong = correct * (1 - confidence), (1 - correct) * confidence
        power = 2 if self.form == "weighted_2020" else 1
        squared = (
            of_right @ kernel @ of_right / right ** (2 * power)
            + of_wrong @ kernel @ of_wrong / wrong ** (2 * power)
            - 2 * (of_right @ kernel @ of_wrong) / (right * wrong) ** power
        )
        return torch.sqrt(squared.clamp(min=0) + TINY)
