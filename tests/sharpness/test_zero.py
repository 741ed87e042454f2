"""DeepSpeed ZeRO-1, 2 and 3 against the plain reference of test_step, one process, and DDP.

Starting ranks costs seconds: all checks on as many ranks run in one start, each a function here
that gives what each rank saw. The settings that DeepSpeed has for large networks are made small,
so that parameters are cut, padded, partitioned in groups, and reduced in several buckets.
"""

import copy
import functools
import io
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ASAM, CSAM, SAM, LookSAM, ReplicatedEngine, SharpnessAwareStep
from tests.ranks import on_ranks
from tests.sharpness.test_step import (
    CLASSES,
    CLOSE,
    LeavesOutABlock,
    largest_difference,
    make_batch,
    make_optimizer,
    reference_gradient,
)

ROOT = Path(__file__).resolve().parents[2]
STAGES = (1, 2, 3)
STEPS = 5
RHO = 0.002  # in bf16: a tenth of the spacing of the numbers that most weights are
RULES = {
    "none": None,
    "sam": SAM(0.1),
    "csam": CSAM(0.1, gamma=1.0),
    "asam": ASAM(0.5),
    "looksam": LookSAM(0.1, every=2),
}


def make_network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    """That of test_step with larger weights: it is sure of some samples, where CSAM is not SAM."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.GELU()]
    network = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(16, CLASSES))
    with torch.no_grad():
        network[4].weight.mul_(20)
    return network


def start(stage, network=None, precision=torch.float32, optimizer=make_optimizer, **options):
    from flatcal_dist.sharpness import zero, zero_start

    @functools.wraps(zero_start.configuration)
    def small(*arguments):
        configuration = CONFIGURATION(*arguments)
        configuration["zero_optimization"] |= {
            "reduce_bucket_size": 90,  # one weight has 96
            "stage3_param_persistence_threshold": 10,
            "sub_group_size": 60,
        }
        return configuration

    os.environ.setdefault("LOCAL_RANK", "0")
    CONFIGURATION = vars(zero_start).setdefault("_original", zero_start.configuration)
    zero_start.configuration = small
    network = make_network() if network is None else network
    built = optimizer(network)
    return zero.ZeroEngine(zero.start_zero(network, built, stage, precision, **options))


def plain_sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([w for w in network.parameters() if w.requires_grad], lr=0.1)


def my_part(rank, world_size, number, micro_batches=1):
    inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(number))
    parts = inputs.tensor_split(micro_batches), target.tensor_split(micro_batches)
    return list(zip(*parts, strict=True))


def train(step, rank, world_size, micro_batches=1, numbers=range(STEPS), measure=False):
    return [
        step(my_part(rank, world_size, number, micro_batches), measure=measure)
        for number in numbers
    ]


def used(engine) -> dict[str, torch.Tensor]:
    """All weights that the forward pass uses, and buffers, as they are on this rank."""
    import deepspeed

    weights = {}
    for name, weight in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([weight], enabled=engine.stage == 3):
            weights[name] = weight.detach().clone()
    return weights | {name: b.clone() for name, b in engine.module.named_buffers()}


def bits(tensors: dict) -> bytes:
    return b"".join(t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors.values())


def far(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return largest_difference([a[n].float() for n in a], [b[n].float() for n in a])


def one_process(rule, network=None, optimizer=make_optimizer, steps=STEPS, **options) -> dict:
    """Weights of the engine that has all weights and all samples."""
    network = make_network() if network is None else network
    step = SharpnessAwareStep(ReplicatedEngine(network, optimizer(network)), rule, **options)
    for number in range(steps):
        step([make_batch(number)])
    return {n: w.detach() for n, w in network.state_dict().items()}


def literal(rule, parts: int = 1) -> dict:
    """As the papers have it, without any class of ours; `parts` perturb by themselves."""
    network = make_network()
    optimizer = make_optimizer(network)
    for number in range(STEPS):
        pieces = zip(*(t.chunk(parts) for t in make_batch(number)), strict=True)
        gradients = [reference_gradient(network, x, y, rule) for x, y in pieces]
        for w, *gs in zip(network.parameters(), *gradients, strict=True):
            w.grad = sum(gs) / parts
        optimizer.step()
    return {n: w.detach() for n, w in network.named_parameters()}


def run_checks(rank, world_size, checks):
    return {check.__name__: check(rank, world_size) for check in checks}


# What each rank does


def trained(rank, world_size, cases=None, stages=STAGES):
    outcome = {}
    for stage in stages:
        for rule, micro_batches in cases or (("none", 4), ("sam", 5), ("csam", 1), ("asam", 4)):
            engine = start(stage)
            step = SharpnessAwareStep(engine, RULES[rule])
            results, seen = [], []
            for number in range(STEPS):
                results += train(step, rank, world_size, micro_batches, [number])
                seen.append(bits(used(engine)))
            outcome[stage, rule, micro_batches] = engine.full_weights(), results, seen
    return outcome


def trained_look_sam(rank, world_size):
    return trained(rank, world_size, [("looksam", 4)])


def trained_everything(rank, world_size):
    return trained(rank, world_size, [(r, m) for r in RULES for m in (1, 4, 5)])


def trained_on_four(rank, world_size):
    return trained(rank, world_size, [("csam", 2)])


def own_gradients(rank, world_size, cases=None):
    """Smaller scopes, and that of a micro-batch: ours and DDP's."""
    outcome = {}
    for stage, scope, each in cases or (
        (1, "rank", False),
        (2, "rank", False),
        (1, "global", True),
    ):
        runs = []
        for ours in (True, False):
            network = make_network()
            if ours:
                engine = start(stage, network)
            else:
                wrapped = DistributedDataParallel(network)
                engine = ReplicatedEngine(wrapped, make_optimizer(network))
            step = SharpnessAwareStep(engine, RULES["csam"], scope=scope, per_micro_batch=each)
            seen = []
            for number in range(STEPS):
                results = train(step, rank, world_size, 3, [number], measure=True)
                if ours:
                    seen.append(bits(used(engine)))
            runs.append((engine.full_weights(), results, seen))
        outcome[stage, scope, each] = runs
    return outcome


