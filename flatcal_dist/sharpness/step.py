"""The sharpness-aware step: the choreography of one optimizer step, the same on every engine.

    gradient at w  ->  w + e  ->  gradient at w + e  ->  back to w, bit for bit  ->  optimizer

It is a controller and not an optimizer: it owns the whole step, so that it decides when gradients
are reduced, what a non-finite value means for all ranks, and that nothing outlives a perturbation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, nn

from flatcal_dist.losses import cross_entropy
from flatcal_dist.sharpness.engines import Engine
from flatcal_dist.sharpness.rules import SAM, Loss

SCOPES = ("global", "rank")


@dataclass(frozen=True)
class StepResult:
    """What happened in one step. Losses are means over the global batch, norms of its gradients.

    `perturbed_loss` and `ascent_gradient_norm` are None without a rule. In scope "rank" the latter
    is the mean of the ranks' own norms. `skipped`: a value was not finite on some rank in either
    pass, so no rank moved. `stop`: some rank passed stop=True.
    """

    loss: float
    perturbed_loss: float | None
    ascent_gradient_norm: float | None
    gradient_norm: float
    skipped: bool
    stop: bool


class SharpnessAwareStep:
    """One optimizer step on the micro-batches of one rank.

    rule: SAM, CSAM, or None for plain training. loss: per-sample objective (logits [N, K],
    target [N]) -> [N] of the ascent gradient; the rule derives that of the descent from it.
    scope: "global", every rank moves to the same w + e, from the mean gradient of all ranks, so
    that N ranks with batch B are one rank with batch N * B; or "rank", each rank perturbs with its
    own gradient (m-sharpness, Foret et al. 2021, section 4.1). clip_norm: of the descent gradient.
    """

    def __init__(
        self,
        engine: Engine,
        rule: SAM | None,
        *,
        loss: Loss | None = None,
        scope: str = "global",
        clip_norm: float | None = None,
    ) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, not '{scope}'")
        self.engine = engine
        self.rule = rule
        self.scope = scope
        self.clip_norm = clip_norm
        self.loss: Loss = loss or _plain_cross_entropy
        self.descent_loss = rule.descent_loss(self.loss) if rule else self.loss

    def __call__(
        self,
        micro_batches: Sequence[tuple[Tensor, Tensor]],
        *,
        samples: int | None = None,
        stop: bool = False,
    ) -> StepResult:
        """Take the step on this rank's (inputs, target) pairs.

        samples: size of the global batch over all ranks and micro-batches; one more small reduction
        finds it when it is not given. stop: this rank wishes to end; the result tells all ranks.
        """
        engine = self.engine
        own = sum(len(target) for _, target in micro_batches)
        if samples is None:
            samples = round(engine.sum([float(own)])[0])
        share = (
            engine.world_size / samples
        )  # engines average over ranks: losses are summed times this

        with SameFunctionTwice(engine.module, engine.device) as replay:
            engine.zero_gradients()
            if self.rule is None:
                loss = self._pass(micro_batches, self.loss, share)
                perturbed_loss = ascent_norm = loss.new_zeros(())
            else:
                local = self.scope == "rank"
                loss = self._pass(micro_batches, self.loss, 1 / own if local else share, local)
                replay.rewind()
                with engine.perturbed(self.rule, local) as ascent_norm:
                    perturbed_loss = self._pass(micro_batches, self.descent_loss, share)
                replay.forward()

            norm = engine.gradient_norm()
            mine = torch.stack([loss, perturbed_loss, ascent_norm.double(), norm.double()])
            skip = 1 - mine.isfinite().all().double()
            asked = torch.full_like(skip, float(stop))
            total = engine.sum([*mine, skip, asked])
            skipped = total[4] > 0
            if skipped:
                replay.undo()
            else:
                engine.update(norm, self.clip_norm)
            engine.zero_gradients()

        return StepResult(
            loss=total[0] / samples,
            perturbed_loss=total[1] / samples if self.rule else None,
            ascent_gradient_norm=total[2] / engine.world_size if self.rule else None,
            gradient_norm=total[3] / engine.world_size,
            skipped=skipped,
            stop=total[5] > 0,
        )

    def _pass(
        self,
        micro_batches: Sequence[tuple[Tensor, Tensor]],
        loss: Loss,
        weight: float,
        local: bool = False,
    ) -> Tensor:
        """Accumulate the gradient of weight * (sum of losses); reduce it with the last micro-batch.

        Returns the sum of this rank's losses, a float64 scalar.
        """
        # Inside somebody's outer autocast block the low-precision copies of the weights would
        # outlive the perturbation: pass two would silently see the weights of pass one.
        torch.clear_autocast_cache()
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for number, (inputs, target) in enumerate(micro_batches, start=1):
            synchronize = number == len(micro_batches) and not local
            with self.engine.accumulation(synchronize):
                losses = loss(self.engine.model(inputs), target).sum()
                self.engine.backward(losses * weight)
            total += losses.detach()
        return total


class SameFunctionTwice:
    """Makes the two passes see one function, and count once.

    The random state of the first pass is replayed in the second (the same dropout and drop-path
    masks), and ends where one pass would have left it. Buffers (running statistics of norm layers)
    keep what the first pass, at w, made of them. An exception, or `undo`, gives them back as they
    were before the step.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.buffers = list(module.buffers())
        self.device = device

    def __enter__(self) -> "SameFunctionTwice":
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.random_before = self._random_state()
        return self

    def rewind(self) -> None:
        """After the first pass: go back to the random state before it, remember what it made."""
        self.buffers_after = [buffer.clone() for buffer in self.buffers]
        self.random_after = self._random_state()
        self._set_random_state(self.random_before)

    def forward(self) -> None:
        """After the second pass: leave everything as the first pass left it."""
        self._set_buffers(self.buffers_after)
        self._set_random_state(self.random_after)

    def undo(self) -> None:
        """The step does not count: buffers as before it."""
        self._set_buffers(self.buffers_before)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.undo()

    def _set_buffers(self, values: list[Tensor]) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, values)

    def _random_state(self) -> list[Tensor]:
        state = [torch.get_rng_state()]
        if self.device.type != "cpu":
            state.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return state

    def _set_random_state(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(state[1], self.device)


def _plain_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits, target, reduction="none")
