"""The rules against few-line references, and what holds over several steps."""

import copy
import gc
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ASAM, CSAM, SAM, LookSAM, ReplicatedEngine, SharpnessAwareStep
from tests.ranks import on_ranks
from tests.sharpness.test_step import (
    CLOSE,
    bit_equal,
    largest_difference,
    make_batch,
    make_network,
    make_optimizer,
    one_step,
)


def gradient(network: nn.Module, number: int) -> list[torch.Tensor]:
    inputs, target = make_batch(number)
    loss = F.cross_entropy(network(inputs), target)
    return list(torch.autograd.grad(loss, list(network.parameters())))


def norm(tensors) -> float:
    return math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors))


def at(network: nn.Module, e: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    """The gradient at w + e, with the network left at w."""
    moved = copy.deepcopy(network)
    with torch.no_grad():
        for w, d in zip(moved.parameters(), e, strict=True):
            w += d
    return gradient(moved, number)


def asam_reference(network, number, rho, eta):
    g = gradient(network, number)
    t = [
        w.detach().abs() + eta if name.endswith("weight") else torch.ones_like(w)
        for name, w in network.named_parameters()
    ]
    length = norm([a * b for a, b in zip(t, g, strict=True)])
    return at(network, [rho * a * a * b / length for a, b in zip(t, g, strict=True)], number)


def test_asam_is_its_formula():
    ours, theirs = make_network(norm=True).eval(), make_network(norm=True).eval()
    optimizer = make_optimizer(theirs)
    for number in range(5):
        one = asam_reference(theirs, number, 0.5, 0.01)
        for w, g in zip(theirs.parameters(), one, strict=True):
            w.grad = g
        optimizer.step()
    engine = ReplicatedEngine(ours, make_optimizer(ours))
    step = SharpnessAwareStep(engine, ASAM(0.5, eta=0.01))
    for number in range(5):
        step([make_batch(number)])
    assert largest_difference(list(ours.parameters()), list(theirs.parameters())) < CLOSE


def test_asam_does_not_see_the_scale_of_a_layer():
    """Two layers scaled by 4 and 1/4 compute the same function, and e moves it alike (eta 0)."""
    plain = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled[0].weight.mul_(4)
        scaled[2].weight.mul_(0.25)
    outputs = []
    for network in (plain, scaled):
        seen = []
        network.register_forward_hook(lambda m, a, output, seen=seen: seen.append(output.detach()))
        one_step(ASAM(0.5, eta=0.0), network, make_batch(0))
        outputs.append(seen[1])
    assert torch.allclose(*outputs, atol=1e-5)


def test_looksam_is_its_formula():
    every, alpha, rho, lr = 3, 0.7, 0.1, 0.1
    ours, theirs = make_network(), make_network()
    step = SharpnessAwareStep(
        ReplicatedEngine(ours, torch.optim.SGD(ours.parameters(), lr=lr)),
        LookSAM(rho, every=every, alpha=alpha),
    )
    passes = []
    ours.register_forward_hook(lambda *_: passes.append(1))
    for number in range(7):
        g = gradient(theirs, number)
        if number % every == 0:
            used = at(theirs, [rho * x / norm(g) for x in g], number)
            product = sum(float((a * b).sum()) for a, b in zip(used, g, strict=True))
            kept = [a - product / norm(g) ** 2 * b for a, b in zip(used, g, strict=True)]
        else:
            ratio = alpha * norm(g) / norm(kept)
            used = [a + ratio * b for a, b in zip(g, kept, strict=True)]
        with torch.no_grad():
            for w, u in zip(theirs.parameters(), used, strict=True):
                w -= lr * u
        step([make_batch(number)])
    assert largest_difference(list(ours.parameters()), list(theirs.parameters())) < 5 * CLOSE
    assert len(passes) == 7 + 3, "three sharp steps of seven have a second pass"


def test_periodic_sam_is_sam_and_plain_in_turn():
    ours, theirs = make_network(), make_network()
    step = SharpnessAwareStep(ReplicatedEngine(ours, make_optimizer(ours)), SAM(0.1, every=3))
    engine = ReplicatedEngine(theirs, make_optimizer(theirs))
    sharp, plain = SharpnessAwareStep(engine, SAM(0.1)), SharpnessAwareStep(engine, None)
    perturbed = []
    for number in range(7):
        perturbed.append(step([make_batch(number)]).perturbed_loss is not None)
        (plain if number % 3 else sharp)([make_batch(number)])
    assert perturbed == [True, False, False, True, False, False, True]
    assert bit_equal(ours, theirs)


def test_rho_may_change_between_steps():
    ours, theirs = make_network(), make_network()
    step = SharpnessAwareStep(ReplicatedEngine(ours, make_optimizer(ours)), SAM(0.1))
    step.rho = 0.3
    step([make_batch(0)])
    one_step(SAM(0.3), theirs, make_batch(0))
    assert bit_equal(ours, theirs)


def test_sharpness_is_of_one_objective_also_for_csam():
    """perturbed_loss is cross-entropy at w + e, though CSAM descends its own loss there."""
    results = [one_step(rule, make_network(), make_batch(0)) for rule in (SAM(0.2), CSAM(0.2))]
    assert results[0].perturbed_loss == results[1].perturbed_loss > results[0].loss


def test_measured_cosine_and_length_are_those_of_the_two_gradients():
    network = make_network()
    g = gradient(network, 0)
    g_s = at(network, [0.2 * x / norm(g) for x in g], 0)
    cosine = sum(float((a * b).sum()) for a, b in zip(g, g_s, strict=True)) / norm(g) / norm(g_s)
    engine = ReplicatedEngine(network, make_optimizer(network))
    result = SharpnessAwareStep(engine, SAM(0.2))([make_batch(0)], measure=True)
    assert result.cosine == pytest.approx(cosine, abs=1e-5)
    assert result.effective_rho == pytest.approx(0.2, rel=1e-5)
    assert 0 < cosine < 0.9999


def test_a_perturbation_lost_in_rounding_is_seen():
    """bfloat16 keeps 8 bits: of e at a thousandth of a weight's last bit, nothing arrives."""
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network), compute_dtype=torch.bfloat16)
    small = SharpnessAwareStep(engine, SAM(1e-7))([make_batch(0)], measure=True)
    large = SharpnessAwareStep(engine, SAM(0.5))([make_batch(0)], measure=True)
    assert small.effective_rho < 1e-3
    assert small.effective_rho == 0 or abs(small.effective_rho / 1e-7 - 1) > 0.5
    assert large.effective_rho == pytest.approx(0.5, rel=0.05)


