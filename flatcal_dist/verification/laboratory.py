"""A bench for one step: a network in which all that a step could get wrong is at stake.

The network is the configuration's; behind its logits come a batch norm, a dropout, and confidence,
so that statistics, random streams and CSAM's own branch matter whatever it is. The reference is a
plain loop: one process, every rank's images and random stream in turn, no engine, rule or loss of
ours.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatcal_dist.config import Config, OptimizerConfig
from flatcal_dist.objectives import CrossEntropy, LabelSmoothing, Targets
from flatcal_dist.sharpness import CSAM, GSAM, SAM, LookSAM, MomentumSAM, Rule, StepResult
from flatcal_dist.sharpness.rules import Loss
from flatcal_dist.sharpness.step import MicroBatches
from flatcal_dist.training.build import DTYPES, build_step

MICRO_BATCHES = (7, 5)  # images: two, uneven, and enough for batch statistics
IN_PAIRS = (8, 4)  # as many, for an objective that compares pairs of images
STREAM = 1000  # seed of rank r's random stream: STREAM + r
RATE, MOMENTUM = 0.05, 0.9
Weights = dict[str, Tensor]
Buffers = list[dict[str, Tensor | None]]  # by module of a network
LEADING = 4  # classes that the probe is sure of


class Probed(nn.Module):
    """The network, and behind its logits a batch norm, a dropout, and confidence in some classes.

    The first few classes lead by so much that about half of the images have one above p = 1/2,
    where CSAM is not SAM; a network at its start has none.
    """

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.norm = nn.BatchNorm1d(classes)
        self.dropout = nn.Dropout(0.2)
        self.lead = 2 + math.log(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.dropout(self.norm(self.network(images).float()))
        return torch.cat([4 * logits[:, :LEADING] + self.lead, logits[:, LEADING:]], 1)


class Laboratory:
    """A step built as the configuration says, put back to its start before each measurement."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        optimizer = OptimizerConfig(name="sgd", learning_rate=RATE, momentum=MOMENTUM)
        config = config.model_copy(update={"optimizer": optimizer})
        self.plain_network: nn.Module | None = None

        def probe(network: nn.Module) -> nn.Module:
            probed = Probed(network, config.model.num_classes)
            self.plain_network = copy.deepcopy(probed)
            return probed

        self.step = build_step(config, accelerator, wrap=probe)
        self.engine = self.step.engine
        self.start = copy.deepcopy(self.engine.local_state())
        self.low = config.train.precision != "fp32"
        self.sizes = MICRO_BATCHES if self.step.loss.pairs == "none" else IN_PAIRS
        self.samples = sum(self.sizes) * self.world_size
        self.step.loss.begin(self.samples, self.engine.device)
        self.sure = 0  # samples above p = 1/2, of all ranks
        # The reference, on rank 0, wants those of all ranks.
        wanted = range(self.world_size) if self.rank == 0 else [self.rank]
        self.batches = {rank: self._labelled(rank) for rank in wanted}
        self.sam = SAM(max(config.sharpness.rho, 1e-3))
        self.trained = [n for n, w in self.plain_network.named_parameters() if w.requires_grad]
        self.buffers = [n for n, _ in self.plain_network.named_buffers()]
        self.unset = [  # registered as None: a pass may have filled them
            (name, key)
            for name, module in self.plain_network.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is None
        ]
        self._find_loss_scale()

    def _find_loss_scale(self) -> None:
        """In fp16 start from a scale at which the step is taken and not skipped."""
        while self.engine.scales_losses:
            torch.manual_seed(STREAM + self.rank)
            self.start = copy.deepcopy(self.engine.local_state())
            result = self.step(self.batches[self.rank], samples=self.samples)
            if not result.skipped or result.loss_scale == 1:
                break

    def _labelled(self, rank: int) -> MicroBatches:
        """Micro-batches of one rank, labelled in its random stream.

        Where the network is sure of a class it is right, elsewhere it is wrong. So no sample is
        near CSAM's jump at p = 1/2, where rounding would decide.
        """
        data = self.config.data
        generator = torch.Generator().manual_seed(rank)
        shape = (data.channels, data.image_size, data.image_size)
        scratch = copy.deepcopy(self.plain_network).to(self.engine.device).train()
        torch.manual_seed(STREAM + rank)
        micro_batches = []
        numbers = torch.arange(self.samples, device=self.engine.device).chunk(self.world_size)
        for size, samples in zip(self.sizes, numbers[rank].split(self.sizes), strict=True):
            images = torch.randn(size, *shape, generator=generator).to(self.engine.device)
            with torch.no_grad(), _precision(self):
                p = scratch(images).float().softmax(1)
            sure = p.amax(1) > 0.65
            self.sure += int(sure.sum())
            likely = p.topk(min(3, p.shape[1])).indices  # the third is at most 1/3
            labels = torch.where(sure, likely[:, 0], likely[:, -1])
            micro_batches.append((images, Targets(labels, samples)))
        return micro_batches

    def weights(self) -> Weights:
        """Full weights and buffers, on the CPU; whole on rank 0."""
        return {name: tensor.clone() for name, tensor in self.engine.full_weights().items()}

    def take(
        self,
        rule: Rule | None = None,
        *,
        rate: float = RATE,
        plain: bool = False,
        micro_batches: MicroBatches | None = None,
        descent_loss: Loss | None = None,
        measure: bool = False,
        steps: int = 1,
    ) -> tuple[StepResult, Weights, Weights]:
        """Step from the start, by default as configured: last result, weights before and after."""
        network = getattr(self.engine, "named", self.engine.module)
        for name, key in self.unset:
            setattr(network.get_submodule(name), key, None)
        self.engine.load_local_state(copy.deepcopy(self.start))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        before = self.weights()
        step = self.step
        own = step.rule, step.rho, step.descent_loss
        if rule is not None or plain:
            step.rule, step.rho = rule, rule.rho if rule else 0.0
        if step.rule is not None:
            step.descent_loss = descent_loss or step.rule.descent_loss(step.loss)
        step.taken, step.memory = 0, None
        micro_batches = micro_batches or self.batches[self.rank]
        try:
            for _ in range(steps):
                torch.manual_seed(STREAM + self.rank)
                result = step(micro_batches, samples=self.samples, measure=measure)
        finally:
            step.rule, step.rho, step.descent_loss = own
        return result, before, self.weights()


