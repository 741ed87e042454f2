"""Autocast, bf16 and fp16: the perturbation arrives; a loss scale changes nothing but itself."""

import math

import pytest
import torch
from torch import nn

from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from flatcal_dist.sharpness.engines.loss_scale import LossScale
from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine
from tests.support.engines import MOST_ZERO, UNLIKE, ZERO, everywhere, make_engine, saved, used
from tests.support.ranks import on_ranks
from tests.support.reference import (
    NEW,
    RULES,
    STEPS,
    bits,
    far,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    network_of,
    reference,
    train,
)


def wide_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 5))


class Autocast(nn.Module):
    """A network as a user writes it for mixed precision."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x):
        with torch.autocast("cpu", self.dtype):
            return self.network(x)


# Autocast


def through_autocast(rank, world_size, kind):
    """The largest change of a logit from pass to pass, with and without a block around all."""
    changes = []
    for outer in (False, True):
        network, logits = Autocast(make_network()), []
        network.register_forward_hook(
            lambda m, a, output, seen=logits: seen.append(output.detach())
        )
        step = SharpnessAwareStep(make_engine(kind, network), SAM(0.5))
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            train(step, rank, world_size, numbers=[0])
        changes.append(float((logits[1].float() - logits[0].float()).abs().max()))
    return changes


@pytest.mark.parametrize("kind", UNLIKE)
def test_the_perturbation_is_seen_through_autocast(kind):
    """Autocast keeps low-precision copies of the weights until its outermost block ends."""
    for changes in everywhere(kind, through_autocast):
        assert min(changes) > 0.1
        assert changes[0] == pytest.approx(changes[1], rel=0.1)


def test_a_perturbation_lost_in_rounding_is_seen():
    """bfloat16 keeps 8 bits: of e at a thousandth of a weight's last bit, nothing arrives."""
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network), compute_dtype=torch.bfloat16)
    small = SharpnessAwareStep(engine, SAM(1e-7))([make_batch(0)], measure=True)
    large = SharpnessAwareStep(engine, SAM(0.5))([make_batch(0)], measure=True)
    assert small.effective_rho == 0 or abs(small.effective_rho / 1e-7 - 1) > 0.5
    assert small.seen_cosine < 0.2
    assert large.effective_rho == pytest.approx(0.5, rel=0.05)
    assert large.seen_along == pytest.approx(0.5, rel=0.05)
    assert large.seen_cosine > 0.95


# bf16 with a master in fp32


def low_precision(rank, world_size, kind):
    """Against fp32: weights after training; what norms compute with; what is reported."""
    network = make_network(norm=True)
    engine = make_engine(kind, network, torch.bfloat16)
    results = train(SharpnessAwareStep(engine, SAM(0.1)), rank, world_size, 2, measure=True)
    statistics = {b.dtype for b in network[1].buffers() if b.is_floating_point()}
    engine.inference.eval()
    with torch.no_grad():
        logits = engine.inference(make_batch(9)[0])
    held = {n: w for n, w in used(engine).items() if n in dict(network.named_parameters())}
    return engine.full_weights(), results, statistics, logits, bits(held)


@pytest.mark.parametrize("kind", [*ZERO, "fsdp2"])
def test_bf16_trains_as_fp32_does(kind):
    """bf16 has 8 bits: a logit is off by percents, weights by less; statistics stay in fp32."""
    outcomes = on_ranks(2, low_precision, kind)
    weights, results, statistics, logits, _ = outcomes[0]
    expected = reference(SAM(0.1), 2, micro_batches=2, network=norm_network)[0]
    assert far(weights, expected) < 0.03
    assert all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())
    assert weights["1.num_batches_tracked"] == 2 * STEPS
    assert statistics == {torch.float32}
    exact = norm_network()
    exact.load_state_dict(weights)
    assert logits.dtype == torch.float32
    assert (logits - exact.eval()(make_batch(9)[0])).abs().max() < 0.05 * logits.abs().max()
    assert all(0.8 < result.effective_rho / 0.1 < 1.5 for result in results)
    assert all(result.cosine > 0.5 for result in results)
    assert outcomes[0][4] == outcomes[1][4], "the same bits on all ranks"


def norm_network() -> nn.Module:
    return make_network(norm=True)


# fp16 with a scaled loss


