"""The step against a plain reference, written here: one process, one batch, no library of ours."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.losses import csam_loss
from flatcal_dist.sharpness import (
    CSAM,
    SAM,
    LookSAM,
    ReplicatedEngine,
    SharpnessAwareStep,
    StepError,
)
from tests.ranks import on_ranks

RULES = {"none": None, "sam": SAM(0.1), "csam": CSAM(0.1, gamma=1.0)}
SAMPLES, STEPS, CLASSES = 24, 5, 5

# Rounding of float32 sums in another order: measured up to 2e-7 of the largest weight over these
# steps; a wrong scope, scale or restore is off by 1e-3 or more.
CLOSE = 1e-6


def make_network(dropout: float = 0.0, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.BatchNorm1d(16) if norm else nn.Identity(), nn.GELU()]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(16, CLASSES))


def make_batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def make_optimizer(network: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def literal_csam(logits: torch.Tensor, target: torch.Tensor, gamma: float) -> torch.Tensor:
    p = F.softmax(logits, dim=1)[torch.arange(len(target)), target]
    return torch.where(p <= 0.5, -p.log(), -((1 + p) ** -gamma) * p.log()).mean()


def reference_gradient(network, inputs, target, rule) -> list[torch.Tensor]:
    """The descent gradient on one batch, as the papers have it; the network is left at w."""
    weights = list(network.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(network(inputs), target), weights)
    if rule is None:
        return list(gradient)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient))
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, gradient, strict=True):
            w += rule.rho * g / norm
    loss = F.cross_entropy(network(inputs), target)
    if isinstance(rule, CSAM):
        loss = literal_csam(network(inputs), target, rule.gamma)
    gradient = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        for w, b in zip(weights, before, strict=True):
            w.copy_(b)
    return list(gradient)


def reference(rule, scope: str = "global", world_size: int = 1) -> list[torch.Tensor]:
    """Weights after STEPS steps: of one rank, or of ranks that perturb by themselves."""
    network = make_network()
    optimizer = make_optimizer(network)
    for number in range(STEPS):
        inputs, target = make_batch(number)
        parts = world_size if scope == "rank" else 1
        shards = zip(inputs.chunk(parts), target.chunk(parts), strict=True)
        gradients = [reference_gradient(network, x, y, rule) for x, y in shards]
        for w, *gs in zip(network.parameters(), *gradients, strict=True):
            w.grad = sum(gs) / parts
        optimizer.step()
    return [w.detach() for w in network.parameters()]


def trained(rank: int, world_size: int, rule, scope: str, micro_batches: int):
    """The same with our step; also a sum over all bits of the weights after each step."""
    network = make_network()
    model = DistributedDataParallel(network) if world_size > 1 else network
    engine = ReplicatedEngine(model, make_optimizer(network))
    step = SharpnessAwareStep(engine, rule, scope=scope)
    bits, results = [], []
    for number in range(STEPS):
        inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(number))
        results.append(
            step(
                list(
                    zip(
                        inputs.tensor_split(micro_batches),
                        target.tensor_split(micro_batches),
                        strict=True,
                    )
                )
            )
        )
        bits.append(
            torch.cat([w.detach().flatten() for w in network.parameters()]).numpy().tobytes()
        )
    return [w.detach() for w in network.parameters()], bits, results


def largest_difference(ours, theirs) -> float:
    scale = max(float(t.abs().max()) for t in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / scale


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("micro_batches", [1, 4, 5])  # 24 samples do not divide by 5
def test_one_process_equals_the_reference(rule, micro_batches):
    weights, _, _ = trained(0, 1, RULES[rule], "global", micro_batches)
    assert largest_difference(weights, reference(RULES[rule])) < CLOSE


@pytest.mark.parametrize(
    ("rule", "scope", "world_size", "micro_batches"),
    [
        ("none", "global", 2, 1),
        ("sam", "global", 2, 3),
        ("csam", "global", 4, 1),
        ("sam", "rank", 2, 1),
        ("csam", "rank", 2, 3),
    ],
)
def test_ranks_equal_the_reference_and_one_another(rule, scope, world_size, micro_batches):
    outcomes = on_ranks(world_size, trained, RULES[rule], scope, micro_batches)
    expected = reference(RULES[rule], scope, world_size)
    for weights, bits, results in outcomes:
        assert largest_difference(weights, expected) < CLOSE
        assert bits == outcomes[0][1], "ranks must hold the same bits after every step"
        assert results == outcomes[0][2], "ranks must report the same"
    if scope == "rank":
        other = reference(RULES[rule], "global")
        assert largest_difference(outcomes[0][0], other) > 100 * CLOSE, "the scopes must differ"


def test_uneven_shares_weigh_every_sample_the_same():
    """7 samples on 2 ranks: 4 and 3; the mean is over samples, not over ranks."""
    expected = reference_gradient(make_network(), *(t[:7] for t in make_batch(0)), SAM(0.1))
    for gradient in on_ranks(2, _gradient_of_uneven_shares):
        assert largest_difference(gradient, expected) < CLOSE


def _gradient_of_uneven_shares(rank, world_size):
    network = make_network()
    engine = ReplicatedEngine(
        DistributedDataParallel(network), torch.optim.SGD(network.parameters(), lr=1.0)
    )
    before = [w.detach().clone() for w in network.parameters()]
    inputs, target = make_batch(0)
    share = slice(0, 4) if rank == 0 else slice(4, 7)
    SharpnessAwareStep(engine, SAM(0.1))([(inputs[share], target[share])])
    return [b - w.detach() for b, w in zip(before, network.parameters(), strict=True)]


def one_step(rule, network, batch, lr=0.1, **options):
    engine = ReplicatedEngine(network, make_optimizer(network, lr))
    return SharpnessAwareStep(engine, rule, **options)([batch])


def bit_equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_rho_zero_is_the_plain_step_bit_for_bit():
    """Weights, batch-norm statistics and the random stream afterwards, with dropout on."""
    plain, sharp = make_network(0.5, True), make_network(0.5, True)
    streams = []
    for rule, network in ((None, plain), (SAM(0.0), sharp)):
        torch.manual_seed(1)
        for number in range(STEPS):
            one_step(rule, network, make_batch(number))
        streams.append(torch.rand(3))
    assert bit_equal(plain, sharp)
    assert torch.equal(*streams)


def test_csam_descends_its_own_loss_where_the_network_is_confident():
    """Under p = 1/2, as at initialization, CSAM is SAM: here many samples are above."""
    rule, network = CSAM(0.1, gamma=2.0), make_network()
    with torch.no_grad():
        network[4].weight.mul_(12)
        inputs = make_batch(0)[0]
        target = network(inputs).argmax(1)
        p = F.softmax(network(inputs), dim=1).amax(1)
    assert (p > 0.5).float().mean() > 0.3
    expected = reference_gradient(network, inputs, target, rule)
    as_sam = reference_gradient(network, inputs, target, SAM(0.1))
    before = [w.detach().clone() for w in network.parameters()]
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), lr=1.0))
    SharpnessAwareStep(engine, rule)([(inputs, target)])
    taken = [b - w.detach() for b, w in zip(before, network.parameters(), strict=True)]
    # Differences of weights of order 5 in float32, relative to the largest gradient.
    assert largest_difference(taken, expected) < 1e-4
    assert largest_difference(taken, as_sam) > 0.01


def test_looksam_without_a_perturbation_is_plain_bit_for_bit():
    plain, look = make_network(), make_network()
    steps = [
        SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), rule)
        for network, rule in ((plain, None), (look, LookSAM(0.0, every=2)))
    ]
    for number in range(STEPS):
        for step in steps:
            step([make_batch(number)])
    assert bit_equal(plain, look)


def test_gamma_zero_is_sam_bit_for_bit():
    sam, csam = make_network(), make_network()
    for number in range(STEPS):
        one_step(SAM(0.1), sam, make_batch(number))
        one_step(CSAM(0.1, gamma=0.0), csam, make_batch(number))
    assert bit_equal(sam, csam)


def test_batch_norm_counts_one_clean_forward():
    network, clean = make_network(norm=True), make_network(norm=True)
    clean(make_batch(0)[0])
    one_step(SAM(0.5), network, make_batch(0))
    for ours, theirs in zip(network.buffers(), clean.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_both_passes_draw_the_same_dropout():
    network = make_network(dropout=0.5)
    seen = []
    network[3].register_forward_hook(lambda module, args, output: seen.append(output == 0))
    one_step(SAM(1e-6), network, make_batch(0))
    assert torch.equal(*seen)
    assert 0.2 < seen[0].float().mean() < 0.8


def test_perturbation_has_length_rho_and_leaves_no_trace():
    """Seen by a hook in the second pass; with a rate of nothing, weights come back bit for bit."""
    network = make_network()
    before = [w.detach().clone() for w in network.parameters()]
    during = []
    network.register_forward_pre_hook(
        lambda *_: during.append([w.detach().clone() for w in network.parameters()])
    )
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), lr=0.0))
    SharpnessAwareStep(engine, SAM(0.3))([make_batch(0)])
    assert len(during) == 2
    moved = [a - b for a, b in zip(during[1], before, strict=True)]
    assert math.isclose(float(nn.utils.get_total_norm(moved)), 0.3, rel_tol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


class LeavesOutABlock(nn.Module):
    """Its second forward pass does not use `b`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.calls = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES), 0
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        return self.a(x) + (self.b(x) if self.calls % 2 else 0)