def own_gradients_on_four(rank, world_size):
    return own_gradients(rank, world_size, ((1, 2, False), (2, 2, False)))


def rho_zero(rank, world_size):
    """Weights, batch-norm statistics, random stream: of a plain step, and of a rho of nothing."""
    outcome = {}
    for stage in STAGES:
        for precision in (torch.float32, torch.bfloat16)[: 2 if stage == 1 else 1]:
            ends = []
            for rule in (None, SAM(0.0)):
                engine = start(stage, make_network(0.5, True), precision)
                torch.manual_seed(1 + rank)
                train(SharpnessAwareStep(engine, rule), rank, world_size, 2, range(3))
                ends.append((bits(used(engine)), bits(engine.full_weights()), torch.rand(3)))
            outcome[stage, precision] = ends
    return outcome


def plain_step(rank, world_size):
    """A step without a rule is what DeepSpeed does by itself."""
    outcome = {}
    for stage in STAGES:
        ours, theirs = start(stage), start(stage).zero
        train(SharpnessAwareStep(ours, None), rank, world_size)
        for number in range(STEPS):
            [(inputs, target)] = my_part(rank, world_size, number)
            theirs.backward(nn.functional.cross_entropy(theirs(inputs), target))
            theirs.step()
        outcome[stage] = far(used(ours), used(type(ours)(theirs)))
    return outcome


def norm_and_dropout(rank, world_size):
    """Against DDP on the same ranks, which have statistics and masks of their own."""
    ends = {}
    for stage in (0, *STAGES):
        network = make_network(0.5, True)
        if stage == 0:
            wrapped = DistributedDataParallel(network, broadcast_buffers=False)
            engine = ReplicatedEngine(wrapped, make_optimizer(network))
        else:
            engine = start(stage, network)
        torch.manual_seed(1 + rank)
        train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size, 2)
        own = {n: b.clone() for n, b in network.named_buffers()}
        engine.synchronize_buffers()
        ends[stage] = own, {n: b.clone() for n, b in network.named_buffers()}, engine.full_weights()
    return ends


