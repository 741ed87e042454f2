"""Correctness ranking loss."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flatcal_dist.objectives.base import Objective, Pairs, State, Total, at_least_float32
from flatcal_dist.objectives.cross_entropy import cross_entropy
from flatcal_dist.objectives.targets import Targets


@dataclass(eq=False)
class CRL(Objective):
    """Cross-entropy, and confidence in the order of past correctness (Moon et al., ICML 2020).

    With c the largest softmax probability of a sample, and h the share of past epochs in which its
    class was predicted, the loss of both samples i, j of a pair is

        -log p + weight * max(0, |h_i - h_j| - sign(h_i - h_j) (c_i - c_j)),

    where the second term is 0 for h_i = h_j. As in the authors' code
    (daintlab/confidence-aware-learning), h = (n - min n) / (E - min n), with n the number of epochs
    in which a sample was right, in training mode and as augmented, the minimum over all samples,
    and E the number of epochs. In a sharpness-aware step the pass at w counts.

    This class differs from that code in three points. First, partners are the samples at places 2i
    and 2i + 1 of the global batch. The authors compare each sample with the next one of the batch,
    and the last with the first; that pairing would depend on how a batch is cut among ranks and
    micro-batches. Second, the history of an epoch counts from the end of the epoch on, also for the
    minimum, so that all ranks use the same history. Third, where all samples were right in all
    epochs, h is 0 / 0 in that code, and 1 here.

    A sample that an epoch left out was not right in it. A sample that comes twice (it stands in for
    a damaged image) was right in the epoch if it was right once.

    With weight 0 the loss is cross-entropy.
    """

    name: ClassVar[str] = "crl"
    hard_labels: ClassVar[bool] = True
    pairs: ClassVar[Pairs] = "any"
    keeps_history: ClassVar[bool] = True

    weight: Annotated[
        float, Field(ge=0, le=1000, description="The weight of the ranking loss.")
    ] = 1.0
    begun: bool = field(default=False, init=False, repr=False)  # the next three are there
    epochs: int = field(default=0, init=False)  # the number of epochs that ended
    correct: Tensor = field(init=False, repr=False)  # n, [samples] int32
    # How often each sample was right in the present epoch, [samples] int32: the sum over ranks that
    # was agreed on, and what this rank saw since.
    agreed: Tensor = field(init=False, repr=False)
    own: Tensor = field(init=False, repr=False)

    def begin(self, samples: int, device: torch.device | str) -> None:
        self.epochs = 0
        self.correct, self.agreed, self.own = (
            torch.zeros(samples, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.begun = True
        self._measure()

    def _measure(self) -> None:
        """Read the least n and E once for the whole epoch, because it waits for the device."""
        least = int(self.correct.min()) if len(self.correct) else 0
        self.least, self.most = least, max(self.epochs, 1)

    def correctness(self, samples: Tensor) -> Tensor:
        """Return h of these samples, float32 [N] in [0, 1]."""
        if not self.begun:
            raise ValueError(
                "CRL does not know how many samples there are: call "
                "begin(samples=len(dataset), device=...) before the first step"
            )
        if samples.device.type == "cpu" and len(samples):
            low, high = int(samples.min()), int(samples.max())
            if low < 0 or high >= len(self.correct):
                raise ValueError(
                    f"CRL was told of {len(self.correct)} samples, numbers 0 to "
                    f"{len(self.correct) - 1}, and got a batch with the numbers {low} to {high}"
                )
        if self.least == self.most:
            return torch.ones(len(samples), device=self.correct.device)
        return (self.correct[samples] - self.least).float() / (self.most - self.least)

    def losses(self, output: Tensor, targets: Targets) -> Tensor:
        history = self.correctness(_numbers(targets))
        confidence = at_least_float32(output).softmax(1).amax(1)
        apart = history[0::2] - history[1::2]
        # max(0, -sign (c_i - (c_j + |apart| / sign))); |apart| / sign is apart itself.
        ranking = F.margin_ranking_loss(
            confidence[0::2], confidence[1::2] + apart, apart.sign(), reduction="none"
        )
        plain = cross_entropy(output, targets.labels, "none")
        return plain + self.weight * ranking.repeat_interleave(2)

    @torch.no_grad()
    def after_step(self, targets: Sequence[Targets], outputs: Sequence[Tensor]) -> None:
        for those, output in zip(targets, outputs, strict=True):
            right = output.argmax(1) == those.labels
            self.own.index_add_(0, _numbers(those), right.to(torch.int32))

    def epoch_end(self, total: Total) -> None:
        self._agree(total)
        self.correct += self.agreed.clamp(max=1)
        self.agreed.zero_()
        self.epochs += 1
        self._measure()

    def _agree(self, total: Total) -> None:
        self.agreed += total(self.own)
        self.own.zero_()

    def state(self, total: Total) -> State:
        self._agree(total)
        return {
            "correct": self.correct,
            "agreed": self.agreed,
            "epochs": torch.tensor(self.epochs),
        }

    def load(self, state: State) -> None:
        if state.keys() != {"correct", "agreed", "epochs"}:
            raise ValueError(f"this is no history of CRL, it holds {sorted(state)}")
        if not self.begun or len(state["correct"]) != len(self.correct):
            own = len(self.correct) if self.begun else "none"
            raise ValueError(
                f"the history is of {len(state['correct'])} samples, the training data has {own}"
            )
        self.correct.copy_(state["correct"])
        self.agreed.copy_(state["agreed"])
        self.own.zero_()
        self.epochs = int(state["epochs"])
        self._measure()


def _numbers(targets: Targets) -> Tensor:
    """Return the sample numbers, without which `Objective.__call__` takes no targets here."""
    assert targets.samples is not None
    return targets.samples