def test_weights_without_a_second_gradient_come_back():
    network = LeavesOutABlock()
    before = copy.deepcopy(network.b.state_dict())
    one_step(SAM(0.5), network, make_batch(0))
    assert all(torch.equal(before[key], value) for key, value in network.b.state_dict().items())
    assert torch.equal(network.frozen, torch.ones(3))


def test_an_exception_in_the_second_pass_leaves_weights_and_buffers_as_before():
    network = make_network(norm=True)
    before = copy.deepcopy(network.state_dict())
    calls = []

    def fail_second(*_):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    network[4].register_forward_hook(fail_second)
    with pytest.raises(KeyboardInterrupt):
        one_step(SAM(0.5), network, make_batch(0))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("rule", ["none", "sam"])
def test_zero_gradient_does_not_divide_by_zero(rule):
    network = make_network()
    with torch.no_grad():
        for w in network.parameters():
            w.zero_()
    before = copy.deepcopy(network.state_dict())
    step = SharpnessAwareStep(
        ReplicatedEngine(network, make_optimizer(network)),
        RULES[rule],
        loss=lambda logits, target: 0 * logits.sum(1),
    )
    result = step([make_batch(0)])
    assert not result.skipped
    assert result.gradient_norm == 0
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("scope", ["global", "rank"])
@pytest.mark.parametrize("when", ["ascent", "descent"])
def test_a_non_finite_value_on_one_rank_skips_the_step_on_all(scope, when):
    outcomes = on_ranks(2, _with_a_bad_pass, scope, when)
    for skipped, same_weights, same_buffers, momentum, later in outcomes:
        assert skipped
        assert same_weights
        assert same_buffers
        assert not momentum, "a skipped step must not touch the optimizer"
        assert later == outcomes[0][4], "after the next good step, ranks hold the same bits"