def half_step(network, scale: float, bad_pass: int | None = None):
    """One fp16 step on a network whose own forward is in fp16-like range; the engine and result."""
    engine = ReplicatedEngine(network, make_optimizer(network), compute_dtype=torch.float16)
    engine.scale.value = scale
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        return output * float("inf") if len(calls) == bad_pass else output

    handle = network.register_forward_hook(spoil)
    result = SharpnessAwareStep(engine, SAM(0.1), clip_norm=0.5)([make_batch(0)])
    handle.remove()
    return engine, result


def test_the_loss_scale_changes_no_bit():
    networks = [make_network(), make_network()]
    results = [half_step(n, s)[1] for n, s in zip(networks, (1.0, 2.0**16), strict=True)]
    assert bit_equal(*networks)
    assert results[0].gradient_norm == results[1].gradient_norm
    assert results[0].ascent_gradient_norm == results[1].ascent_gradient_norm


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_an_overflow_in_either_pass_halves_the_scale_once(bad_pass):
    network = make_network()
    before = copy.deepcopy(network)
    engine, result = half_step(network, 2.0**16, bad_pass)
    assert result.skipped
    assert bit_equal(network, before)
    assert engine.loss_scale == 2.0**15
    assert not engine.optimizer.state


def test_the_scale_grows_by_steps_and_not_by_passes(monkeypatch):
    monkeypatch.setattr("flatcal_dist.sharpness.loss_scale.GROWTH_INTERVAL", 3)
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network), compute_dtype=torch.float16)
    step = SharpnessAwareStep(engine, SAM(0.1))
    scales = [step([make_batch(0)]).loss_scale / 2**16 for _ in range(7)]
    assert scales == [1, 1, 2, 2, 2, 4, 4]


def test_groups_of_ranks():
    """4 ranks: a group of 4 is global, of 1 is rank, of 2 the mean of two groups' SAM gradients."""
    outcomes = on_ranks(4, _groups)
    expected = make_network()
    inputs, target = make_batch(0)
    gradients = []
    for half in (slice(0, 12), slice(12, 24)):
        part = inputs[half], target[half]
        g = torch.autograd.grad(F.cross_entropy(expected(part[0]), part[1]), expected.parameters())
        moved = copy.deepcopy(expected)
        with torch.no_grad():
            for w, x in zip(moved.parameters(), g, strict=True):
                w += 0.1 * x / norm(g)
        loss = F.cross_entropy(moved(part[0]), part[1])
        gradients.append(torch.autograd.grad(loss, list(moved.parameters())))
    pairs = [(a + b) / 2 for a, b in zip(*gradients, strict=True)]
    for outcome in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(outcome["global"], outcome[4], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(outcome["rank"], outcome[1], strict=True))
        assert largest_difference(outcome[2], pairs) < CLOSE
        assert largest_difference(outcome[2], outcome["rank"]) > 100 * CLOSE
        assert largest_difference(outcome[2], outcome["global"]) > 100 * CLOSE
        assert outcome["refused"] == (
            "scope 3 makes groups of 3 ranks, which do not divide the 4 ranks that run; choose a "
            "divisor, or scope 'global' or 'rank'"
        )
        assert all(torch.equal(a, b) for a, b in zip(outcome[2], outcomes[0][2], strict=True)), (
            "ranks hold the same bits"
        )


