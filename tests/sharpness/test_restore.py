"""Weights come back bit for bit; nothing of a perturbation outlives the step, however it ends."""

import hashlib
import math
import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from flatcal_dist.sharpness import (
    CSAM,
    GSAM,
    LESAM,
    SAM,
    SSAM,
    WSAM,
    FriendlySAM,
    LookSAM,
    MomentumSAM,
    SharpnessAwareStep,
    StaleSAM,
)
from flatcal_dist.sharpness.engines.fsdp2.engine import ShardedEngine
from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine
from flatcal_dist.training.stopping import StopRequest
from tests.support.engines import UNLIKE, everywhere, make_engine, saved, settled, used
from tests.support.ranks import on_ranks
from tests.support.reference import STEPS, bits, make_network, make_optimizer, my_part, train

# Without a perturbation


def zero_perturbations(rank, world_size, kind):
    """Ends of plain steps and of a rho of nothing; of SAM, and CSAM with gamma 0."""
    outcome = []
    precisions = [torch.float32, torch.bfloat16] if kind in ("zero1", "fsdp2") else [torch.float32]
    for precision in precisions:
        ends = []
        nothing = (SAM(0.0), LookSAM(0.0, every=2), GSAM(0.0), MomentumSAM(0.0))
        if precision == torch.float32:
            nothing += (WSAM(0.0), WSAM(0.0, decouple=False), FriendlySAM(0.0), SSAM(0.0))
            nothing += (LESAM(0.0), StaleSAM(0.0), SAM(0.0, select="norms"), WSAM(0.1, gamma=0.0))
        for rule in (None, *nothing, SAM(0.1), CSAM(0.1, 1, 0.0)):
            engine = make_engine(kind, make_network(0.3, norm=True), precision)
            torch.manual_seed(1 + rank)
            results = train(SharpnessAwareStep(engine, rule), rank, world_size, 2, range(3))
            ends.append((bits(used(engine)), saved(engine), bits({"": torch.rand(3)})))
            assert not any(result.skipped for result in results)
        outcome.append(ends)
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_rho_zero_is_the_plain_step_and_gamma_zero_is_sam_bit_for_bit(kind):
    """Weights, batch-norm statistics, optimizer state, and the random stream afterwards."""
    for outcome in everywhere(kind, zero_perturbations):
        for plain, *zeros, sam, gamma_zero in outcome:
            assert all(zero == plain for zero in zeros)
            assert sam == gamma_zero
            assert sam[2] == plain[2], "the random stream does not depend on the rule"
            assert sam[:2] != plain[:2]


def plain_loop(rank, world_size, kind):
    """The engine's own plain step, by a loop without our step, and our step without a rule."""
    ours, theirs = make_engine(kind), make_engine(kind)
    step = SharpnessAwareStep(ours, None)
    for number in range(STEPS):
        pairs = my_part(rank, world_size, number)
        step(pairs)
        [(inputs, target)] = pairs
        share = world_size / 24  # of the mean over ranks that engines make of gradients
        loss = F.cross_entropy(theirs.model(inputs), target, reduction="none").sum() * share
        if isinstance(theirs, ZeroEngine):
            theirs.zero.backward(loss)
            theirs.zero.step()
        else:
            loss.backward()
            theirs.optimizer.step()
            theirs.optimizer.zero_grad()
    return bits(used(ours)) == bits(used(theirs))


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_step_without_a_rule_is_the_engine_s_own_bit_for_bit(kind):
    assert all(everywhere(kind, plain_loop))


# With one


def length_of_the_move(engine, before) -> float:
    """By what a forward pass uses, over all ranks."""
    if isinstance(engine, ShardedEngine):
        moves = [engine.weights[n].to_local() - before[n] for n in engine.weights]
    elif isinstance(engine, ZeroEngine):
        moves = [part.used - before[part.name, part.start] for part in engine.layout.parts]
    else:
        moves = [w - before[n] for n, w in engine.module.named_parameters()]
    square = sum((m.double() ** 2).sum() for m in moves)
    if isinstance(engine, ShardedEngine | ZeroEngine):
        dist.all_reduce(square)
    return float(square.sqrt())


def local_weights(engine) -> dict:
    if isinstance(engine, ShardedEngine):
        return {n: w.to_local().detach().clone() for n, w in engine.weights.items()}
    if isinstance(engine, ZeroEngine):
        return {(p.name, p.start): p.used.detach().clone() for p in engine.layout.parts}
    return {n: w.detach().clone() for n, w in engine.module.named_parameters()}


