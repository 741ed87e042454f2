"""Is the step right here? The invariants, measured on the engine, precision and hardware at hand.

The network is the configuration's, with a batch norm and a dropout behind its logits, so that
statistics and random streams are at stake whatever it is. The reference is a plain loop in this
file: one process, every rank's images and random stream in turn, no engine and no library of ours.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from flatcal_dist.config import Config, OptimizerConfig
from flatcal_dist.losses import csam_loss
from flatcal_dist.sharpness import CSAM, SAM, ReplicatedEngine
from flatcal_dist.training.build import DTYPES, build_step

MICRO_BATCHES = (7, 5)  # images: two, uneven, and enough for batch statistics
STREAM = 1000  # seed of rank r's random stream: STREAM + r
RATE = 0.1


@dataclass(frozen=True)
class Row:
    """One line of the table: `measured` must be at most `bound` (at least, where `above`)."""

    invariant: str
    measured: float
    bound: float
    above: bool = False

    @property
    def holds(self) -> bool:
        return self.measured >= self.bound if self.above else self.measured <= self.bound


class Probed(nn.Module):
    """The network, and behind its logits what a step could get wrong: statistics, randomness."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.norm = nn.BatchNorm1d(classes)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(self.norm(self.network(images).float()))


class Laboratory:
    """A step built as the configuration says, put back to its start before each measurement."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        optimizer = OptimizerConfig(name="sgd", learning_rate=RATE, momentum=0.9)
        config = config.model_copy(update={"optimizer": optimizer})
        self.plain_network: nn.Module | None = None

        def probe(network: nn.Module) -> nn.Module:
            probed = Probed(network, config.model.num_classes)
            self.plain_network = copy.deepcopy(probed)
            return probed

        self.step = build_step(config, accelerator, wrap=probe)
        self.engine = self.step.engine
        self.start = copy.deepcopy(self.engine.local_state())
        self.batches = [self._images(rank) for rank in range(self.world_size)]
        self.samples = sum(MICRO_BATCHES) * self.world_size
        self.low = config.train.precision != "fp32"

    def _images(self, rank: int) -> list[tuple[Tensor, Tensor]]:
        data, classes = self.config.data, self.config.model.num_classes
        generator = torch.Generator().manual_seed(rank)
        shape = (data.channels, data.image_size, data.image_size)
        return [
            (
                torch.randn(size, *shape, generator=generator).to(self.engine.device),
                torch.randint(classes, (size,), generator=generator).to(self.engine.device),
            )
            for size in MICRO_BATCHES
        ]

    def take(self, rule: SAM | None = None, rate: float = RATE, plain: bool = False, **options):
        """One step from the start: result, weights before and after (full, on the CPU)."""
        self.engine.load_local_state(copy.deepcopy(self.start))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        before = {name: tensor.clone() for name, tensor in self.engine.full_weights().items()}
        own = self.step.rule, self.step.rho
        if rule is not None or plain:
            self.step.rule, self.step.rho = rule, rule.rho if rule else 0.0
        self.step.taken, self.step.memory = 0, None
        torch.manual_seed(STREAM + self.rank)
        try:
            micro_batches = options.pop("micro_batches", self.batches[self.rank])
            result = self.step(micro_batches, samples=self.samples, **options)
        finally:
            self.step.rule, self.step.rho = own
        after = {name: tensor.clone() for name, tensor in self.engine.full_weights().items()}
        return result, before, after


def reference_step(lab: Laboratory) -> dict[str, Tensor]:
    """The weights after one step of SGD with the configured rule, by the papers' formulas."""
    network = copy.deepcopy(lab.plain_network).to(lab.engine.device).train()
    step, rule = lab.step, lab.step.rule
    weights = [w for w in network.parameters() if w.requires_grad]
    total = [torch.zeros_like(w) for w in weights]
    for first in range(0, lab.world_size, step.scope.ranks):
        group = range(first, first + step.scope.ranks)
        states = _random_states(lab, network, group)
        parts = range(len(MICRO_BATCHES))
        units = [[p] for p in parts] if step.per_micro_batch else [list(parts)]
        for unit in units:
            pieces = [(r, p) for r in group for p in unit]
            moved = copy.deepcopy(network)
            if rule is not None:
                ascent = _gradient(lab, network, pieces, states, _cross_entropy)
                _perturb(moved, ascent, rule, step.rho)
            loss = _csam(rule.gamma) if isinstance(rule, CSAM) else _cross_entropy
            for t, g in zip(total, _gradient(lab, moved, pieces, states, loss), strict=True):
                t += g / lab.samples
    with torch.no_grad():
        for w, g in zip(weights, total, strict=True):
            norm = torch.sqrt(sum((t.double() ** 2).sum() for t in total))
            clip = step.clip_norm or float("inf")
            w -= RATE * g * min(1.0, clip / (float(norm) + 1e-6))
    return {name: w.detach().cpu() for name, w in network.named_parameters()}


def _random_states(lab: Laboratory, network: nn.Module, group: range) -> dict:
    """The random state in which each rank meets each of its micro-batches."""
    states = {}
    scratch = copy.deepcopy(network)
    for rank in group:
        torch.manual_seed(STREAM + rank)
        for part, (images, _) in enumerate(lab.batches[rank]):
            states[rank, part] = _state(lab)
            with torch.no_grad(), _precision(lab):
                scratch(images)
    return states