def _with_a_bad_pass(rank, world_size, scope, when):
    network = make_network(norm=True)
    before = copy.deepcopy(network.state_dict())
    optimizer = make_optimizer(network)
    step = SharpnessAwareStep(
        ReplicatedEngine(DistributedDataParallel(network, broadcast_buffers=False), optimizer),
        SAM(0.1),
        scope=scope,
    )
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        bad = rank == 1 and len(calls) == (1 if when == "ascent" else 2)
        return output * float("inf") if bad else output

    network.register_forward_hook(spoil)
    inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(0))
    skipped = step([(inputs, target)]).skipped
    names = [name for name, _ in network.named_parameters()]
    now = network.state_dict()
    same = {key: torch.equal(now[key], before[key]) for key in before}
    momentum = len(optimizer.state)
    step([(inputs, target)])
    later = torch.cat([w.detach().flatten() for w in network.parameters()]).numpy().tobytes()
    weights = all(same[key] for key in names)
    return skipped, weights, all(same[k] for k in same if k not in names), momentum, later


@pytest.mark.parametrize("outer", [False, True])
def test_the_perturbation_is_seen_through_autocast(outer):
    """Autocast keeps low-precision copies of the weights until its outermost block ends."""
    network = make_network()
    logits = []
    network.register_forward_hook(lambda module, args, output: logits.append(output.detach()))

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.network(x)

    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        one_step(SAM(0.5), Autocast(), make_batch(0))
    assert (logits[1].float() - logits[0].float()).abs().max() > 0.01