def reference_steps(lab: Laboratory, count: int) -> Weights:
    """The weights after one step of SGD with the configured rule, by the papers' formulas.

    count 2: and after one more, which does not perturb, as periodic SAM's and LookSAM's second, or
    perturbs by the first one's gradient, as Momentum-SAM's.
    """
    network = copy.deepcopy(lab.plain_network).to(lab.engine.device).train()
    weights = [w for w in network.parameters() if w.requires_grad]
    buffers = {rank: _buffers(network) for rank in range(lab.world_size)}  # each rank has its own
    gradient, ascent = _descent_gradient(lab, network, buffers)
    rule = lab.step.rule
    if isinstance(rule, GSAM):
        ascent = [a / lab.samples for a in ascent]
        along = _dot(gradient, ascent) / _dot(gradient, gradient)
        across = [a - along * g for g, a in zip(gradient, ascent, strict=True)]
        gradient = [g - rule.alpha * a for g, a in zip(gradient, across, strict=True)]
    momentum = _clipped(gradient, lab.step.clip_norm)
    _move(weights, momentum)
    if count == 2:
        everyone = range(lab.world_size)
        states = _random_states(lab, network, everyone, buffers)
        pieces = [(r, p) for r in everyone for p in range(len(lab.sizes))]
        at = _copied(network)
        if isinstance(rule, MomentumSAM):
            length = lab.step.rho / _dot(gradient, gradient) ** 0.5
            _move([w for w in at.parameters() if w.requires_grad], gradient, length)
        plain, _ = _gradient(lab, at, pieces, states, buffers, _objective(lab))
        plain = [g / lab.samples for g in plain]
        if isinstance(rule, LookSAM):
            along = _dot(gradient, ascent) / _dot(ascent, ascent)
            kept = [g - along * a for g, a in zip(gradient, ascent, strict=True)]
            factor = rule.alpha * (_dot(plain, plain) / _dot(kept, kept)) ** 0.5
            plain = [g + factor * v for g, v in zip(plain, kept, strict=True)]
        plain = _clipped(plain, lab.step.clip_norm)
        momentum = [MOMENTUM * m + g for m, g in zip(momentum, plain, strict=True)]
        _move(weights, momentum)
    return {name: w.detach().cpu() for name, w in network.named_parameters()}


def _descent_gradient(
    lab: Laboratory, network: nn.Module, buffers: dict[int, Buffers]
) -> tuple[list[Tensor], list[Tensor]]:
    """The mean over all samples at each group's own w + e; and the last group's ascent gradient.

    buffers: of each rank; they become those of one clean pass.
    """
    step, rule = lab.step, lab.step.rule
    total = [torch.zeros_like(w) for w in network.parameters() if w.requires_grad]
    ascent: list[Tensor] = []
    for first in range(0, lab.world_size, step.scope.ranks):
        group = range(first, first + step.scope.ranks)
        states = _random_states(lab, network, group, buffers)
        parts = range(len(lab.sizes))
        units = [[p] for p in parts] if step.per_micro_batch else [list(parts)]
        for unit in units:
            pieces = [(r, p) for r in group for p in unit]
            moved = _copied(network)
            gradient, after = _gradient(lab, network, pieces, states, buffers, _objective(lab))
            if rule is not None and rule.ascent_share:  # else there is nothing to perturb by yet
                ascent = gradient
                _perturb(moved, ascent, rule, step.rho)
                loss = _csam(rule.gamma) if isinstance(rule, CSAM) else _objective(lab)
                gradient, _ = _gradient(lab, moved, pieces, states, buffers, loss)
            buffers |= after
            for t, g in zip(total, gradient, strict=True):
                t += g / lab.samples
    return total, ascent


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