def fp16_engine(kind: str, network: nn.Module, scale: float):
    """DeepSpeed offers fp16 on some processors only; torch runs it on all, slowly."""
    import deepspeed

    accelerator = deepspeed.get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    engine = make_engine(kind, network, torch.float16)
    del accelerator.is_fp16_supported
    set_scale(engine, scale)
    return engine


def set_scale(engine, scale: float) -> None:
    if isinstance(engine, ZeroEngine):
        engine.scaler.cur_scale = scale
    else:
        engine.scale.value = scale


class Spoiled(nn.Module):
    """Infinite on the last rank in its `when`th forward pass."""

    def __init__(self, network: nn.Module, when: int, last: bool):
        super().__init__()
        self.network, self.when, self.last, self.calls = network, when, last, 0

    def forward(self, x):
        self.calls += 1
        output = self.network(x)
        return output * math.inf if self.last and self.calls == self.when else output


def overflows(rank, world_size, kind, autocast):
    """Infinite in either pass; then good steps, and what fp32 makes of them."""
    outcome = []
    for when in (1, 2):
        inner = Autocast(wide_network(), torch.float16) if autocast else wide_network()
        engine = fp16_engine(kind, Spoiled(inner, when, rank == world_size - 1), 2.0**10)
        before, state = bits(used(engine)), saved_without_scale(engine)
        step = SharpnessAwareStep(engine, SAM(0.02))
        [bad] = train(step, rank, world_size, 2, [0])
        same = bits(used(engine)) == before and saved_without_scale(engine) == state
        results = train(step, rank, world_size, 2, measure=True)
        weights = {n.split("network.")[-1]: w for n, w in engine.full_weights().items()}
        outcome.append((bad.skipped, same, bad.loss_scale, results, weights))
    return outcome


def saved_without_scale(engine) -> bytes:
    return saved(engine)  # tensors only: the scale is a number


@pytest.mark.parametrize("kind", UNLIKE)
def test_an_overflow_on_one_rank_skips_on_all_and_halves_the_scale_once(kind):
    expected = reference(SAM(0.02), network=wide_network)[0]
    for rank, outcome in enumerate(everywhere(kind, overflows, kind in ("one", "ddp"))):
        for skipped, same, scale, results, weights in outcome:
            assert skipped
            assert same
            assert scale == 2.0**9, "halved, once"
            assert not any(result.skipped for result in results)
            assert all(result.loss_scale == 2.0**9 for result in results)
            assert all(0.5 < result.effective_rho / 0.02 < 2 for result in results)
            if rank == 0:
                assert far(weights, expected) < 3e-3, "11 bits"


def too_large(rank, world_size, kind):
    """A scale that is too large at first: halved once per step until gradients fit."""
    network = Autocast(make_network(), torch.float16) if kind in ("one", "ddp") else make_network()
    engine = fp16_engine(kind, network, 2.0**24)
    before, scales, untouched = bits(used(engine)), [], []
    step = SharpnessAwareStep(engine, SAM(0.1))
    for _ in range(14):
        [result] = train(step, rank, world_size, numbers=[0])
        scales.append(result.loss_scale)
        untouched.append(result.skipped == (bits(used(engine)) == before))
        if not result.skipped:
            break
    return scales, all(untouched), result.skipped


@pytest.mark.parametrize("kind", UNLIKE)
def test_the_scale_is_halved_once_a_step_until_it_fits(kind):
    for scales, untouched, still in everywhere(kind, too_large):
        assert scales[:-1] == [2.0 ** (23 - i) for i in range(len(scales) - 1)]
        assert len(scales) > 2
        assert untouched
        assert not still


def scaled(rank, world_size, kind):
    """fp32 passes; by rule, losses scaled by 1, by 2^16, and by another number in each step."""
    outcome = {}
    for name in ("sam", "looksam", "momentum_sam", *NEW):
        ends = []
        for scales in (
            [1.0] * STEPS,
            [2.0**16] * STEPS,
            [2.0 ** (12 - 3 * i) for i in range(STEPS)],
        ):
            engine = make_engine(kind, network_of(RULES[name]))
            engine.scale = LossScale(True, 1.0)
            step = SharpnessAwareStep(engine, RULES[name], clip_norm=0.5)
            results = []
            for number, scale in enumerate(scales):
                engine.scale.value = scale
                results += train(step, rank, world_size, 2, [number], measure=True)
            norms = [(r.gradient_norm, r.ascent_gradient_norm, r.cosine, r.loss) for r in results]
            remembered = {} if name == "looksam" else step.memory or {}  # it goes by direction
            ends.append((bits(used(engine)), bits(dict(sorted(remembered.items()))), norms))
        outcome[name] = ends
    return outcome