def no_rate(rank, world_size, kind):
    """A step of rate zero: how far each pass was from the start, and whether all came back."""
    network = make_network()
    engine = make_engine(kind, network, optimizer=lambda n: torch.optim.SGD(n.parameters(), lr=0.0))
    start, state, local = used(engine), saved(engine), local_weights(engine)
    lengths = []
    network.register_forward_pre_hook(lambda *_: lengths.append(length_of_the_move(engine, local)))
    [result] = train(SharpnessAwareStep(engine, SAM(0.3)), rank, world_size, 1, [0], measure=True)
    return lengths, result.effective_rho, bits(start) == bits(used(engine)), state == saved(engine)


@pytest.mark.parametrize("kind", UNLIKE)
def test_the_perturbation_has_length_rho_and_leaves_no_trace(kind):
    for lengths, reported, same_used, same_saved in everywhere(kind, no_rate):
        # Differences of float32 weights of order 1, 197 of them: an absolute error below 1e-6.
        assert lengths == [0, pytest.approx(0.3, rel=1e-5)]
        assert reported == pytest.approx(0.3, rel=1e-5)
        assert same_used
        assert same_saved


# Errors, signals, and values that are not finite


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
    raise RuntimeError("of the user's network")


def send_sigterm(output):
    os.kill(os.getpid(), signal.SIGTERM)
    return output


class RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        raise KeyboardInterrupt


WAYS_TO_END = {  # of two micro-batches a pass
    "first pass": (2, raise_error, RuntimeError),
    "second pass": (3, raise_error, RuntimeError),
    "amid the second pass": (4, raise_error, RuntimeError),
    "SIGTERM outside the loop": (3, send_sigterm, KeyboardInterrupt),
    "second backward pass": (3, RaisesInBackward.apply, KeyboardInterrupt),
}