def test_only_the_descent_gradient_is_clipped():
    """Clipping to infinity does nothing; a small bound leaves direction and perturbation."""
    free, unbounded, clipped = (make_network() for _ in range(3))
    results = [
        one_step(SAM(0.1), free, make_batch(0)),
        one_step(SAM(0.1), unbounded, make_batch(0), clip_norm=math.inf),
        one_step(SAM(0.1), clipped, make_batch(0), clip_norm=0.01),
    ]
    assert bit_equal(free, unbounded)
    assert results[0] == results[2], "norms and losses are those before clipping"
    start = make_network()
    steps = [
        torch.cat(
            [(a - b).flatten() for a, b in zip(n.parameters(), start.parameters(), strict=True)]
        )
        for n in (free, clipped)
    ]
    decay = 0.1 * 1e-3 * torch.cat([w.flatten() for w in start.parameters()])
    descents = [-(step + decay) / 0.1 for step in steps]
    # Norms of differences of float32 weights of order 1: absolute error about 1e-6.
    assert math.isclose(descents[1].norm().item(), 0.01, rel_tol=1e-3)
    assert F.cosine_similarity(*descents, dim=0) > 0.9999


def test_a_raised_hand_is_seen_by_every_rank():
    assert on_ranks(2, _raises_a_hand) == [[False, True], [False, True]]


def _raises_a_hand(rank, world_size):
    network = make_network()
    step = SharpnessAwareStep(
        ReplicatedEngine(DistributedDataParallel(network), make_optimizer(network)), SAM(0.1)
    )
    return [step([make_batch(0)], stop=wish).stop for wish in (False, rank == 1)]


@pytest.mark.parametrize("world_size", [2])
def test_rank_scope_moves_the_gradient_bytes_of_plain_training(world_size):
    plain, per_rank, together = on_ranks(world_size, _traffic)[0]
    parameters = sum(w.numel() for w in make_network().parameters())
    assert plain == [parameters * 4], "one gradient reduction"
    assert per_rank == plain
    assert together == plain * 2


def _traffic(rank, world_size):
    """Bytes of each gradient reduction in one step: plain, scope rank, scope global."""
    counted = []
    for rule, scope in ((None, "global"), (SAM(0.1), "rank"), (SAM(0.1), "global")):
        network = make_network()
        model = DistributedDataParallel(network)
        moved = []

        def hook(state, bucket, moved=moved):
            moved.append(bucket.buffer().numel() * bucket.buffer().element_size())
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda done: done.value()[0] / world_size)

        model.register_comm_hook(None, hook)
        step = SharpnessAwareStep(
            ReplicatedEngine(model, make_optimizer(network)), rule, scope=scope
        )
        step([make_batch(0)], samples=SAMPLES * world_size)
        counted.append(moved)
    return counted


def test_bad_options_are_refused():
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    with pytest.raises(ValueError, match="rho must be finite and not negative"):
        SAM(-0.1)
    with pytest.raises(ValueError, match="rho must be finite"):
        SAM(math.nan)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 2\]"):
        CSAM(0.1, gamma=2.5)
    with pytest.raises(ValueError, match="scope must be one of global, rank, node or a number"):
        SharpnessAwareStep(engine, SAM(0.1), scope="nodes")
    assert csam_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), 1.0) > 0


