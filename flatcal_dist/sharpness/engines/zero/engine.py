"""The engine of DeepSpeed ZeRO, stages 1, 2 and 3.

The forward pass uses one copy of the weights, the optimizer changes another, the fp32 master in
parts over ranks. So a perturbation needs no backup: the copy that is used becomes master + e, and
the master, which nothing but the optimizer writes, is what it goes back to. It costs one more
gather of the weights that are used (in stage 3 of the small ones); in low precision a part of e in
fp32 is kept until it has been measured.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flatcal_dist.sharpness.engines.base import (
    Arrangement,
    rates_by_name,
    refuse_part,
    stack,
    with_groups,
)
from flatcal_dist.sharpness.engines.move import Backup, Displacement, Measured, measure
from flatcal_dist.sharpness.engines.zero.parts import Layout, deepspeed, layout_of
from flatcal_dist.sharpness.engines.zero.start import InPrecision, start_zero
from flatcal_dist.sharpness.errors import StepError
from flatcal_dist.sharpness.networks import sparse_refused
from flatcal_dist.sharpness.passes.buffers import broadcast_buffers, set_buffers
from flatcal_dist.sharpness.rules import Rule, Shards, squared_norm
from flatcal_dist.sharpness.scope import Scope

__all__ = ["ZeroEngine", "start_zero"]


class ZeroEngine:
    """The engine around DeepSpeed's engine with ZeRO, as `start_zero` makes it.

    Raises StepError for what a DeepSpeed configuration asks for and this engine does not do.
    """

    def __init__(self, model: "deepspeed.DeepSpeedEngine") -> None:
        _refuse_configuration(model)
        self.zero = model
        self.stage = int(model.zero_optimization_stage())
        self.precision: torch.dtype = model.get_data_types()[0]
        self.model: nn.Module = InPrecision(model, self.precision)
        self.module: nn.Module = model.module
        self.named = self.module
        self.optimizer: torch.optim.Optimizer = model.optimizer.optimizer
        self.device = torch.device(model.device)
        self.world_size = dist.get_world_size()
        self.layout: Layout = layout_of(model)
        held = {id(weight) for group in self.layout.groups for weight in group}
        refuse_part(dict(self._trained()), held)
        if any(part.master.data_ptr() == part.used.data_ptr() for part in self.layout.parts):
            raise StepError(
                "this DeepSpeed keeps one copy of the weights where the engine counts on two: use "
                "the version in pyproject.toml, and start_zero"
            )
        # The parts of other ranks, as this rank uses them, may still be moved.
        self.stale = False
        self.reduced = True  # whether the last backward pass reduced all gradients so far
        self.backup = Backup()  # for scopes that move whole weights; no other move needs one
        self.touched = False  # whether gradients were handed out, and may be changed
        # In float16 only; at its minimum it is to go on skipping, as the other engines do.
        scaler = getattr(model.optimizer, "loss_scaler", None)
        self.scaler = scaler if getattr(scaler, "dynamic", False) else None
        if self.scaler:
            self.scaler.raise_error_at_min_scale = False

    @property
    def loss_scale(self) -> float:
        return float(self.scaler.loss_scale) if self.scaler else 1.0

    def check(self, rule: Rule, scope: Scope, per_micro_batch: bool) -> None:
        if scope.everyone and not per_micro_batch:
            return
        asked = "per_micro_batch" if per_micro_batch else f"scope {scope.name!r}"
        instead = "use scope 'global' without per_micro_batch, or DDP"
        if self.stage == 3:
            raise StepError(
                f"ZeRO-3 cannot do {asked}: a rank's own perturbation needs whole weights of its "
                f"own, and each rank holds one part of weights that all use; {instead}, or ZeRO-1"
            )
        if self.precision != torch.float32:
            raise StepError(
                f"ZeRO-{self.stage} in {self.precision} cannot do {asked}: a rank holds the fp32 "
                f"master of its own part only, and a perturbation added to low-precision weights "
                f"is mostly rounded away; {instead}, or ZeRO-1 in float32"
            )
        if per_micro_batch and self.stage == 2:
            raise StepError(
                "ZeRO-2 cannot do per_micro_batch: it reduces the gradients of each micro-batch "
                f"away before the step ends; {instead}, or ZeRO-1"
            )

    def reduces(self, scope: Scope) -> bool:
        return scope.everyone

    @property
    def scales_losses(self) -> bool:
        return self.scaler is not None

    def leaves_own(self) -> bool:
        return False  # its hooks reduce

    def all_parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def broadcasting(self) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def zero_gradients(self) -> None:
        self._refresh()
        self.layout.clear_gradients()
        self.touched = False

    @contextmanager
    def accumulation(self, reduce: bool) -> Iterator[None]:
        # Stages 2 and 3 reduce each micro-batch, and are told when the last has been.
        self.zero.set_gradient_accumulation_boundary(reduce)
        self.reduced = reduce
        yield

    def backward(self, loss: Tensor) -> None:
        with sparse_refused():
            self.zero.backward(loss, scale_wrt_gas=False)  # scales it in float16

    def fill_gradients(self, names: Iterable[str]) -> None:
        pass  # every part has a gradient

    def shards(self, scope: Scope) -> Shards:
        self.touched = True
        parts = self.layout.parts
        names, masters = [p.name for p in parts], [p.master for p in parts]
        gradients = self.layout.gradients()
        return Shards(names, masters, gradients, loss_scale=self.loss_scale, total=self.over_ranks)

    def whole_weights(self) -> Shards:
        """Return whole weights, for stages 1 and 2.

        It takes the memory of one whole copy, first of the gradient and then of the weights before.
        """
        weights = {n: w for n, w in self.module.named_parameters() if w.requires_grad}
        return Shards(list(weights), list(weights.values()), [], own=True)

    def weight_decays(self) -> dict[str, float]:
        groups = self.optimizer.param_groups
        names = {weight: name for name, weight in self._trained()}
        return {
            names[weight]: float(groups[place].get("weight_decay", 0.0))
            for place, weights in zip(self.layout.places, self.layout.groups, strict=True)
            for weight in weights
        }

    def total(self, part: Tensor) -> Tensor:
        return self.over_ranks(part)

    def over_ranks(self, tensor: Tensor) -> Tensor:
        total = tensor.to(self.device, copy=True)  # on a rank without any part it is on the CPU
        dist.all_reduce(total)
        return total

    @contextmanager
    def moved(self, shards: Shards) -> Iterator[Displacement]:
        if shards.own:
            with self._moved_whole(shards) as of_whole:
                yield of_whole
            return
        moving = set(shards.names)
        held = list(self.layout.parts)  # of stage 3 they are looked up by each call
        places = [place for place, part in enumerate(held) if part.name in moving]
        parts = [held[place] for place in places]
        targets = list(shards.gradients)
        shards.gradients.clear()

        def displacement() -> Measured:
            now = targets if self.precision != torch.float32 else [p.used for p in parts]
            masters = [p.master for p in parts]
            gradients = self.layout.gradients()
            gradients = [gradients[place] for place in places]
            dtypes = [self.precision] * len(parts)
            return measure(now, masters, gradients, dtypes, self.over_ranks)

        try:
            with torch.no_grad():
                if parts:
                    # From the master: e added to bf16 weights would mostly be rounded away.
                    torch._foreach_add_(targets, [p.master for p in parts])
                    torch._foreach_copy_([p.used for p in parts], targets)
                # They lie in DeepSpeed's buffers, which the next pass overwrites.
                measurable = self.precision != torch.float32
                targets = [t.clone() for t in targets] if measurable else []
                self.layout.publish()
            yield displacement
        finally:
            # No communication here: an error may be on this rank alone. DeepSpeed's step puts the
            # master's parts of all ranks in place; whatever comes instead of it refreshes first.
            with torch.no_grad():
                self.layout.withdraw()
            self.stale = True

    @contextmanager
    def _moved_whole(self, shards: Shards) -> Iterator[Displacement]:
        weights = list(shards.weights)
        with self.backup.moved(shards) as before:

            def displacement() -> Measured:
                gradients = [
                    deepspeed.utils.safe_get_full_grad(w) if self.reduced else w.grad
                    for w in weights
                ]
                return measure(weights, before, gradients, [self.precision] * len(weights))

            yield displacement

    @torch.no_grad()
    def _refresh(self) -> None:
        """Put back all weights that the forward pass uses. Called by all ranks."""
        if self.stale:
            self.layout.withdraw()
            self.layout.publish()
            self.stale = False

    def gradient_norm(self) -> Tensor:
        square = self.over_ranks(squared_norm(self.layout.gradients()))
        return square.sqrt() / self.loss_scale

    def update(self, norm: Tensor, clip_norm: float | None) -> None:
        if (clip_norm or 0.0) != self.zero.gradient_clipping():
            raise StepError(
                f"the step clips to {clip_norm}, but DeepSpeed, which does it, to "
                f"{self.zero.gradient_clipping() or None}: give start_zero the same clip_norm"
            )
        if clip_norm is not None and self.touched:
            self.layout.share_gradients()
        self.zero.set_gradient_accumulation_boundary(True)
        self.zero.step()
        if not self.zero.was_step_applied():
            self.stale = True
            raise RuntimeError(
                f"DeepSpeed skipped a step whose gradient norm, {float(norm)}, is finite"
            )
        self.stale = False  # the step has overwritten all parts
        self.zero_gradients()

    def skip(self) -> None:
        self.zero_gradients()
        if self.scaler:
            self.scaler.update_scale(True)

    def sum(self, values: Sequence[Tensor | float]) -> list[float]:
        return self.over_ranks(stack(values, self.device)).tolist()

    def synchronize_buffers(self) -> None:
        broadcast_buffers(self.module)

    @property
    def inference(self) -> nn.Module:
        self._refresh()
        return self.model

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Return full weights from the master, one parameter at a time. Empty on ranks but 0."""
        first = dist.get_rank() == 0
        full = {}
        for name, weight in self.module.named_parameters(remove_duplicate=False):
            if weight.requires_grad:
                tensor = deepspeed.utils.safe_get_full_fp32_param(weight)
                if first:
                    full[name] = tensor.cpu()
                continue
            with self.layout.whole(weight):
                if first:
                    full[name] = weight.detach().float().to("cpu", copy=True)
        kept = self.module.state_dict()
        buffers = {name: kept[name] for name in kept if name not in full}
        full |= {name: b.to("cpu", copy=True) for name, b in buffers.items()}
        return {name: full[name] for name in kept} if first else {}

    def local_state(self) -> dict[str, Any]:
        scaler = vars(self.scaler) if self.scaler else {}
        with self.layout.base_optimizer() as optimizer:
            state = optimizer.state_dict()
        return {
            "masters": self.layout.masters,
            "optimizer": state,
            "scale": {k: v for k, v in scaler.items() if isinstance(v, int | float)},
            "frozen": {name: self.layout.frozen(w) for name, w in self._frozen()},
            "buffers": dict(self.module.named_buffers()),
        }

    @torch.no_grad()
    def load_local_state(self, state: dict[str, Any]) -> None:
        """Go on from a state. Called by all ranks, as many as saved it."""
        for ours, theirs in zip(self.layout.masters, state["masters"], strict=True):
            ours.copy_(theirs)
        with self.layout.base_optimizer() as optimizer:
            optimizer.load_state_dict(state["optimizer"])
        if self.scaler:
            vars(self.scaler).update(state["scale"])
        for name, weight in self._frozen():
            self.layout.frozen(weight).copy_(state["frozen"][name])
        set_buffers(self.module, state["buffers"], self.device)
        self.stale = True
        self._refresh()

    def masters(self) -> dict[str, Tensor]:
        return {part.name: part.master for part in self.layout.parts}

    def rewritten(self) -> None:
        self.stale = True
        self._refresh()

    def learning_rates(self) -> dict[str, float]:
        slots = self.arrangement()["slots"]
        with self.layout.base_optimizer() as optimizer:  # stage 3 empties the groups elsewhere
            return rates_by_name(optimizer, slots)

    def arrangement(self) -> Arrangement:
        with self.layout.base_optimizer() as optimizer:
            flats = [flat for group in optimizer.param_groups for flat in group["params"]]
        slots = [[list(flat.shape), []] for flat in flats]
        for part in self.layout.parts:
            for flat, (_, held) in zip(flats, slots, strict=True):
                offset = (part.master.data_ptr() - flat.data_ptr()) // flat.element_size()
                if 0 <= offset < flat.numel():
                    held.append([part.name, offset, part.master.numel()])
        shapes = {n: list(getattr(w, "ds_shape", w.shape)) for n, w in self._trained()}
        pieces = {p.name: [shapes[p.name], p.start, p.master.numel()] for p in self.layout.parts}
        return {"pieces": pieces, "slots": slots, "loss_scale": self.loss_scale}

    def load_optimizer(self, state: dict[int, dict[str, Any]], groups: list[dict]) -> None:
        with self.layout.base_optimizer() as optimizer:
            optimizer.load_state_dict(with_groups(optimizer, state, groups))

    def set_loss_scale(self, value: float) -> None:
        if self.scaler:
            self.scaler.cur_scale = value

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, w) for n, w in self.module.named_parameters() if w.requires_grad)

    def _frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, w) for n, w in self.module.named_parameters() if not w.requires_grad)