def _gradient(lab, network, pieces, states, loss) -> list[Tensor]:
    """Of the summed losses of these (rank, micro-batch) pieces, each in its own random state."""
    weights = [w for w in network.parameters() if w.requires_grad]
    total = [torch.zeros_like(w) for w in weights]
    for rank, part in pieces:
        images, labels = lab.batches[rank][part]
        _set_state(lab, states[rank, part])
        with _precision(lab):
            logits = network(images)
        gradients = torch.autograd.grad(loss(logits, labels), weights, allow_unused=True)
        for t, g in zip(total, gradients, strict=True):
            if g is not None:
                t += g
    return total


@torch.no_grad()
def _perturb(network: nn.Module, gradient: list[Tensor], rule: SAM, rho: float) -> None:
    named = [(n, w) for n, w in network.named_parameters() if w.requires_grad]
    eta = getattr(rule, "eta", None)
    stretch = [
        w.abs() + eta if eta is not None and "weight" in n.rsplit(".", 1)[-1] else 1.0
        for n, w in named
    ]
    scaled = [t * g for t, g in zip(stretch, gradient, strict=True)]
    norm = torch.sqrt(sum((s.double() ** 2).sum() for s in scaled))
    for (_, w), t, s in zip(named, stretch, scaled, strict=True):
        w += (rho / norm * (t * s)).to(w.dtype)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def _csam(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, labels: csam_loss(logits, labels, gamma, reduction="sum")


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


def distance(
    a: dict[str, Tensor], b: dict[str, Tensor], names: Sequence[str] | None = None
) -> float:
    """Largest difference of two sets of tensors; 0 on a rank that has none of them."""
    both = [n for n in (a if names is None else names) if n in a and n in b]
    return max((float((a[n].double() - b[n].double()).abs().max()) for n in both), default=0.0)


def engine_class(config: Config) -> type:
    """The class that faults are put into."""
    if config.train.engine == "ddp":
        return ReplicatedEngine
    if config.train.engine == "fsdp2":
        from flatcal_dist.sharpness.fsdp2 import ShardedEngine

        return ShardedEngine
    from flatcal_dist.sharpness.zero import ZeroEngine

    return ZeroEngine


def verify(config: Config, accelerator: Accelerator) -> list[Row]:
    """Measure every invariant; called by all ranks, the rows are rank 0's to judge."""
    lab = Laboratory(config, accelerator)
    weights = [name for name, w in lab.plain_network.named_parameters() if w.requires_grad]
    buffers = [name for name, _ in lab.plain_network.named_buffers()]
    sam = SAM(max(config.sharpness.rho, 1e-3))
    rows = []

    result, before, after = lab.take(measure=True)
    expected = reference_step(lab)
    largest = max(float(w.abs().max()) for w in expected.values())
    update = distance(after, before, weights)
    bound = 1e-6 * largest if not lab.low else 0.1 * update
    rows.append(
        Row("equals one process (weights after a step)", distance(after, expected, weights), bound)
    )
    rows.append(
        Row(
            "all ranks report and hold the same",
            _spread(result, {n: after[n] for n in weights if n in after}, accelerator),
            0.0,
        )
    )

    result, *_ = lab.take(sam, measure=True)
    if not lab.low:
        off = abs(result.effective_rho / sam.rho - 1)
        rows.append(Row("length of the perturbation is rho (relative)", off, 1e-3))
    else:
        rows.append(
            Row(
                "share of rho that survives rounding",
                result.effective_rho / sam.rho,
                0.5,
                above=True,
            )
        )

    _, before, after = lab.take(rate=0.0)
    rows.append(Row("weights come back bit for bit", distance(before, after, weights), 0.0))

    zero, _, sharp = lab.take(SAM(0.0))
    _, _, plain = lab.take(plain=True)
    rows.append(Row("rho 0 is the plain step, bit for bit", distance(plain, sharp, weights), 0.0))
    rows.append(Row("both passes see one function (loss difference at rho 0)",
                    abs(zero.perturbed_loss - zero.loss), 0.0))  # fmt: skip

    _, _, sharp = lab.take(sam)
    rows.append(Row("norm statistics count one clean pass", distance(plain, sharp, buffers), 0.0))

    large = SAM(max(sam.rho, 0.5))
    free, *_ = lab.take(large)
    with torch.autocast(lab.engine.device.type, torch.bfloat16):
        within, *_ = lab.take(large)
    share = (within.perturbed_loss - within.loss) / (free.perturbed_loss - free.loss)
    rows.append(
        Row("an outer autocast block hides nothing (share of loss rise)", share, 0.5, above=True)
    )

    bad = [
        (x * float("nan") if accelerator.is_last_process else x, y)
        for x, y in lab.batches[lab.rank]
    ]
    skipped, before, after = lab.take(micro_batches=bad)
    moved = distance(before, after) if skipped.skipped else float("inf")
    rows.append(Row("a NaN on one rank: all skip, nothing changes", moved, 0.0))
    return rows


def _spread(result, weights: dict[str, Tensor], accelerator: Accelerator) -> float:
    """0 if every rank has the same result, and the same weights where it has any."""
    mine = asdict(result), {n: w.double().sum().item() for n, w in weights.items()}
    everyone = gather_object([mine])
    sums = [w for _, w in everyone if w]
    same = all(r == everyone[0][0] for r, _ in everyone) and all(w == sums[0] for w in sums)
    return 0.0 if same else 1.0
