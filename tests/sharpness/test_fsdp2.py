"""FSDP2 against the plain reference of test_step, one process, and DDP on the same ranks.

Starting ranks costs seconds: all checks on as many ranks run in one start, each a function here.
"""

import copy
import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ASAM, CSAM, SAM, LookSAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.sharpness.fsdp2 import ShardedEngine, shard
from tests.ranks import on_ranks
from tests.sharpness.test_step import (
    CLASSES,
    CLOSE,
    largest_difference,
    make_batch,
    make_network,
    make_optimizer,
    reference,
)

RULES = {
    "none": None,
    "sam": SAM(0.1),
    "csam": CSAM(0.1, gamma=1.0),
    "asam": ASAM(0.5),
    "looksam": LookSAM(0.1, every=2),
}
STEPS = 5
CPU = torch.device("cpu")


def sharded(network=None, precision=torch.float32, optimizer=make_optimizer, group=None):
    """One block of its own, and the rest in the root."""
    network = make_network() if network is None else network
    model = shard(network, CPU, precision, group, smallest_block=100)
    return ShardedEngine(model, optimizer(model), precision)


def sharp(engine, rule, **options) -> SharpnessAwareStep:
    step = SharpnessAwareStep(engine, rule, **options)
    if isinstance(engine, ShardedEngine):
        step.scope = replace(step.scope, everyone=engine.reduces(step.scope))
    return step


def my_part(rank, world_size, number, micro_batches=1):
    inputs, target = (t.tensor_split(world_size)[rank] for t in make_batch(number))
    parts = inputs.tensor_split(micro_batches), target.tensor_split(micro_batches)
    return list(zip(*parts, strict=True))


def train(step, rank, world_size, micro_batches=1, numbers=range(STEPS), measure=False):
    return [
        step(my_part(rank, world_size, number, micro_batches), measure=measure)
        for number in numbers
    ]