@pytest.mark.parametrize(
    "kind", ["one", "ddp", pytest.param("fsdp2", marks=pytest.mark.exhaustive)]
)
def test_the_loss_scale_changes_no_bit(kind):
    """ZeRO's passes with a scale are in fp16, where its size does change the rounding."""
    for outcome in everywhere(kind, scaled):
        for name, (one, large, changing) in outcome.items():
            assert one == large, name
            assert one == changing, name


def remembers_in_fp16(rank, world_size, kind):
    """The scale falls from step to step."""
    outcome = {}
    for name in ("wsam", "friendly_sam", "stale_sam", "le_sam"):
        engine = fp16_engine(kind, wide_network(), 2.0**10)
        step = SharpnessAwareStep(engine, RULES[name])
        skipped = []
        for number in range(STEPS):
            set_scale(engine, 2.0 ** (10 - 2 * number))
            skipped += [result.skipped for result in train(step, rank, world_size, 2, [number])]
        outcome[name] = any(skipped), engine.full_weights()
    return outcome


@pytest.mark.parametrize("kind", ZERO)
def test_under_zero_rules_remember_nothing_of_the_scale(kind):
    """With it, what is remembered would outweigh all else: off by a hundredth and more."""
    for name, (skipped, weights) in on_ranks(2, remembers_in_fp16, kind)[0].items():
        assert not skipped
        assert far(weights, reference(RULES[name], network=wide_network)[0]) < 3e-3, name


def test_the_scale_grows_by_steps_and_not_by_passes(monkeypatch):
    monkeypatch.setattr("flatcal_dist.sharpness.engines.loss_scale.GROWTH_INTERVAL", 3)
    network = make_network()
    engine = ReplicatedEngine(network, make_optimizer(network), compute_dtype=torch.float16)
    step = SharpnessAwareStep(engine, SAM(0.1))
    scales = [step([make_batch(0)]).loss_scale / 2**16 for _ in range(7)]
    assert scales == [1, 1, 2, 2, 2, 4, 4]


def grows(rank, world_size, kind):
    """A window of three steps, of two micro-batches each; DeepSpeed begins to count at one."""
    engine = fp16_engine(kind, make_network(), 4.0)
    if isinstance(engine, ZeroEngine):
        engine.scaler.scale_window = 3
    step = SharpnessAwareStep(engine, SAM(0.1))
    return [step(my_part(rank, world_size, 0, 2)).loss_scale for _ in range(7)]


@pytest.mark.parametrize("kind", MOST_ZERO)
def test_under_zero_the_scale_grows_by_steps_too(kind):
    assert on_ranks(2, grows, kind) == [[4, 4, 4, 8, 8, 8, 16]] * 2


def what_passes_see(rank, world_size):
    """FSDP2: the gathered weight of each pass, and the shards it should have been made from."""
    outcome = {}
    for precision in (torch.bfloat16, torch.float16):
        engine = make_engine("fsdp2", norm_network(), precision)
        engine.scale.value = 2.0**8
        before, shards, weights, norms = used(engine), [], [], []
        engine.module.register_forward_pre_hook(lambda *_, s=shards, e=engine: s.append(used(e)))
        head, norm = engine.module[-1], engine.module[1]  # of the root: whole in these hooks
        head.register_forward_hook(lambda m, *_, w=weights: w.append(m.weight.detach().clone()))
        norm.register_forward_hook(lambda m, *_, n=norms: n.append(m.weight.dtype))
        [result] = train(SharpnessAwareStep(engine, SAM(0.5)), rank, world_size, numbers=[0])
        assert not result.skipped
        made = [
            torch.equal(w, s["5.weight"].to(precision))
            for w, s in zip(weights, shards, strict=True)
        ]
        moved = [shards[1][n] - before[n] for n in engine.weights]
        length = float(nn.utils.get_total_norm(moved))
        outcome[precision] = made, torch.equal(*weights), length, set(norms)
    return outcome


def test_fsdp2_gathers_low_precision_copies_of_master_plus_perturbation():
    for outcome in on_ranks(2, what_passes_see):
        for made, lost, length, norms in outcome.values():
            assert made == [True, True]
            assert not lost
            assert length == pytest.approx(0.5, rel=1e-5)
            assert norms == {torch.float32}