def _clipped(gradient: list[Tensor], clip_norm: float | None) -> list[Tensor]:
    norm = _dot(gradient, gradient) ** 0.5
    factor = min(1.0, (clip_norm or float("inf")) / (norm + 1e-6))
    return [g * factor for g in gradient]


@torch.no_grad()
def _move(weights: list[nn.Parameter], by: list[Tensor], rate: float = RATE) -> None:
    for w, b in zip(weights, by, strict=True):
        w -= rate * b


def _copied(network: nn.Module) -> nn.Module:
    """A deep copy, also where a forward pass left a weight that it computed as an attribute."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()
    return copy.deepcopy(network)


def _buffers(network: nn.Module) -> Buffers:
    return [copy.deepcopy(dict(module._buffers)) for module in network.modules()]


def _put(network: nn.Module, buffers: Buffers) -> None:
    for module, own in zip(network.modules(), buffers, strict=True):
        module._buffers.clear()
        module._buffers.update(copy.deepcopy(own))


def _random_states(
    lab: Laboratory, network: nn.Module, group: range, buffers: dict[int, Buffers]
) -> dict[tuple[int, int], list[Tensor]]:
    """The random state in which each rank meets each of its micro-batches."""
    states = {}
    scratch = _copied(network)
    for rank in group:
        _put(scratch, buffers[rank])
        torch.manual_seed(STREAM + rank)
        for part, (images, _) in enumerate(lab.batches[rank]):
            states[rank, part] = _state(lab)
            with torch.no_grad(), _precision(lab):
                scratch(images)
    return states


def _gradient(
    lab: Laboratory,
    network: nn.Module,
    pieces: list[tuple[int, int]],
    states: dict[tuple[int, int], list[Tensor]],
    buffers: dict[int, Buffers],
    loss: Loss,
) -> tuple[list[Tensor], dict[int, Buffers]]:
    """Of the summed losses of these (rank, micro-batch) pieces, each in its own random state.

    Each rank starts from its buffers; also what its pieces made of them.
    """
    weights = [w for w in network.parameters() if w.requires_grad]
    total = [torch.zeros_like(w) for w in weights]
    after: dict[int, Buffers] = {}
    for rank, part in pieces:
        _put(network, after.get(rank, buffers[rank]))
        images, targets = lab.batches[rank][part]
        _set_state(lab, states[rank, part])
        with _precision(lab):
            logits = network(images)
        gradients = torch.autograd.grad(loss(logits, targets), weights, allow_unused=True)
        for t, g in zip(total, gradients, strict=True):
            if g is not None:
                t += g
        after[rank] = _buffers(network)
    return total, after


@torch.no_grad()
def _perturb(network: nn.Module, gradient: list[Tensor], rule: Rule, rho: float) -> None:
    named = [(n, w) for n, w in network.named_parameters() if w.requires_grad]
    eta = getattr(rule, "eta", None)
    stretch = [w.abs() + eta if eta is not None and "weight" in n else 1.0 for n, w in named]
    scaled = [t * g for t, g in zip(stretch, gradient, strict=True)]
    norm = torch.sqrt(sum((s.double() ** 2).sum() for s in scaled))
    for (_, w), t, s in zip(named, stretch, scaled, strict=True):
        w += (rho / norm * (t * s)).to(w.dtype)


def _objective(lab: Laboratory) -> Loss:
    """Cross-entropy is written out here; another objective is taken as it is."""
    objective = lab.config.objective.build()
    if not isinstance(objective, CrossEntropy | LabelSmoothing):
        objective.begin(lab.samples, lab.engine.device)
        return lambda logits, targets: objective(logits.float(), targets).sum()
    smoothing = getattr(objective, "smoothing", 0.0)

    def loss(logits: Tensor, targets: Targets) -> Tensor:
        log_p = logits.float().log_softmax(1)
        own = log_p.gather(1, targets.labels[:, None])[:, 0]
        return -((1 - smoothing) * own + smoothing * log_p.mean(1)).sum()

    return loss


def _csam(gamma: float) -> Loss:
    def loss(logits: Tensor, targets: Targets) -> Tensor:
        p = logits.float().softmax(1).gather(1, targets.labels[:, None])[:, 0]
        return torch.where(p <= 0.5, -p.log(), -((1 + p) ** -gamma) * p.log()).sum()

    return loss


@contextmanager
def _precision(lab: Laboratory) -> Iterator[None]:
    dtype = DTYPES[lab.config.train.precision]
    with torch.autocast(lab.engine.device.type, dtype, enabled=lab.low, cache_enabled=False):
        yield


def _state(lab: Laboratory) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if lab.engine.device.type == "cuda":
        state.append(torch.cuda.get_rng_state(lab.engine.device))
    return state


def _set_state(lab: Laboratory, state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], lab.engine.device)