class Frozen(LeavesOutABlock):
    """Also its first layer is not trained."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x):
        return super().forward(self.first(x))


def unused_and_frozen(rank, world_size):
    outcome = {}
    for stage in STAGES:
        engine = start(stage, Frozen(), optimizer=plain_sgd)
        train(SharpnessAwareStep(engine, SAM(0.5)), rank, world_size)
        outcome[stage] = engine.full_weights()
    return outcome


class Awkward(nn.Module):
    """Tied weights, a parameter of one number, a convolution with its channels last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(1, 4, (2, 3)).to(memory_format=torch.channels_last)
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = x.view(-1, 1, 2, 3).to(memory_format=torch.channels_last)
        return self.head(self.b(self.a(self.convolution(x).flatten(1)).tanh()) * self.scale)


def groups_of_awkward(network: nn.Module) -> torch.optim.Optimizer:
    """One of them has a single number, so that other ranks have nothing of it."""
    weights = list(network.parameters())
    few = [w for w in weights if w.dim() == 1 and w is not network.scale]
    many = [w for w in weights if w.dim() > 1]
    groups = [
        {"params": many, "weight_decay": 0.1},
        {"params": few, "lr": 0.01},
        {"params": [network.scale]},
    ]
    return torch.optim.AdamW(groups, lr=0.02)


def awkward(rank, world_size):
    outcome = {}
    for stage, rule in zip(STAGES, ("csam", "asam", "looksam"), strict=True):
        engine = start(stage, Awkward(), optimizer=groups_of_awkward)
        train(SharpnessAwareStep(engine, RULES[rule]), rank, world_size, 2)
        outcome[stage, rule] = engine.full_weights()
    return outcome


class Spoiled(nn.Module):
    """Does something to what a network gives in its `when`th forward pass."""

    def __init__(self, network: nn.Module, when: int, what):
        super().__init__()
        self.network, self.when, self.what, self.calls = network, when, what, 0

    def forward(self, x):
        self.calls += 1
        output = self.network(x)
        return self.what(output) if self.calls == self.when else output


def raise_error(output):
    raise KeyboardInterrupt


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise KeyboardInterrupt


def exceptions(rank, world_size):
    """In pass two, forward and backward: the state before and after, what a good step then does."""
    outcome = {}
    for stage in STAGES:
        for where, what in (("forward", raise_error), ("backward", RaisesInBackward.apply)):
            network = Spoiled(make_network(norm=True), 2, what)
            engine = start(stage, network)
            step = SharpnessAwareStep(engine, SAM(0.5))
            before, full = used(engine), engine.full_weights()
            gathers = []
            publish = engine.layout.publish
            engine.layout.publish = lambda seen=gathers, do=publish: (seen.append(1), do())
            with pytest.raises(KeyboardInterrupt):
                step(my_part(rank, world_size, 0))
            kept = bits(engine.full_weights()) == bits(full)
            silent = len(gathers) == 1  # none on the way out: the others may not be there
            assert engine.inference
            restored = bits(used(engine)) == bits(before)
            later = None
            if where == "forward":
                step(my_part(rank, world_size, 1))
                later = engine.full_weights()
            outcome[stage, where] = kept, silent, restored, later
    good = SharpnessAwareStep(start(1, Spoiled(make_network(norm=True), 0, None)), SAM(0.5))
    good(my_part(rank, world_size, 1))
    return outcome, good.engine.full_weights()


def bad_values(rank, world_size):
    """Not finite on one rank, in the one pass or the other."""
    outcome = {}
    for stage in STAGES:
        for when in (1, 2):
            network = Spoiled(
                make_network(norm=True), when, lambda y: y * math.inf if rank == 1 else y
            )
            engine = start(stage, network)
            step = SharpnessAwareStep(engine, SAM(0.1))
            before, state = used(engine), bits(engine.full_weights())
            skipped = step(my_part(rank, world_size, 0)).skipped
            same = bits(used(engine)) == bits(before) and bits(engine.full_weights()) == state
            touched = any(
                torch.is_tensor(v) and v.any()
                for s in engine.optimizer.state.values()
                for v in s.values()
            )
            results = train(step, rank, world_size, numbers=[1, 2])
            good = not any(r.skipped for r in results)
            outcome[stage, when] = skipped, same, touched, good, bits(engine.full_weights())
    return outcome