def _groups(rank, world_size):
    """What one step of SGD with rate 1 subtracts, by scope."""
    outcome = {}
    for scope in ("global", 4, "rank", 1, 2):
        network = make_network()
        before = [w.detach().clone() for w in network.parameters()]
        engine = ReplicatedEngine(
            DistributedDataParallel(network), torch.optim.SGD(network.parameters(), lr=1.0)
        )
        step = SharpnessAwareStep(engine, SAM(0.1), scope=scope)
        inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(0))
        halves = zip(inputs.tensor_split(2), target.tensor_split(2), strict=True)
        step(list(halves))
        outcome[scope] = [b - w.detach() for b, w in zip(before, network.parameters(), strict=True)]
    try:
        SharpnessAwareStep(engine, SAM(0.1), scope=3)
    except ValueError as error:
        outcome["refused"] = str(error)
    return outcome


@pytest.mark.parametrize("world_size", [1, 2])
def test_per_micro_batch_is_the_mean_of_their_sam_gradients(world_size):
    network = make_network()
    expected = [torch.zeros_like(w) for w in network.parameters()]
    inputs, target = make_batch(0)
    for part in range(4):
        samples = slice(6 * part, 6 * part + 6)
        x, y = inputs[samples], target[samples]
        g = torch.autograd.grad(F.cross_entropy(network(x), y), list(network.parameters()))
        moved = copy.deepcopy(network)
        with torch.no_grad():
            for w, d in zip(moved.parameters(), g, strict=True):
                w += 0.1 * d / norm(g)
        loss = F.cross_entropy(moved(x), y)
        for total, d in zip(
            expected, torch.autograd.grad(loss, list(moved.parameters())), strict=True
        ):
            total += d / 4
    for outcome in on_ranks(world_size, _per_micro_batch):
        assert largest_difference(outcome, expected) < CLOSE


def _per_micro_batch(rank, world_size):
    network = make_network()
    before = [w.detach().clone() for w in network.parameters()]
    model = DistributedDataParallel(network) if world_size > 1 else network
    engine = ReplicatedEngine(model, torch.optim.SGD(network.parameters(), lr=1.0))
    step = SharpnessAwareStep(engine, SAM(0.1), scope="rank", per_micro_batch=True)
    inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(0))
    parts = 4 // world_size
    step(list(zip(inputs.tensor_split(parts), target.tensor_split(parts), strict=True)))
    return [b - w.detach() for b, w in zip(before, network.parameters(), strict=True)]


def test_bad_rules_are_refused():
    for make, message in (
        (lambda: SAM(0.1, every=0), "every must be at least 1"),
        (lambda: ASAM(0.1, eta=-1), "eta must be finite"),
        (lambda: LookSAM(0.1, alpha=math.inf), "alpha must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("rule", [SAM(0.1), CSAM(0.1), ASAM(0.5)])
def test_extra_memory_is_one_copy_of_the_weights(rule):
    """Tensors alive in the forward pass at w + e, against those of a plain step's forward pass."""
    alive = {}
    for name, used in (("plain", None), ("sharp", rule)):
        network = nn.Sequential(nn.Linear(6, 50_000), nn.GELU(), nn.Linear(50_000, 5))
        engine = ReplicatedEngine(network, make_optimizer(network))
        step = SharpnessAwareStep(engine, used)
        step([make_batch(0)])  # momentum is there
        seen = []
        network.register_forward_pre_hook(lambda *_, seen=seen: seen.append(_bytes_alive()))
        gc.collect()
        step([make_batch(0)])
        alive[name] = seen[-1]
        del network, engine, step
        gc.collect()
    copy_of_weights = 4 * (6 * 50_000 + 50_000 + 50_000 * 5 + 5)
    # Beside it: two states of the random generator, 5 kB each, and a few scalars.
    assert 0 < alive["sharp"] - alive["plain"] - copy_of_weights < 16_384


def _bytes_alive() -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor)
    }
    gradients = [
        t.grad for t in gc.get_objects() if isinstance(t, nn.Parameter) and t.grad is not None
    ]
    storages |= {g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients}
    return sum(storages.values())


def test_one_compiled_graph_serves_both_passes():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = make_network(dropout=0.2, norm=True)
    pointers = [w.data_ptr() for w in network.parameters()]
    compiled = torch.compile(network, backend=count)
    step = SharpnessAwareStep(ReplicatedEngine(compiled, make_optimizer(network)), CSAM(0.1))
    for number in range(5):
        step([make_batch(number)])
    assert len(graphs) == 1
    assert [w.data_ptr() for w in network.parameters()] == pointers


def test_ranks_stay_bit_identical_over_a_thousand_steps():
    """Scope rank, where every rank perturbs by its own gradient; every 50th step is skipped."""
    outcomes = on_ranks(2, _a_thousand_steps)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == 20


def _a_thousand_steps(rank, world_size):
    network = make_network()
    engine = ReplicatedEngine(
        DistributedDataParallel(network), torch.optim.SGD(network.parameters(), lr=0.05)
    )
    step = SharpnessAwareStep(engine, SAM(0.05), scope="rank")
    digest, skipped = hashlib.sha256(), 0
    for number in range(1000):
        inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(number % 40))
        if number % 50 == 49 and rank == 1:
            inputs = inputs * float("nan")
        skipped += step([(inputs, target)], samples=24).skipped
        for w in network.parameters():
            digest.update(w.detach().numpy().tobytes())
    return digest.hexdigest(), skipped