def whole(engine) -> dict[str, torch.Tensor]:
    """All weights, on every rank."""
    weights = {n: w.full_tensor().detach().clone() for n, w in engine.weights.items()}
    return weights | {n: b.clone() for n, b in engine.module.named_buffers()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def far(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return largest_difference([a[n].float() for n in a], [b[n].float() for n in a])


def timm_optimizer(name):
    return partial(create_optimizer_v2, opt=name, lr=1e-2, weight_decay=0.05)


def one_process(rule, steps=STEPS, network=None, optimizer=make_optimizer, **options):
    """Weights of the engine that has all weights and all samples."""
    network = make_network() if network is None else network
    step = SharpnessAwareStep(ReplicatedEngine(network, optimizer(network)), rule, **options)
    for number in range(steps):
        step([make_batch(number)])
    return {n: w.detach() for n, w in network.named_parameters()}


def run_checks(rank, world_size, checks):
    return {check.__name__: check(rank, world_size) for check in checks}


# Two ranks


def trained(rank, world_size, cases=(("none", 4), ("sam", 5), ("csam", 1), ("asam", 4))):
    outcome = {}
    for rule, micro_batches in (*cases, ("looksam", 1)):
        engine = sharded()
        results, bits = [], []
        step = sharp(engine, RULES[rule])
        for number in range(STEPS):
            results += train(step, rank, world_size, micro_batches, [number])
            bits.append(torch.cat([w.flatten() for w in whole(engine).values()]).numpy().tobytes())
        outcome[rule, micro_batches] = engine.full_weights(), results, bits
    return outcome


def trained_everything(rank, world_size):
    return trained(rank, world_size, [(r, m) for r in RULES for m in (1, 4, 5)])


def rho_zero(rank, world_size):
    outcome = []
    for rule in (None, SAM(0.0)):
        torch.manual_seed(1 + rank)
        engine = sharded(make_network(0.5, True))
        train(sharp(engine, rule), rank, world_size, 2)
        outcome.append((whole(engine), torch.rand(3)))
    (plain, stream), (zero, other_stream) = outcome
    return same(plain, zero), torch.equal(stream, other_stream)


def as_ddp(rank, world_size):
    """Each rank has its own dropout masks and batch statistics."""
    outcome = []
    for kind in ("fsdp2", "ddp"):
        network = make_network(0.5, True)
        if kind == "ddp":
            model = DistributedDataParallel(network, broadcast_buffers=False)
            engine = ReplicatedEngine(model, make_optimizer(network))
        else:
            engine = sharded(network)
        torch.manual_seed(1 + rank)
        train(sharp(engine, SAM(0.1)), rank, world_size, 2)
        own = whole(engine) if kind == "fsdp2" else copy.deepcopy(network.state_dict())
        engine.synchronize_buffers()
        outcome.append((own, engine.full_weights() or None, torch.rand(3)))
    (ours, ours_full, stream), (theirs, theirs_full, other_stream) = outcome
    count = int(ours["1.num_batches_tracked"])
    full = far(ours_full, theirs_full) if rank == 0 else 0.0
    return far(ours, theirs), full, torch.equal(stream, other_stream), count


class LeavesOutABlock(nn.Module):
    """Its second forward pass does not use a block that is sharded by itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 16), nn.Linear(6, 16)])
        self.head, self.calls = nn.Linear(16, CLASSES), 0
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        x = self.blocks[0](x) + (self.blocks[1](x) if self.calls % 2 else 0)
        return self.head(x)


def a_block_without_a_second_gradient(rank, world_size):
    engine = sharded(LeavesOutABlock())
    before = whole(engine)
    train(sharp(engine, SAM(0.5)), rank, world_size, numbers=range(1))
    now, frozen = whole(engine), engine.full_weights().get("head.bias")
    expected = one_process(SAM(0.5), 1, LeavesOutABlock())
    kept = all(torch.equal(before[n], now[n]) for n in now if n.startswith("blocks.1"))
    distance = far(now, {n: w for n, w in expected.items() if n != "head.bias"})
    return kept, distance, frozen is None or torch.equal(frozen, expected["head.bias"])


def exceptions(rank, world_size):
    """In each pass, in forward or backward; then a good step is as if it had not been."""
    clean = sharded(make_network(norm=True))
    train(sharp(clean, SAM(0.5)), rank, world_size, 2)
    outcome = []
    for error in (KeyboardInterrupt, RuntimeError):
        for call, backward in ((1, False), (3, False), (4, True)):  # of two micro-batches a pass
            engine = sharded(make_network(norm=True))
            before, calls = whole(engine), []

            def fail(*_, calls=calls, call=call, error=error):
                calls.append(1)
                if len(calls) == call:
                    raise error

            if backward:  # a hook on the output runs amid the backward pass
                hook = lambda m, a, out, fail=fail: out.register_hook(fail) and None  # noqa: E731
            else:
                hook = fail
            handle = engine.module[2].register_forward_hook(hook)
            step = sharp(engine, SAM(0.5))
            raised = False
            try:
                train(step, rank, world_size, 2, [0])
            except error:
                raised = True
            handle.remove()
            restored = same(whole(engine), before)
            full = engine.full_weights()
            whole_too = rank != 0 or all(torch.equal(full[n], before[n]) for n in full)
            train(step, rank, world_size, 2)
            outcome.append((raised, restored, whole_too, same(whole(engine), whole(clean))))
    return outcome


def bad_passes(rank, world_size):
    """Not finite on rank 1 alone; afterwards weights, buffers, optimizer and the next step."""
    clean = sharded(make_network(norm=True))
    train(sharp(clean, SAM(0.1)), rank, world_size)
    outcome = []
    for bad_call in (1, 2):
        engine = sharded(make_network(norm=True))
        before, calls = whole(engine), []

        def spoil(module, args, output, calls=calls, bad_call=bad_call):
            calls.append(1)
            return output * math.inf if rank == 1 and len(calls) == bad_call else output

        engine.module[4].register_forward_hook(spoil)
        step = sharp(engine, SAM(0.1))
        skipped = train(step, rank, world_size, numbers=[0])[0].skipped
        untouched = same(whole(engine), before) and not engine.optimizer.state
        train(step, rank, world_size)
        outcome.append((skipped, untouched, same(whole(engine), whole(clean))))
    return outcome


def clipped(rank, world_size):
    distances = []
    for bound in (None, math.inf, 0.01):
        engine = sharded()
        results = train(sharp(engine, SAM(0.1), clip_norm=bound), rank, world_size)
        distances.append(far(whole(engine), one_process(SAM(0.1), clip_norm=bound)))
    return distances, results[0].gradient_norm


def low_precision(rank, world_size):
    """What pass two computes with, against the shards that are there at that moment."""
    outcome = {}
    for precision in (torch.bfloat16, torch.float16):
        engine = sharded(make_network(norm=True), precision)
        before = whole(engine)
        shards_seen, weights_seen, dtypes = _what_passes_see(engine)
        step = sharp(engine, SAM(0.1))
        (result,) = train(step, rank, world_size, numbers=[0], measure=True)
        master = [seen["4.weight"] for seen in shards_seen]
        moved = [shards_seen[1][n] - before[n] for n in engine.weights]
        outcome[str(precision)] = (
            [torch.equal(w, m.to(precision)) for w, m in zip(weights_seen, master, strict=True)],
            torch.equal(*weights_seen),
            float(nn.utils.get_total_norm(moved)),
            result.effective_rho,
            set(dtypes) == {torch.float32},
            {w.dtype for w in whole(engine).values()} == {torch.float32, torch.int64},
        )
        plain = sharded(precision=precision)
        train(sharp(plain, SAM(0.1)), rank, world_size, 3)
        outcome[str(precision)] += (far(whole(plain), one_process(SAM(0.1))),)
    return outcome


def _what_passes_see(engine):
    shards, weights, norm_dtypes = [], [], []
    engine.module.register_forward_pre_hook(lambda *_: shards.append(whole(engine)))
    head, norm = engine.module[4], engine.module[1]  # of the root, so still whole in these hooks
    head.register_forward_hook(lambda m, *_: weights.append(m.weight.detach().clone()))
    norm.register_forward_hook(lambda m, *_: norm_dtypes.append(m.weight.dtype))
    return shards, weights, norm_dtypes


def overflow(rank, world_size):
    """fp16 with a scale that is too large at first: halved once per step until it fits."""
    engine = sharded(precision=torch.float16)
    before, scales, untouched = whole(engine), [], []
    engine.scale.value = 2.0**24
    step = sharp(engine, SAM(0.1))
    for _ in range(12):
        result = train(step, rank, world_size, numbers=[0])[0]
        scales.append(result.loss_scale)
        untouched.append(result.skipped == same(whole(engine), before))
        if not result.skipped:
            break
    return scales, all(untouched), result.skipped


def other_optimizers(rank, world_size):
    """Those that look at whole tensors, as LAMB at their norms, see them whole."""
    distances = {}
    for name in ("adamw", "lamb", "adafactor"):
        make = timm_optimizer(name)
        engine = sharded(optimizer=make)
        train(sharp(engine, SAM(0.1)), rank, world_size)
        distances[name] = far(whole(engine), one_process(SAM(0.1), optimizer=make))
    return distances


def round_trip(rank, world_size):
    """Save, load into another network that has already been used, go on: bit for bit."""
    outcome = []
    for make in (make_optimizer, *map(timm_optimizer, ("adamw", "adafactor"))):
        engine = sharded(make_network(norm=True), torch.float16, make)
        engine.scale.value = 2.0**12
        train(sharp(engine, SAM(0.1)), rank, world_size)
        file = io.BytesIO()
        torch.save(engine.local_state(), file)
        train(sharp(engine, SAM(0.1)), rank, world_size)
        file.seek(0)
        state = torch.load(file, weights_only=True)

        other = sharded(make_network(norm=True), torch.float16, make)
        train(sharp(other, SAM(0.3)), rank, world_size, numbers=[7])
        evaluate(other)  # leaves the root gathered, as it was before loading
        other.load_local_state(state)
        train(sharp(other, SAM(0.1)), rank, world_size)
        own = {n: w.to_local().shape for n, w in engine.weights.items()}
        only = {n: w.shape for n, w in state["weights"].items()} == own
        outcome.append((same(whole(engine), whole(other)), other.loss_scale, only))
    state["layout"]["rank"] = 7
    return outcome, message(lambda: other.load_local_state(state))


def evaluate(engine):
    engine.module.eval()
    with torch.no_grad():
        output = engine.inference(make_batch(9)[0])
    engine.module.train()
    return output


def evaluation(rank, world_size):
    """It changes nothing, and what follows sees it as of now."""
    engine, quiet = sharded(), sharded()
    step, outputs = sharp(engine, SAM(0.1)), []
    for number in range(STEPS):
        outputs.append(evaluate(engine))
        train(step, rank, world_size, numbers=[number])
    train(sharp(quiet, SAM(0.1)), rank, world_size)
    now = make_network()
    now.load_state_dict(whole(engine))
    right = torch.allclose(evaluate(engine), now.eval()(make_batch(9)[0]), atol=1e-6)
    return same(whole(engine), whole(quiet)), right, not torch.equal(outputs[0], outputs[1])


def weights_by_name(rank, world_size):
    network = make_network(norm=True)
    names = list(network.state_dict())
    if rank == 1:
        nn.init.zeros_(network[0].weight)  # rank 0's count
    engine = sharded(network)
    weights = engine.full_weights()
    expected = make_network(norm=True).state_dict()
    return list(weights) == names * (rank == 0), all(
        torch.equal(weights[n], expected[n]) for n in weights
    )


def channels_last(rank, world_size):
    def network():
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GELU(), nn.Conv2d(8, 16, 1), nn.Flatten())
        return nn.Sequential(nn.Unflatten(1, (2, 1, 3)), nn.ZeroPad2d(1), stem, nn.LazyLinear(5))

    engines = []
    for lay_out in (torch.channels_last, torch.contiguous_format):
        plain = network()
        plain(make_batch(0)[0])
        engines.append(sharded(plain.to(memory_format=lay_out)))
        train(sharp(engines[-1], SAM(0.1)), rank, world_size)
    return far(*map(whole, engines))


def message(work) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(rank, world_size):
    engine = sharded()
    stale = make_network()
    optimizer = make_optimizer(stale)
    model = shard(stale, CPU, smallest_block=100)
    return {
        "rank": message(lambda: sharp(engine, SAM(0.1), scope="rank")),
        "micro": message(lambda: sharp(engine, SAM(0.1), per_micro_batch=True)),
        "stale": message(lambda: ShardedEngine(model, optimizer)),
        "plain": message(lambda: ShardedEngine(make_network(), optimizer)),
        "groups": message(lambda: shard(make_network(), CPU, ranks_per_group=3)),
        "whole": message(engine.whole_weights),
    }


ON_TWO = [
    trained, rho_zero, as_ddp, a_block_without_a_second_gradient, exceptions, bad_passes, clipped,
    low_precision, overflow, other_optimizers, round_trip, evaluation, weights_by_name,
    channels_last, refusals,
]  # fmt: skip


@pytest.fixture(scope="module")
def two():
    return on_ranks(2, run_checks, ON_TWO)


def assert_equals_the_reference(outcomes):
    for (rule, micro_batches), (weights, results, bits) in outcomes[0].items():
        if rule in ("asam", "looksam"):
            expected = list(one_process(RULES[rule]).values())
        else:
            expected = reference(RULES[rule])
        assert largest_difference(list(weights.values()), expected) < CLOSE, (rule, micro_batches)
        for outcome in outcomes[1:]:
            full, others, other_bits = outcome[rule, micro_batches]
            assert full == {}, "the whole is rank 0's alone"
            assert others == results, "ranks must report the same"
            assert other_bits == bits, "ranks must gather the same"


def test_two_ranks_equal_the_reference(two):
    assert_equals_the_reference([outcome["trained"] for outcome in two])


def test_rho_zero_is_the_plain_step_bit_for_bit(two):
    assert [outcome["rho_zero"] for outcome in two] == [(True, True)] * 2


def test_batch_norm_counts_once_and_dropout_is_replayed_as_under_ddp(two):
    for outcome in two:
        weights, full, same_stream, count = outcome["as_ddp"]
        assert weights < CLOSE
        assert full < CLOSE
        assert same_stream
        assert count == STEPS * 2


def test_frozen_and_unused_parameters(two):
    for outcome in two:
        kept, distance, frozen = outcome["a_block_without_a_second_gradient"]
        assert kept
        assert distance < CLOSE
        assert frozen


def test_an_exception_leaves_weights_restored_and_the_engine_usable(two):
    for outcome in two:
        assert outcome["exceptions"] == [(True, True, True, True)] * 6


def test_a_non_finite_value_on_one_rank_skips_the_step_on_all(two):
    for outcome in two:
        assert outcome["bad_passes"] == [(True, True, True)] * 2


def test_clipping(two):
    for outcome in two:
        distances, norm = outcome["clipped"]
        assert max(distances) < CLOSE
        assert norm > 0.1, "of the gradient before clipping"


def test_low_precision_copies_are_made_of_master_plus_perturbation(two):
    for outcome in two:
        for made, lost, moved, effective, norm_in_fp32, master, distance in outcome[
            "low_precision"
        ].values():
            assert made == [True, True]
            assert not lost
            assert moved == pytest.approx(0.1, rel=1e-5)
            assert effective == pytest.approx(0.1, rel=0.2)
            assert norm_in_fp32
            assert master
            assert distance < 0.01


def test_fp16_overflow_halves_the_scale_once_a_step(two):
    for outcome in two:
        scales, untouched, still = outcome["overflow"]
        assert scales[:-1] == [2.0 ** (23 - i) for i in range(len(scales) - 1)]
        assert len(scales) > 1
        assert untouched
        assert not still


def test_other_optimizers(two):
    for outcome in two:
        assert max(outcome["other_optimizers"].values()) < CLOSE


def test_a_state_goes_on_bit_for_bit(two):
    for outcome in two:
        trips, refused = outcome["round_trip"]
        assert trips == [(True, 2.0**12, True)] * 3
        assert "start from the full weights" in refused


def test_evaluation_between_steps(two):
    assert [outcome["evaluation"] for outcome in two] == [(True, True, True)] * 2


def test_weights_by_name_begin_as_rank_0s(two):
    assert [outcome["weights_by_name"] for outcome in two] == [(True, True)] * 2


def test_other_memory_formats_are_sharded(two):
    assert all(outcome["channels_last"] < CLOSE for outcome in two)


def test_what_cannot_be_is_refused_with_a_way_out(two):
    refused = two[0]["refusals"]
    assert "gather theirs from each other's shards; use scope 'global'" in refused["rank"]
    assert "use DDP, or perturb once per step" in refused["micro"]
    assert "build it after shard()" in refused["stale"]
    assert "every parameter is sharded" in refused["plain"]
    assert refused["groups"] == "groups of 3 ranks do not divide the 2 ranks that run"
    assert "whole weights" in refused["whole"]


# Four ranks


def one_of_four(rank, world_size):
    """5 rows over 4 ranks: shards of 2, 2, 1 and none."""
    return trained(rank, world_size, [("sam", 2)])


def groups(rank, world_size):
    """Sharded over 2 and 2: perturbed by groups, or for all; both step by step."""
    outcome = {}
    for scope in (2, "global"):
        engine = sharded(group=2)
        step = sharp(engine, SAM(0.1), scope=scope, clip_norm=10.0)
        bits, results = [], []
        for number in range(STEPS):
            results += train(step, rank, world_size, 2, [number], measure=True)
            bits.append(torch.cat([w.flatten() for w in whole(engine).values()]).numpy().tobytes())
        outcome[scope] = list(whole(engine).values()), bits, results
    outcome["other"] = message(lambda: sharp(engine, SAM(0.1), scope=2))
    outcome["rank"] = message(lambda: sharp(sharded(group=2), SAM(0.1), scope="rank"))
    return outcome


def bad_group(rank, world_size):
    """A value that is not finite in one group stops the other as well."""
    engine = sharded(group=2)
    before = whole(engine)
    engine.module[4].register_forward_hook(
        lambda module, args, output: output * math.inf if rank == 3 else output
    )
    step = sharp(engine, SAM(0.1), scope=2)
    skipped = train(step, rank, world_size, numbers=[0])[0].skipped
    return skipped, same(whole(engine), before)


@pytest.fixture(scope="module")
def four():
    return on_ranks(4, run_checks, [one_of_four, groups, bad_group])


def test_four_ranks_equal_the_reference(four):
    assert_equals_the_reference([outcome["one_of_four"] for outcome in four])


def test_groups_perturb_by_themselves_and_stay_replicas(four):
    by_group, everyone = reference(SAM(0.1), "rank", 2), reference(SAM(0.1))
    assert largest_difference(by_group, everyone) > 100 * CLOSE
    for outcome in four:
        found = outcome["groups"]
        for scope, expected in ((2, by_group), ("global", everyone)):
            weights, bits, results = found[scope]
            assert largest_difference(weights, expected) < CLOSE
            assert bits == four[0]["groups"][scope][1], "replicas must hold the same bits"
            assert results == four[0]["groups"][scope][2], "ranks must report the same"
            assert results[0].effective_rho == pytest.approx(0.1, rel=1e-4)
        assert "already perturbs in scope 'global'" in found["other"]
        assert "2 ranks gather theirs" in found["rank"]
        assert outcome["bad_group"] == (True, True)


# All of it


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rule_and_accumulation(world_size):
    outcomes = on_ranks(world_size, run_checks, [trained_everything])
    assert_equals_the_reference([outcome["trained_everything"] for outcome in outcomes])


@pytest.mark.exhaustive
def test_checks_of_two_hold_on_four():
    checks = [rho_zero, as_ddp, a_block_without_a_second_gradient, exceptions, evaluation]
    for outcome in on_ranks(4, run_checks, checks):
        assert outcome["rho_zero"] == (True, True)
        assert outcome["as_ddp"][0] < CLOSE
        assert outcome["a_block_without_a_second_gradient"][1] < CLOSE
        assert outcome["exceptions"] == [(True, True, True, True)] * 6
        assert outcome["evaluation"] == (True, True, True)


@pytest.mark.exhaustive
def test_the_launcher_starts_two_processes(tmp_path):
    script = tmp_path / "script.py"
    names = "RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP", "FSDP_VERSION"
    script.write_text(f"import os; print('found', *[os.environ[n] for n in {names}])")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    file = Path(__file__).parents[2] / "configs" / "accelerate" / "cpu_fsdp2.yaml"
    done = subprocess.run(
        [*command, "--config_file", str(file), str(script)],
        capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for rank in "01":
        assert f"found {rank} 2 true 2" in done.stdout