def clipped(rank, world_size):
    outcome = {}
    for stage in STAGES:
        engine = start(stage, clip_norm=0.01)
        step = SharpnessAwareStep(engine, SAM(0.1), clip_norm=0.01)
        outcome[stage] = train(step, rank, world_size, numbers=[0])[0], engine.full_weights()
        with pytest.raises(ValueError, match="give start_zero the same clip_norm"):
            train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size, numbers=[0])
    return outcome


def clipped_after_a_correction(rank, world_size):
    """LookSAM changes gradients by hand: what DeepSpeed clips by must have seen it."""
    outcome = {}
    for stage in STAGES:
        for precision in (torch.float32, torch.bfloat16):
            engine = start(stage, wide_network(), precision, clip_norm=0.05)
            step = SharpnessAwareStep(engine, LookSAM(0.1, every=2, alpha=3.0), clip_norm=0.05)
            train(step, rank, world_size)
            outcome[stage, precision] = engine.full_weights()
    return outcome


def wide_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, CLASSES))


def low_precision(rank, world_size):
    """bf16: the move against e, by the weights that are used; then training against fp32."""
    outcome = {}
    for stage in STAGES:
        moves = []
        engine = start(stage, wide_network(), torch.bfloat16)
        spy_on_moves(engine, moves)
        results = train(SharpnessAwareStep(engine, SAM(RHO)), rank, world_size, 2, measure=True)
        moved = torch.stack(moves).sum(0)
        outcome[stage] = moved, results, engine.full_weights(), bits(used(engine))
    return outcome


def spy_on_moves(engine, moves: list) -> None:
    """For each, of this rank's parts: the product of the move, as it is used, and e; e squared."""
    moved = engine.moved

    @contextmanager
    def watched(shards):
        wanted = [e.clone() for e in shards.gradients]
        with moved(shards) as displacement:
            for part, e in zip(engine.layout.parts, wanted, strict=True):
                seen = part.used.float() - part.master.bfloat16().float()
                moves.append(torch.stack([(seen * e).sum(), e.square().sum()]))
            yield displacement

    engine.moved = watched


def low_precision_norm(rank, world_size):
    """bf16 with batch norm; stage 0 is DDP in fp32."""
    outcome = {}
    for stage in (0, *STAGES):
        network = make_network(norm=True)
        if stage == 0:
            wrapped = DistributedDataParallel(network)
            engine = ReplicatedEngine(wrapped, make_optimizer(network))
        else:
            engine = start(stage, network, torch.bfloat16)
        step = SharpnessAwareStep(engine, SAM(0.1))
        results = train(step, rank, world_size, 2, measure=True)
        engine.inference.eval()
        with torch.no_grad():
            logits = engine.inference(make_batch(9)[0])
        outcome[stage] = results, logits, engine.full_weights()
    return outcome


def half_precision(rank, world_size):
    """fp16, which torch runs on CPUs, slowly, where DeepSpeed does not offer it."""
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    outcome = {}
    for stage in STAGES:
        ends = []
        for when in (1, 2):
            what = Spoiled(wide_network(), when, lambda y: y * math.inf if rank == 1 else y)
            engine = start(stage, what, torch.float16)
            engine.scaler.cur_scale = 2.0**10
            before = used(engine)
            step = SharpnessAwareStep(engine, SAM(0.02))
            bad = step(my_part(rank, world_size, 0))
            same = bits(used(engine)) == bits(before)
            results = train(step, rank, world_size, 2, measure=True)
            state = io.BytesIO()
            torch.save(engine.local_state(), state)
            engine.scaler.cur_scale = 1.0
            engine.load_local_state(torch.load(io.BytesIO(state.getvalue()), weights_only=True))
            weights = {n.removeprefix("network."): w for n, w in engine.full_weights().items()}
            ends.append((bad, same, results, engine.loss_scale, weights))
        outcome[stage] = ends
    del deepspeed.get_accelerator().is_fp16_supported
    return outcome


