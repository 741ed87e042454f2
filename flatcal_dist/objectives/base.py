"""The contract of an objective: a loss for each sample, and what the objective needs for it.

The functions of an objective are called in this order:

    begin(samples, device)        By the loop, before the first step: how many samples are there?
    losses(output, targets)       In every pass: what is the loss of each sample?
    after_step(targets, outputs)  Once for each step that was taken: what is learnt from it?
    epoch_end(total)              Once for each epoch, on all ranks together.
    state(total), load(state)     What has to be in a checkpoint, the same on every rank?

Only `losses` has to be written. An objective without state inherits the rest. A new objective is
one file with one class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flatcal_dist.choices import check
from flatcal_dist.objectives.targets import Targets, as_targets

Pairs = Literal["none", "any", "same_class"]
State = dict[str, Tensor]  # the whole state of an objective, by names that it chooses
Total = Callable[[Tensor], Tensor]  # the sum over ranks of a tensor that every rank gives


class Objective(ABC):
    """A loss for each sample. Called with the network's output and targets, it gives losses [N].

    The output is logits [N, K]. Targets are `Targets`, or a tensor of labels alone. The fields of
    an objective are keys of the section `objective` in a configuration, and its `name` is the
    value of `objective.name`.

    Raises:
        ValueError: The objective is not defined for these targets, or a field is outside its
            bounds.
    """

    name: ClassVar[str]
    # Whether the objective takes class indices only, and no probabilities of mixed samples.
    hard_labels: ClassVar[bool] = False
    # Which samples are partners. Partners are at places 2i and 2i + 1 of the global batch, so every
    # micro-batch holds an even number. "any": the order of samples decides, at random.
    # "same_class": the order puts images of one class there. A class with an odd number of images
    # leaves one over, and these are partners of each other.
    pairs: ClassVar[Pairs] = "none"
    # Whether the objective learns about single samples. Targets then have sample numbers, and the
    # objective has state.
    keeps_history: ClassVar[bool] = False
    # Whether `losses` gets all that the network returns, and not its logits.
    whole_output: ClassVar[bool] = False
    # Whether the loss of a sample depends on all samples of a step. `facts` then says what others
    # have to know of each, and the targets that `losses` gets hold the facts of all (`batch`).
    whole_batch: ClassVar[bool] = False

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
        if targets.mixed is None:
            return self.losses(output, targets)
        clean, mixed = unmixed(output), output[1::2]
        beside = F.cross_entropy(at_least_float32(mixed), targets.mixed.labels, reduction="none")
        return self.losses(clean, targets) + targets.mixed.weight * beside

    @abstractmethod
    def losses(self, output: Any, targets: Targets) -> Tensor:
        """Return the loss of each sample, [N], in float32 or the output's wider type."""

    def check_classes(self, classes: int) -> None:
        """Raise ValueError if the objective is not defined for so many classes."""
        return None

    def facts(self, output: Any, targets: Targets) -> Tensor:
        """Return what the losses of other samples depend on, [N, F]. Only if `whole_batch`."""
        raise NotImplementedError(f"{type(self).__name__} sets whole_batch and has no facts")

    @property
    def begins(self) -> int:
        """The epoch, counted from 0, in which the objective becomes what its name says.

        A run that ends before it is refused.
        """
        return 0

    @property
    def accumulates(self) -> bool:
        """Whether a step may have several micro-batches, if `whole_batch`.

        Each pass over them then begins with one more forward pass, which finds the facts.
        """
        return True

    def begin(self, samples: int, device: torch.device | str) -> None:
        """Learn how many samples the training data has, and where targets will be."""
        return None

    def after_step(self, targets: Sequence[Targets], outputs: Sequence[Any]) -> None:
        """Learn from this rank's micro-batches of a step that was taken.

        The outputs are those of the network in the first pass, at w, without a graph. Skipped steps
        and the pass at w + e are never seen here.
        """
        return None

    def epoch_end(self, total: Total) -> None:
        """Finish an epoch. Called on all ranks together."""
        return None

    def state(self, total: Total) -> State | None:
        """Return what a checkpoint holds, or None without state. Called on all ranks together.

        It is the same on every rank, and does not depend on the number of ranks. Tensors may change
        in the next step.
        """
        return None

    def load(self, state: State) -> None:
        """Go on from what `state` gave. Called after `begin`.

        Raises ValueError for the state of another objective or of other data.
        """
        return None


class OfLabels(Objective):
    """An objective from a function of (logits [N, K], labels) that gives losses [N]."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def losses(self, output: Tensor, targets: Targets) -> Tensor:
        return self.function(output, targets.labels)


def unmixed(output: Tensor) -> Tensor:
    """Return the outputs of the clean images, where clean and mixed images come in turn."""
    return output[0::2]


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Return the "mean" or "sum" of losses [N]; for "none" the losses."""
    if reduction == "none":
        return losses
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not '{reduction}'")
    return losses.mean() if reduction == "mean" else losses.sum()


def at_least_float32(logits: Tensor) -> Tensor:
    """Return the logits in float32, or in their wider type."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
