"""What an objective is: a loss for each sample, and what it needs for that.

The step asks an objective, in this order:

    begin(samples, device)        Before the first step, by the loop: so many samples there are.
    losses(output, targets)       What is the loss of each sample? Once in every pass.
    after_step(targets, outputs)  Once for each step that was taken: what do you learn from it?
    epoch_end(total)              Once for each epoch, on all ranks together.
    state(total), load(state)     What has to be in a checkpoint, the same on every rank?

Only `losses` has to be written. An objective without state leaves the rest as it is. A new
objective is one file with one class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from flatcal_dist.choices import check
from flatcal_dist.objectives.targets import Targets, as_targets

Pairs = Literal["none", "any", "same_class"]
State = dict[str, Tensor]  # of an objective, whole, by names of its own
Total = Callable[[Tensor], Tensor]  # the sum over ranks of a tensor that all of them give


class Objective(ABC):
    """A loss for each sample: called with the network's output and targets, it gives losses [N].

    The output is logits [N, K]. Targets are `Targets`, or a tensor of labels alone. Raises
    ValueError for targets that the objective is not defined for. The fields of an objective are
    keys of the configuration's section `objective`, and its `name` is what the section calls it.
    """

    name: ClassVar[str]
    # Class indices only, no probabilities of mixed samples.
    hard_labels: ClassVar[bool] = False
    # Which samples are partners. The samples at places 2i and 2i + 1 of the global batch are, so
    # every micro-batch holds an even number. "any": partners come as the order of samples has
    # them, at random. "same_class": the order puts images of one class there, except that the odd
    # images of classes, at most one of each class, are partners of each other.
    pairs: ClassVar[Pairs] = "none"
    # It learns about single samples: targets have sample numbers, and it has state.
    keeps_history: ClassVar[bool] = False
    # `losses` gets all that the network returns, whatever it is, and not its logits.
    whole_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, output: Any, targets: Tensor | Targets) -> Tensor:
        targets = as_targets(targets)
        labels, name = targets.labels, type(self).__name__
        if self.hard_labels and (labels.is_floating_point() or labels.ndim != 1):
            raise ValueError(
                f"{name} is defined for hard labels only: they must be class "
                f"indices of shape [N], not {labels.dtype} of shape {list(labels.shape)}"
            )
        if self.pairs != "none" and len(targets) % 2:
            raise ValueError(
                f"{name} compares the samples at places 2i and 2i + 1, and got {len(targets)}: "
                "give every micro-batch an even number of samples"
            )
        if self.keeps_history and targets.samples is None:
            raise ValueError(
                f"{name} keeps a history of each sample and has to know which samples it sees: "
                "give it Targets(labels, samples=..., epoch=...) instead of labels"
            )
        return self.losses(output, targets)

    @abstractmethod
    def losses(self, output: Any, targets: Targets) -> Tensor:
        """[N], in float32 or the output's wider type."""

    def begin(self, samples: int, device: torch.device | str) -> None:
        """Learn how many samples the training data has, and where targets will be."""
        return None

    def after_step(self, targets: Sequence[Targets], outputs: Sequence[Any]) -> None:
        """Learn from this rank's micro-batches of a step that was taken.

        outputs are the network's in the first pass, at w, without a graph. A skipped step is never
        seen here, and the pass at w + e neither.
        """
        return None

    def epoch_end(self, total: Total) -> None:
        """Finish an epoch. Called on all ranks together."""
        return None

    def state(self, total: Total) -> State | None:
        """What a checkpoint holds, or None without state. Called on all ranks together.

        It is the same on every rank, and does not depend on how many there are. Tensors may change
        in the next step.
        """
        return None

    def load(self, state: State) -> None:
        """Be as when `state` gave this. Called after `begin`. Raises ValueError for another's."""
        return None


class OfLabels(Objective):
    """An objective from a function of (logits [N, K], labels) that gives losses [N]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def losses(self, output: Tensor, targets: Targets) -> Tensor:
        return self.function(output, targets.labels)


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