def states(rank, world_size):
    """Nothing perturbed in what is saved, even in pass two; going on from it bit for bit."""
    outcome = {}
    for stage in STAGES:
        for precision, make in (
            (torch.float32, make_optimizer),
            (torch.bfloat16, lambda network: torch.optim.AdamW(network.parameters(), lr=1e-2)),
        ):
            network = make_network(norm=True)
            engine = start(stage, network, precision, make)
            step = SharpnessAwareStep(engine, LookSAM(0.1, every=2))
            train(step, rank, world_size, numbers=[0, 1])
            calm, seen = engine.full_weights(), []
            names = [n for n, _ in network.named_parameters()]
            handle = network.register_forward_hook(
                lambda *_, engine=engine, seen=seen: seen.append(engine.full_weights())
            )
            saved = save(engine, step)
            train(step, rank, world_size, numbers=[2])
            handle.remove()
            during = all(torch.equal(s[n], calm[n]) for s in seen for n in names if s)
            train(step, rank, world_size, numbers=[3])
            first = bits(engine.full_weights()), bits(used(engine))

            torch.manual_seed(7)
            other = make_network(norm=True)
            for weight in other.parameters():
                nn.init.normal_(weight)
            engine = start(stage, other, precision, make)
            step = SharpnessAwareStep(engine, LookSAM(0.1, every=2))
            size = load(saved, engine, step)
            train(step, rank, world_size, numbers=[2, 3])
            second = bits(engine.full_weights()), bits(used(engine))
            outcome[stage, precision] = len(seen), during, first == second, size
    return outcome


def save(engine, step) -> bytes:
    file = io.BytesIO()
    torch.save((engine.local_state(), step.memory, step.taken), file)
    return file.getvalue()


def load(saved, engine, step) -> int:
    """Elements of fp32 in it, without those of the network's buffers."""
    state, step.memory, step.taken = torch.load(io.BytesIO(saved), weights_only=True)
    engine.load_local_state(state)
    optimizer = [t for s in state["optimizer"]["state"].values() for t in s.values()]
    tensors = [t for t in [*state["masters"], *optimizer] if torch.is_tensor(t) and t.dim()]
    return sum(t.numel() for t in tensors)


def other_start(rank, world_size):
    """Ranks that begin with weights of their own get those of rank 0, not rounded."""
    outcome = {}
    for stage in STAGES:
        for precision in (torch.float32, torch.bfloat16):
            network = make_network()
            with torch.no_grad():
                for weight in network.parameters():
                    weight.add_(rank)
            engine = start(stage, network, precision)
            outcome[stage, precision] = bits(used(engine)), engine.full_weights()
    return outcome


def refusals(rank, world_size):
    low = start(1, precision=torch.bfloat16)
    engines = {stage: start(stage) for stage in STAGES}
    for engine, options, reason in (
        (engines[3], {"scope": "rank"}, "ZeRO-3 cannot do scope 'rank'.*or DDP, or ZeRO-1"),
        (engines[3], {"per_micro_batch": True}, "ZeRO-3 cannot do per_micro_batch"),
        (engines[2], {"per_micro_batch": True}, "ZeRO-2 cannot do per_micro_batch.*ZeRO-1"),
        (low, {"scope": 1}, "bfloat16 cannot do scope '1'.*ZeRO-1 in float32"),
    ):
        with pytest.raises(ValueError, match=reason):
            SharpnessAwareStep(engine, SAM(0.1), **options)
    with pytest.raises(ValueError, match="stages 1, 2 and 3, not 0"):
        start(0)

    class WithNumber(nn.Linear):
        def __init__(self):
            super().__init__(6, CLASSES)
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="without a dimension, such as scale"):
        start(1, WithNumber())
    with pytest.raises(ValueError, match="precision must be"):
        start(1, precision=torch.float64)
    import deepspeed

    if not deepspeed.get_accelerator().is_fp16_supported():
        with pytest.raises(RuntimeError, match="does not run float16 on this machine"):
            start(1, precision=torch.float16)
    return True


