"""The invariants of a step, measured on the engine, precision and hardware at hand."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flatcal_dist.config import Config
from flatcal_dist.sharpness import CSAM, SAM, WSAM, StepResult
from flatcal_dist.verification.laboratory import Laboratory, Weights
from flatcal_dist.verification.reference import reference_steps


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `measured` must be at most `bound`; where `above` is true, it must be at least `bound`.
    """

    invariant: str
    measured: float
    bound: float
    above: bool = False

    @property
    def holds(self) -> bool:
        """Whether the invariant holds."""
        return self.measured >= self.bound if self.above else self.measured <= self.bound


def verify(config: Config, accelerator: Accelerator) -> list[Row]:
    """Measure every invariant. Called by all ranks; only the rows of rank 0 are to be judged."""
    lab = Laboratory(config, accelerator)
    return [row for check in CHECKS for row in check(lab)]


def _reference(lab: Laboratory) -> Iterator[Row]:
    result, before, after = lab.take(measure=True)
    if result.skipped:
        nothing = {n: w for n, w in after.items() if w.is_floating_point()}
        after = after | {name: torch.full_like(w, float("nan")) for name, w in nothing.items()}
    expected = reference_steps(lab, 1) if lab.rank == 0 else {}
    yield _compared(lab, "equals one process (weights after a step)", before, after, expected)
    held = {n: after[n] for n in lab.trained if n in after}
    reported = asdict(result) | {"outputs": None}  # outputs belong to the samples of a rank
    yield Row("all ranks report and hold the same", _spread(reported, held), 0.0)
    if isinstance(lab.step.rule, CSAM):
        share = lab.sure / lab.samples
        yield Row("share of samples above p = 1/2, where CSAM is not SAM", share, 0.1, above=True)


def _next_step(lab: Laboratory) -> Iterator[Row]:
    """Measure the second step of rules that perturb in some steps only, or remember something.

    The second step of a decoupled rule shows that the optimizer's momentum holds no sharpness.
    """
    rule = lab.step.rule
    if rule is None:
        return
    if rule.perturbs_at(1) and rule.ascent_share and not (rule.remembers or rule.decoupled):
        return
    _, before, after = lab.take(steps=2)
    expected = reference_steps(lab, 2) if lab.rank == 0 else {}
    yield _compared(
        lab, "the step after it, with what the rule remembers, too", before, after, expected
    )


def _compared(
    lab: Laboratory, invariant: str, before: Weights, after: Weights, expected: Weights
) -> Row:
    """Compare weights with the reference, to rounding in fp32.

    In lower precision, where rounding decides more, the bound is a tenth of the step. WSAM
    multiplies the difference of two gradients, and with it the rounding of both.
    """
    rule = lab.step.rule
    times = max(1.0, rule.weight) if isinstance(rule, WSAM) else 1.0
    largest = max((float(w.abs().max()) for w in expected.values()), default=0.0)
    bound = 0.1 * _distance(after, before, lab.trained) if lab.low else 1e-6 * largest * times
    return Row(invariant, _distance(after, expected, lab.trained), bound)


def _length(lab: Laboratory) -> Iterator[Row]:
    result, *_ = lab.take(lab.sam, measure=True)
    off = abs(_measured(result.perturbation_norm) / lab.sam.rho - 1)
    yield Row("length of the perturbation is rho (relative)", off, 1e-3)
    if lab.low:
        share = _measured(result.seen_along) / lab.sam.rho
        yield Row("share of rho along e that survives rounding", share, 0.5, above=True)
        cosine = _measured(result.seen_cosine)
        yield Row("cosine between e and what is seen of it after rounding", cosine, 0.4, above=True)


def _restored(lab: Laboratory) -> Iterator[Row]:
    _, before, after = lab.take(rate=0.0)
    yield Row("weights come back bit for bit", _distance(before, after, lab.trained), 0.0)


def _error(lab: Laboratory) -> Iterator[Row]:
    """Raise an exception in the second pass on all ranks, then take a step as if nothing was."""
    _, before, clean = lab.take(lab.sam)

    def fail(logits: Tensor, target: Tensor) -> Tensor:
        raise InterruptedError

    try:
        lab.take(lab.sam, descent_loss=fail)
    except InterruptedError:
        left = _distance(before, lab.weights())
    _, _, after = lab.take(lab.sam)
    off = left + _distance(after, clean)
    yield Row("an error between the passes: weights come back, the next step is right", off, 0.0)


def _nothing_at_rho_zero(lab: Laboratory) -> Iterator[Row]:
    zero, _, sharp = lab.take(SAM(0.0))
    sharp_next = torch.rand(8)
    _, _, plain = lab.take(plain=True)
    plain_next = torch.rand(8)
    off = _distance(plain, sharp, lab.trained)
    yield Row("rho 0 is the plain step, bit for bit", off, 0.0)
    off = abs(_rise(zero))
    yield Row("both passes see one function (loss difference at rho 0)", off, 0.0)
    off = float((sharp_next - plain_next).abs().max())
    yield Row("the random stream goes on as after a plain step", off, 0.0)
    _, _, sharp = lab.take(lab.sam)
    off = _distance(plain, sharp, lab.buffers)
    yield Row("norm statistics count one clean pass", off, 0.0)


def _autocast(lab: Laboratory) -> Iterator[Row]:
    large = SAM(max(lab.sam.rho, 0.5))
    free, *_ = lab.take(large)
    with torch.autocast(lab.engine.device.type, torch.bfloat16):
        within, *_ = lab.take(large)
    share = _rise(within) / _rise(free)
    yield Row("an outer autocast block hides nothing (share of loss rise)", share, 0.5, above=True)


def _skipped(lab: Laboratory) -> Iterator[Row]:
    last = lab.rank == lab.world_size - 1
    bad = [(x * float("nan") if last else x, y) for x, y in lab.batches[lab.rank]]
    result, before, after = lab.take(micro_batches=bad)
    moved = _distance(before, after) if result.skipped else float("inf")
    yield Row("a NaN on one rank: all skip, nothing changes", moved, 0.0)


CHECKS: tuple[Callable[[Laboratory], Iterator[Row]], ...] = (
    _reference, _next_step, _length, _restored, _error, _nothing_at_rho_zero, _autocast, _skipped
)  # fmt: skip


def _distance(a: Weights, b: Weights, names: Sequence[str] | None = None) -> float:
    """Return the largest difference of two sets of tensors, and 0 on a rank that has none."""
    if not a or not b:
        return 0.0
    # Not Python's max, which may pass over a NaN.
    return float(
        torch.stack([(a[n].double() - b[n].double()).abs().max() for n in names or a]).max()
    )


def _measured(value: float | None) -> float:
    """Return a field of StepResult that a step with a perturbation fills in."""
    assert value is not None, "the step did not perturb"
    return value


def _rise(result: StepResult) -> float:
    """Return how much the perturbation raises the loss."""
    return _measured(result.perturbed_loss) - result.loss


def _spread(result: dict, weights: Weights) -> float:
    """Return 0 if all ranks have the same result, and the same bits of weights, else 1.

    A rank without weights is left out of the second comparison.
    """
    parts = [w.contiguous().flatten().view(torch.uint8) for w in weights.values()]
    bits = b"".join(part.numpy().tobytes() for part in parts)
    everyone = gather_object([(result, hashlib.sha256(bits).hexdigest() if weights else None)])
    held = {digest for _, digest in everyone if digest}
    same = all(r == result for r, _ in everyone) and len(held) == 1
    return 0.0 if same else 1.0