def _refuse_configuration(model: "deepspeed.DeepSpeedEngine") -> None:
    """Raise StepError for what is not as `start_zero` sets it up."""
    if not isinstance(model, deepspeed.DeepSpeedEngine):
        raise StepError(
            f"ZeroEngine takes DeepSpeed's engine itself, as start_zero gives it, not a "
            f"{type(model).__name__}: put a wrapper around the network before start_zero"
        )
    if isinstance(model.optimizer.optimizer, torch.optim.Adagrad):
        raise StepError(
            "ZeRO cannot do Adagrad: its state is there from the start, and DeepSpeed builds it "
            "again without its parameter groups; use another optimizer, such as AdamW, or DDP"
        )
    wrong = {
        "a ZeRO stage other than 1, 2, 3": model.zero_optimization_stage() not in (1, 2, 3),
        "offload": model.zero_offload_optimizer() or model.zero_offload_param(),
        "gradient_accumulation_steps above 1": model.gradient_accumulation_steps() != 1,
        "gradients accumulated in less than fp32": model.get_data_types()[1] != torch.float32,
        "secondary partitions (hpZ)": model.zero_hpz_partition_size() > 1,
        "experts, or model or sequence parallelism": model.has_moe_layers
        or model.dp_world_size != dist.get_world_size(),
        "a fixed loss scale": model.fp16_enabled() and not model.dynamic_loss_scale(),
    }
    for what, found in wrong.items():
        if found:
            raise StepError(f"ZeroEngine does not do {what}; build the engine with start_zero")