# What it must be


def check_trained(outcomes):
    for (stage, rule, micro_batches), (weights, results, _) in outcomes[0].items():
        case = f"ZeRO-{stage} {rule} {micro_batches}"
        expected = one_process(RULES[rule])
        assert far(weights, expected) < CLOSE, case
        if rule in ("none", "sam", "csam"):
            assert far(weights, literal(RULES[rule])) < CLOSE, case
        for other in outcomes:
            _, theirs, seen = other[stage, rule, micro_batches]
            assert theirs == results, f"{case}: ranks must report the same"
            assert seen == outcomes[0][stage, rule, micro_batches][2], f"{case}: the same bits"
            assert not other[stage, rule, micro_batches][0] or other is outcomes[0]


def check_own_gradients(outcomes):
    for case, ((weights, results, seen), (expected, theirs, _)) in outcomes[0].items():
        assert far(weights, expected) < CLOSE, case
        for ours, ddp in zip(results, theirs, strict=True):
            for name, value in vars(ddp).items():
                assert math.isclose(getattr(ours, name), value, rel_tol=1e-5, abs_tol=1e-6), case
        assert all(other[case][0][2] == seen for other in outcomes), f"{case}: the same bits"


@pytest.fixture(scope="module")
def two_ranks():
    outcome = {}
    for checks in (
        [
            trained, trained_look_sam, own_gradients, plain_step, norm_and_dropout, clipped,
            unused_and_frozen, awkward, refusals,
        ],
        [
            exceptions, bad_values, other_start, rho_zero, low_precision, low_precision_norm,
            half_precision, clipped_after_a_correction, states,
        ],
    ):  # fmt: skip
        ranks = on_ranks(2, run_checks, checks)
        for check in checks:
            outcome[check.__name__] = [rank[check.__name__] for rank in ranks]
    return outcome


def test_csam_is_not_sam_in_these_tests():
    assert far(literal(RULES["sam"]), literal(RULES["csam"])) > 1000 * CLOSE


def test_two_ranks_equal_the_references_and_one_another(two_ranks):
    check_trained(two_ranks["trained"])
    check_trained(two_ranks["trained_look_sam"])


def test_own_gradients_equal_ddp_and_the_reference(two_ranks):
    check_own_gradients(two_ranks["own_gradients"])
    outcome = two_ranks["own_gradients"][0]
    for stage in (1, 2):
        weights = outcome[stage, "rank", False][0][0]
        assert far(weights, literal(RULES["csam"], parts=2)) < CLOSE
        assert far(weights, literal(RULES["csam"])) > 100 * CLOSE, "the scopes must differ"


def test_rho_zero_is_the_plain_step_bit_for_bit(two_ranks):
    for outcome in two_ranks["rho_zero"]:
        for case, (plain, *others) in outcome.items():
            for other in others:
                assert plain[:2] == other[:2], case
                assert torch.equal(plain[2], other[2]), f"{case}: the random stream afterwards"


def test_a_plain_step_is_deepspeeds_own(two_ranks):
    assert all(distance < CLOSE for distance in two_ranks["plain_step"][0].values())


def test_batch_norm_and_dropout_are_those_of_ddp(two_ranks):
    ranks = two_ranks["norm_and_dropout"]
    for stage in STAGES:
        for ends in ranks:
            own, synchronized, _ = ends[stage]
            assert far(own, ends[0][0]) < CLOSE
            assert torch.equal(own["1.num_batches_tracked"], torch.tensor(2 * STEPS))
            assert all(torch.equal(b, ranks[0][stage][1][n]) for n, b in synchronized.items())
        assert far(ranks[0][stage][2], ranks[0][0][2]) < CLOSE


def test_unused_and_frozen_parameters(two_ranks):
    expected = one_process(SAM(0.5), Frozen(), plain_sgd)
    start = Frozen().state_dict()
    for weights in two_ranks["unused_and_frozen"][0].values():
        assert far(weights, expected) < CLOSE
        assert list(weights) == list(expected)
        for name in ("b.weight", "b.bias", "first.weight", "frozen"):
            assert torch.equal(weights[name], start[name]), name