def ended(rank, world_size, kind):
    """State before and after a step that does not end; then what a good step does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the recipes have it
    outcome = {}
    for way, (when, what, error) in WAYS_TO_END.items():
        engine = make_engine(kind, Spoiled(make_network(norm=True), when, what))
        step = SharpnessAwareStep(engine, SAM(0.5))
        before, state = bits(used(engine)), saved(engine)
        with pytest.raises(error):
            train(step, rank, world_size, 2, [0])
        same_saved = saved(engine) == state
        same_used = bits(settled(engine)) == before
        later = None
        # A backward pass that was cut off leaves DDP and DeepSpeed waiting for its rest.
        if way != "second backward pass" or kind in ("one", "fsdp2"):
            train(step, rank, world_size, 2, [1])
            later = bits(used(engine))
        outcome[way] = same_saved, same_used, later
    good = make_engine(kind, Spoiled(make_network(norm=True), 0, None))
    train(SharpnessAwareStep(good, SAM(0.5)), rank, world_size, 2, [1])
    return outcome, bits(used(good))


@pytest.mark.parametrize("kind", UNLIKE)
def test_an_error_or_signal_between_the_passes_leaves_all_as_before(kind):
    """In what is used, in what would be saved; and the next step is as if nothing had been."""
    for outcome, good in everywhere(kind, ended):
        for way, (same_saved, same_used, later) in outcome.items():
            assert same_saved, way
            assert same_used, way
            assert later in (None, good), way


def asked_to_stop(rank, world_size, kind):
    """SIGTERM on one rank between the passes, while the loop listens."""
    ends = []
    for when in (0, 2):
        what = send_sigterm if rank == world_size - 1 else lambda y: y
        engine = make_engine(kind, Spoiled(make_network(norm=True), when, what))
        step = SharpnessAwareStep(engine, SAM(0.5))
        stops = []
        with StopRequest() as request:
            for number in range(2):
                stops.append(step(my_part(rank, world_size, number), stop=request.asked).stop)
        ends.append((stops, bits(used(engine)), saved(engine)))
    return ends


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_signal_in_a_step_lets_it_end_and_is_seen_by_every_rank(kind):
    for quiet, signalled in everywhere(kind, asked_to_stop):
        assert quiet[0] == [False, False]
        assert signalled[0] == [False, True], "at the end of the next step, on all ranks"
        assert quiet[1:] == signalled[1:]


def not_finite(rank, world_size, kind):
    """On the last rank, in the one pass or the other."""
    outcome = []
    scopes = ("global", "rank") if kind in ("ddp", "zero1") else ("global",)
    for scope in scopes:
        clean = make_engine(kind, Spoiled(make_network(0.3, norm=True), 0, None))
        torch.manual_seed(1 + rank)
        train(SharpnessAwareStep(clean, SAM(0.1), scope=scope), rank, world_size, 1, [1, 2])
        for when in (1, 2):
            what = (lambda y: y * math.inf) if rank == world_size - 1 else (lambda y: y)
            engine = make_engine(kind, Spoiled(make_network(0.3, norm=True), when, what))
            before, state = bits(used(engine)), saved(engine)
            step = SharpnessAwareStep(engine, SAM(0.1), scope=scope)
            skipped = train(step, rank, world_size, 1, [0])[0].skipped
            same = bits(used(engine)) == before and saved(engine) == state
            torch.manual_seed(1 + rank)
            train(step, rank, world_size, 1, [1, 2])
            outcome.append((skipped, same, bits(used(engine)) == bits(used(clean))))
    return outcome


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_non_finite_value_on_one_rank_skips_the_step_on_all(kind):
    """Nothing moves, optimizer and buffers included; good steps go on as if it had not been."""
    for outcome in everywhere(kind, not_finite):
        assert outcome == [(True, True, True)] * len(outcome)


# Averages and evaluation between steps


def averages(rank, world_size, kind):
    """An average of the weights, updated in a `finally`, and evaluation, between the steps."""
    watched, quiet = (make_engine(kind, make_network(norm=True)) for _ in range(2))
    step, expected = SharpnessAwareStep(watched, SAM(0.5)), []
    plain, last = make_network(norm=True), make_network(norm=True)
    average = AveragedModel(plain, use_buffers=True)
    for number in range(STEPS):
        try:
            train(step, rank, world_size, 1, [number])
        finally:
            weights = watched.full_weights()
            if rank == 0:
                plain.load_state_dict(weights)
                average.update_parameters(plain)
        watched.inference.eval()
        with torch.no_grad():
            output = watched.inference(my_part(0, 1, 9)[0][0])
        watched.inference.train()
        train(SharpnessAwareStep(quiet, SAM(0.5)), rank, world_size, 1, [number])
        last.load_state_dict(used(quiet))
        expected.append(used(quiet))
        right = torch.allclose(output, last.eval()(my_part(0, 1, 9)[0][0]), atol=1e-5)
    names = [n for n, _ in plain.named_parameters()]
    means = {n: torch.stack([e[n].double() for e in expected]).mean(0) for n in names}
    off = [float((average.module.state_dict()[n] - means[n]).abs().max()) for n in names]
    return bits(used(watched)) == bits(used(quiet)), right, max(off) if rank == 0 else 0.0


@pytest.mark.parametrize("kind", UNLIKE)
def test_averages_and_evaluations_see_the_weights_and_change_nothing(kind):
    for same, right, off in everywhere(kind, averages):
        assert same
        assert right
        assert off < 1e-6, "a perturbed copy among five would be 1e-3 off"


# Many steps


def many_steps(rank, world_size, kind, steps):
    """Every rank perturbs by its own gradient; every 50th step is skipped."""
    engine = make_engine(kind, optimizer=lambda network: make_optimizer(network, 0.02))
    step = SharpnessAwareStep(engine, SAM(0.05), scope="rank")
    digest, skipped = hashlib.sha256(), 0
    for number in range(steps):
        [(inputs, target)] = my_part(rank, world_size, number % 40)
        if number % 50 == 49 and rank == 1:
            inputs = inputs * math.nan
        skipped += step([(inputs, target)], samples=24).skipped
        digest.update(bits(used(engine)))
    return digest.hexdigest(), skipped


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("ddp", 300),
        pytest.param("ddp", 1000, marks=pytest.mark.exhaustive),
        ("zero1", 100),
        pytest.param("zero1", 1000, marks=pytest.mark.exhaustive),
        pytest.param("zero2", 1000, marks=pytest.mark.exhaustive),
    ],
)
def test_ranks_stay_bit_identical_over_many_steps_of_their_own(kind, steps):
    outcomes = on_ranks(2, many_steps, kind, steps)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == steps // 50