def test_what_no_step_can_serve_is_refused():
    network = make_network()
    optimizer = make_optimizer(network)
    engine = ReplicatedEngine(network, optimizer)
    frozen = make_network().requires_grad_(False)
    lbfgs = torch.optim.LBFGS(network.parameters())
    for make, message in (
        (lambda: ReplicatedEngine(make_network(), optimizer), "parameters of another network"),
        (lambda: ReplicatedEngine(frozen, optimizer), "nothing to train"),
        (lambda: ReplicatedEngine(make_network().double(), optimizer), "call network.float"),
        (lambda: ReplicatedEngine(network, lbfgs), "LBFGS evaluates the loss by itself"),
        (lambda: SharpnessAwareStep(engine, None, clip_norm=-1.0), "clip_norm must be positive"),
        (lambda: SharpnessAwareStep(engine, CSAM(0.1), loss=F.cross_entropy), "leave `loss` out"),
        (lambda: SAM(0.1, every=2.5), "every must be at least 1 and whole"),
    ):
        with pytest.raises(StepError, match=message):
            make()


def test_a_batch_that_cannot_be_taken_is_refused_and_changes_nothing():
    network = make_network(norm=True)
    before = copy.deepcopy(network.state_dict())
    batch = make_batch(0)

    def refused(message, micro_batches, rule=SAM(0.1), **options):  # noqa: B008
        engine = ReplicatedEngine(network, make_optimizer(network))
        step = SharpnessAwareStep(engine, rule, loss=options.pop("loss", None))
        step.rho = options.pop("rho", step.rho)
        with pytest.raises(StepError, match=message):
            step(micro_batches, **options)
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

    refused("nothing to learn from", [])
    refused("nothing to learn from", [(batch[0][:0], batch[1][:0])])
    refused("nothing to learn from", [batch], samples=0)
    refused(r"list of \(inputs, target\) pairs", batch)
    refused("wants one value each", [batch], loss=F.cross_entropy)
    refused("rho must be finite", [batch], rho=math.nan)
    for weight in network[0].parameters():
        weight.requires_grad_(False)
    engine = ReplicatedEngine(network, make_optimizer(network))
    step = SharpnessAwareStep(engine, SAM(0.1))
    network.requires_grad_(True)
    with pytest.raises(StepError, match="frozen or thawed"):
        step([batch])


def test_ranks_with_different_numbers_of_micro_batches_are_refused_on_all():
    for message in on_ranks(2, _different_numbers):
        assert "different numbers of micro-batches" in message


def _different_numbers(rank, world_size):
    network = make_network()
    model = DistributedDataParallel(network)
    step = SharpnessAwareStep(ReplicatedEngine(model, make_optimizer(network)), SAM(0.1))
    with pytest.raises(StepError) as refused:
        step([make_batch(0)] * (rank + 1))
    return str(refused.value)


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_a_compiled_wrapper_is_seen_through(scope):
    """torch.compile around DistributedDataParallel, as Accelerate does it."""
    ours, compiled = (on_ranks(2, _compiled_or_not, scope, around) for around in (False, True))
    for plain, other in zip(ours, compiled, strict=True):
        assert plain[0].keys() == other[0].keys(), "the network's own names"
        assert all(torch.allclose(plain[0][n], other[0][n], rtol=0, atol=1e-7) for n in plain[0])
        assert math.isclose(plain[1], other[1], rel_tol=1e-5)


def _compiled_or_not(rank, world_size, scope, around):
    network = make_network()
    model = DistributedDataParallel(network)
    model = torch.compile(model, backend="eager") if around else model
    engine = ReplicatedEngine(model, make_optimizer(network))
    step = SharpnessAwareStep(engine, SAM(0.1), scope=scope)
    inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(0))
    result = step([(inputs, target)])
    return engine.full_weights(), result.ascent_gradient_norm


def test_the_steps_state_goes_on():
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network))
    step = SharpnessAwareStep(engine, LookSAM(0.1, every=3))
    for number in range(2):
        step([make_batch(number)])
    saved = copy.deepcopy((engine.local_state(), step.state_dict()))
    step([make_batch(2)])
    other = make_network()
    again = ReplicatedEngine(other, make_optimizer(other))
    resumed = SharpnessAwareStep(again, LookSAM(0.1, every=3))
    again.load_local_state(saved[0])
    resumed.load_state_dict(saved[1])
    resumed([make_batch(2)])
    assert bit_equal(network, other)