def test_awkward_networks_and_groups(two_ranks):
    for (stage, rule), weights in two_ranks["awkward"][0].items():
        expected = one_process(RULES[rule], Awkward(), groups_of_awkward)
        assert list(weights) == list(expected)
        assert far(weights, expected) < CLOSE, f"ZeRO-{stage} {rule}"


def test_an_exception_in_the_second_pass_leaves_weights_as_before(two_ranks):
    outcome, good = two_ranks["exceptions"][0]
    for case, (kept, silent, restored, later) in outcome.items():
        assert kept, case
        assert silent, case
        assert restored, case
        if later is not None:
            assert far(later, good) < CLOSE, case


def test_a_non_finite_value_on_one_rank_skips_the_step_on_all(two_ranks):
    for outcome in two_ranks["bad_values"]:
        for case, (skipped, same, touched, good, _) in outcome.items():
            assert skipped, case
            assert same, case
            assert not touched, case
            assert good, case


def test_the_descent_gradient_is_clipped(two_ranks):
    expected = one_process(SAM(0.1), steps=1, clip_norm=0.01)
    free = one_process(SAM(0.1), steps=1)
    for result, weights in two_ranks["clipped"][0].values():
        assert far(weights, expected) < CLOSE
        assert far(weights, free) > 100 * CLOSE
        assert result.gradient_norm > 0.1, "reported before clipping"


def test_what_look_sam_makes_of_the_gradient_is_clipped(two_ranks):
    outcome = two_ranks["clipped_after_a_correction"][0]
    rule = LookSAM(0.1, every=2, alpha=3.0)
    expected = one_process(rule, wide_network(), clip_norm=0.05)
    assert far(one_process(rule, wide_network()), expected) > 1e-2, "it must matter"
    for (stage, precision), weights in outcome.items():
        same = expected if precision == torch.float32 else outcome[3, torch.bfloat16]
        assert far(weights, same) < CLOSE, f"ZeRO-{stage} {precision}"


def test_bf16_weights_are_built_from_the_master_and_the_perturbation(two_ranks):
    """Of e, most of which is below the spacing of bf16, all must be there on average."""
    expected = one_process(SAM(RHO), wide_network())
    for stage in STAGES:
        outcomes = [outcome[stage] for outcome in two_ranks["low_precision"]]
        projected, wanted = sum(outcome[0] for outcome in outcomes)
        assert 0.8 < projected / wanted < 1.2
        _, results, weights, _ = outcomes[0]
        assert all(1 < result.effective_rho / RHO < 10 for result in results), "with the noise"
        assert all(result.cosine > 0.5 for result in results), "the cosine is that of e"
        assert far(weights, expected) < 2e-3
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        assert outcomes[0][3] == outcomes[1][3], "the same bits on all ranks"


def test_bf16_with_batch_norm(two_ranks):
    _, expected_logits, expected = two_ranks["low_precision_norm"][0][0]
    for stage in STAGES:
        results, logits, weights = two_ranks["low_precision_norm"][0][stage]
        assert not any(result.skipped for result in results)
        assert logits.dtype == torch.float32
        assert (logits - expected_logits).abs().max() < 0.05 * expected_logits.abs().max()
        assert weights["1.running_mean"].dtype == torch.float32
        assert weights["1.num_batches_tracked"] == 2 * STEPS
        assert far(weights, expected) < 0.03


def test_fp16_scales_the_loss_and_skips_once(two_ranks):
    expected = one_process(SAM(0.02), wide_network())
    for outcome in two_ranks["half_precision"]:
        for stage, ends in outcome.items():
            for bad, same, results, scale, weights in ends:
                assert bad.skipped, stage
                assert same, stage
                assert bad.loss_scale == 2.0**9, "halved, once"
                assert scale == 2.0**9, "kept in the state"
                assert not any(result.skipped for result in results)
                assert all(0.5 < result.effective_rho / 0.02 < 2 for result in results)
                if weights:
                    assert far(weights, expected) < 3e-3, stage


