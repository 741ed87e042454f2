"""Cross-entropy with label smoothing."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(frozen=True)
class LabelSmoothing(Objective):
    """The loss is -sum_k q_k log p_k, with smoothed targets q.

    Two forms are in use. With t the target, one class or the probabilities of a mixed sample, and
    K classes, they are

        all:     q = (1 - smoothing) * t + smoothing / K,
        others:  q = (1 - smoothing) * t + smoothing * (1 - t) / (K - 1).

    With "all" the true class keeps 1 - smoothing + smoothing / K. Szegedy et al. (CVPR 2016,
    section 7), torch, and the codes of Zhu et al. (ECCV 2022; Impression2805/FMFP) and of Liu et
    al. (CVPR 2022; by-liu/MbLS) have this form. With "others" the true class keeps 1 - smoothing,
    and each other class gets the same part of the rest. Both forms are linear in the target: the
    loss of a mixed sample is the mix of the losses of its classes.

    The form "others" is the form "all" with smoothing * K / (K - 1). It needs two classes or more,
    and a smoothing of at most (K - 1) / K: above, the true class would get less than each other
    class. With smoothing 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "label_smoothing"

    smoothing: Annotated[
        float,
        Field(ge=0, lt=1, description="The probability that is spread evenly over classes."),
    ] = 0.1
    spread: Annotated[
        Literal["all", "others"],
        Field(
            description="Which classes get the smoothing: all of them, or those other than the "
            "true class."
        ),
    ] = "all"

    def check_classes(self, classes: int) -> None:
        if self.spread == "others" and self.smoothing > 0:
            self._over_all(classes)

    def losses(self, logits: Tensor, targets: Targets) -> Tensor:
        smoothing = self.smoothing
        if self.spread == "others" and smoothing > 0:
            smoothing = self._over_all(logits.shape[1])
        return cross_entropy(logits, targets.labels, "none", smoothing)

    def _over_all(self, classes: int) -> float:
        """Return the smoothing over all classes that is this smoothing over the others."""
        most = (classes - 1) / classes
        if classes == 1:
            raise ValueError(
                "LabelSmoothing: spread = 'others' needs two classes or more, and the logits have "
                "one: set smoothing to 0"
            )
        if self.smoothing > most:
            raise ValueError(
                f"LabelSmoothing: smoothing = {self.smoothing}: with spread = 'others' and "
                f"{classes} classes it must be at most {most:g}, where all classes get the same"
            )
        return min(self.smoothing / most, 1.0)