def test_running_statistics_do_not_stop_short():
    """In bf16 itself, 0.1 of a difference of a percent is rounded away."""
    from flatcal_dist.sharpness.zero_start import RunningStatisticsInFp32

    torch.manual_seed(0)
    ours, exact = nn.BatchNorm1d(3).bfloat16(), nn.BatchNorm1d(3)
    for name, buffer in exact.named_buffers():
        setattr(ours, name, buffer.clone())
    RunningStatisticsInFp32(ours, torch.bfloat16)
    for _ in range(60):
        x = (5 + 0.2 * torch.randn(64, 3)).bfloat16()
        ours(x)
        exact(x.float())
    for name, buffer in exact.named_buffers():
        # A batch's variance itself is rounded to bf16, whose spacing is 0.4 to 0.8 percent.
        assert torch.allclose(getattr(ours, name).float(), buffer.float(), rtol=8e-3), name
        assert getattr(ours, name).dtype == buffer.dtype
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        ours(torch.zeros(3, dtype=torch.bfloat16))
    assert ours.running_mean.dtype == torch.float32
    assert ours.eval()(x).dtype == torch.bfloat16


def test_what_is_saved_is_unperturbed_and_goes_on_bit_for_bit(two_ranks):
    parameters = sum(w.numel() for w in make_network(norm=True).parameters())
    for outcome in two_ranks["states"]:
        for (stage, precision), (passes, during, goes_on, size) in outcome.items():
            case = f"ZeRO-{stage} {precision}"
            assert passes == 2, case
            assert during, case
            assert goes_on, case
            copies = 2 if precision == torch.float32 else 3  # SGD's momentum; AdamW's two
            # A half of each on each of two ranks, and padding: no copy for the perturbation.
            assert size <= copies * (parameters / 2 + 20), case


def test_all_ranks_start_from_the_weights_of_rank_0(two_ranks):
    first, second = two_ranks["other_start"]
    expected = make_network().state_dict()
    for case, (seen, weights) in first.items():
        assert seen == second[case][0], case
        assert far(weights, expected) == 0, case


def test_what_it_cannot_do_is_refused(two_ranks):
    assert two_ranks["refusals"] == [True, True]


@pytest.mark.exhaustive
def test_every_rule_and_accumulation_on_two_ranks():
    check_trained(on_ranks(2, trained_everything))


@pytest.mark.exhaustive
def test_four_ranks():
    check_trained(on_ranks(4, trained_on_four))


@pytest.mark.exhaustive
def test_groups_of_two_of_four_ranks():
    check_own_gradients(on_ranks(4, own_gradients_on_four))


SCRIPT = """
import os, torch, torch.distributed as dist
from flatcal_dist.sharpness import SAM, SharpnessAwareStep
from flatcal_dist.sharpness.zero import ZeroEngine, start_zero
assert os.environ["ACCELERATE_USE_DEEPSPEED"] == "true"
dist.init_process_group("gloo")
network = torch.nn.Linear(4, 3)
stage = int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"])
engine = ZeroEngine(start_zero(network, torch.optim.SGD(network.parameters(), lr=0.1), stage))
result = SharpnessAwareStep(engine, SAM(0.1))([(torch.ones(2, 4), torch.tensor([0, 1]))])
print(f"rank {dist.get_rank()} of {engine.world_size} stage {engine.stage} {result.skipped}")
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", STAGES)
def test_accelerate_starts_two_processes_on_cpus(stage, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    config = ROOT / f"configs/accelerate/cpu_zero{stage}.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in (0, 1):
        assert f"rank {rank} of 2 stage {stage} False" in done.stdout


@pytest.mark.exhaustive
def test_alone_and_in_fp32_it_is_the_replicated_engine():
    """One process, no launcher."""
    words = [sys.executable, "-m", __name__]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "alone: right" in done.stdout, done.stdout + done.stderr


if __name__ == "__main__":
    for stage in STAGES:
        engine = start(stage)
        train(SharpnessAwareStep(engine, RULES["csam"]), 0, 1)
        assert far(engine.full_weights(), one_process(RULES["csam"])) < CLOSE
        assert copy.deepcopy(engine.local_state())
    print("alone: right")
