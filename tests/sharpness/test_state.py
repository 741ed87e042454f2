"""What is saved goes on bit for bit; where ranks begin; what optimizers count."""

import io

import pytest
import torch
from torch import nn

from flatcal_dist.sharpness import SAM, FriendlySAM, LookSAM, MomentumSAM, SharpnessAwareStep
from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine
from tests.support.engines import (
    MOST_ENGINES,
    MOST_ZERO,
    UNLIKE,
    everywhere,
    make_engine,
    saved,
    tensors_of,
    used,
)
from tests.support.ranks import on_ranks
from tests.support.reference import RULES, bits, make_network, make_optimizer, train


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=1e-2)


def adafactor(network: nn.Module) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(network.parameters(), opt="adafactor", lr=1e-2)


def variants(kind: str) -> list:
    look = LookSAM(0.1, every=2)
    cases = [(torch.float32, make_optimizer, look), (torch.bfloat16, adamw, look)]
    cases += [(torch.float32, make_optimizer, RULES[n]) for n in ("friendly_sam", "stale_sam")]
    if kind == "fsdp2":
        cases += [(torch.float16, adafactor, look), (torch.float16, adamw, RULES["friendly_sam"])]
    return cases


def round_trips(rank, world_size, kind):
    """Two steps, a checkpoint, two more; and those two by others that loaded the checkpoint."""
    outcome = []
    for precision, make, rule in variants(kind):
        engine = make_engine(kind, make_network(norm=True), precision, make)
        if precision == torch.float16:
            engine.scale.value = 2.0**12
        step = SharpnessAwareStep(engine, rule)
        train(step, rank, world_size, numbers=[0, 1, 2])  # in the midst of LookSAM's period
        file = io.BytesIO()
        torch.save((engine.local_state(), step.state_dict()), file)
        train(step, rank, world_size, numbers=[3, 4])

        torch.manual_seed(7)
        network = make_network(norm=True)
        for weight in network.parameters():
            nn.init.normal_(weight)
        other = make_engine(kind, network, precision, make)
        other_step = SharpnessAwareStep(other, rule)
        train(other_step, rank, world_size, numbers=[7])
        file.seek(0)
        state, of_step = torch.load(file, weights_only=True)
        other.load_local_state(state)
        other_step.load_state_dict(of_step)
        train(other_step, rank, world_size, numbers=[3, 4])
        same = bits(used(engine)) == bits(used(other)) and saved(engine) == saved(other)
        outcome.append((same, other.loss_scale == engine.loss_scale, size(state)))
    return outcome


def size(state) -> int:
    """Elements of the state, without buffers and numbers."""
    parts = [part for name, part in state.items() if name not in ("buffers", "frozen", "layout")]
    return sum(t.numel() for t in tensors_of(parts) if t.dim())


@pytest.mark.parametrize("kind", UNLIKE)
def test_a_state_goes_on_bit_for_bit(kind):
    """Weights, buffers, optimizer, loss scale, LookSAM's phase and what rules remember."""
    weights = sum(w.numel() for w in make_network(norm=True).parameters())
    shards = 1 if kind in ("one", "ddp") else 2
    for outcome in everywhere(kind, round_trips):
        assert all(same and scale for same, scale, _ in outcome)
        # Weights and SGD's momentum, or AdamW's two; padding; no copy for the perturbation.
        buffers = 34 if shards == 1 else 0
        assert outcome[0][2] <= 2 * (weights / shards + 20) + buffers
        assert outcome[1][2] <= 3 * (weights / shards + 20) + buffers


def while_perturbed(rank, world_size, kind):
    """What would be saved amid pass two."""
    network = make_network(norm=True)
    engine = make_engine(kind, network)
    step = SharpnessAwareStep(engine, SAM(0.5))
    calm, seen = engine.full_weights(), []
    network.register_forward_hook(lambda *_: seen.append(engine.full_weights()))
    train(step, rank, world_size, numbers=[0])
    names = [n for n, _ in network.named_parameters()]
    return len(seen), all(torch.equal(s[n], calm[n]) for s in seen for n in names if s)


@pytest.mark.parametrize("kind", MOST_ZERO)
def test_under_zero_full_weights_are_never_perturbed(kind):
    """They come from the master, even in the midst of a step."""
    assert on_ranks(2, while_perturbed, kind) == [(2, True)] * 2


def beginnings(rank, world_size, kind):
    """Ranks that begin with weights of their own."""
    outcome = []
    for precision in (torch.float32, torch.bfloat16):
        network = make_network(norm=True)
        with torch.no_grad():
            for tensor in (*network.parameters(), network[1].running_mean):
                tensor.add_(rank)
        engine = make_engine(kind, network, precision)
        engine.synchronize_buffers()
        outcome.append((bits(used(engine)), engine.full_weights()))
    return outcome


@pytest.mark.parametrize("kind", MOST_ENGINES)
def test_all_ranks_begin_with_the_weights_of_rank_0_not_rounded(kind):
    first, second = on_ranks(2, beginnings, kind)
    expected = make_network(norm=True).state_dict()
    for (ours, weights), (theirs, _) in zip(first, second, strict=True):
        assert ours == theirs
        assert list(weights) == list(expected)
        assert all(torch.equal(weights[n], expected[n]) for n in expected)


def counters(rank, world_size, kind):
    """AdamW's steps after five of ours, each of three micro-batches and one of them skipped."""
    engine = make_engine(kind, optimizer=adamw)
    step = SharpnessAwareStep(engine, SAM(0.1))
    train(step, rank, world_size, 3, range(2))
    handle = engine.module.register_forward_hook(lambda m, a, output: output * float("nan"))
    assert train(step, rank, world_size, 3, [2])[0].skipped
    handle.remove()
    train(step, rank, world_size, 3, range(3, 5))
    optimizer = engine.optimizer
    if isinstance(engine, ZeroEngine):
        with engine.layout.base_optimizer() as optimizer:
            pass
    return {float(state["step"]) for state in optimizer.state.values()}, step.taken


@pytest.mark.parametrize("kind", UNLIKE)
def test_the_optimizer_counts_one_step_a_batch(kind):
    assert everywhere(kind, counters) in ([({4.0}, 5)], [({4.0}, 5)] * 2)


def raises_a_hand(rank, world_size, kind):
    step = SharpnessAwareStep(make_engine(kind), SAM(0.1))
    return [train_one(step, rank, world_size, wish).stop for wish in (False, rank == 1)]


def train_one(step, rank, world_size, stop):
    from tests.support.reference import my_part

    return step(my_part(rank, world_size, 0), stop=stop)


@pytest.mark.parametrize("kind", MOST_ENGINES)
def test_a_raised_hand_is_seen_by_every_rank(kind):
    assert on_ranks(2, raises_a_hand, kind) == [[False, True]] * 2


def test_what_another_rule_or_network_remembers_is_refused():
    friendly = SharpnessAwareStep(make_engine("one"), FriendlySAM(0.1))
    train(friendly, 0, 1, numbers=[0])
    state = friendly.state_dict()
    other = SharpnessAwareStep(make_engine("one"), MomentumSAM(0.1))
    with pytest.raises(ValueError, match=r"what FriendlySAM remembers, .* nothing to MomentumSAM"):
        other.load_state_dict(state)
    assert other.memory is None
    small = SharpnessAwareStep(make_engine("one", nn.Linear(6, 5)), FriendlySAM(0.1))
    with pytest.raises(ValueError, match="of another network"):
        small.load_state_dict(state)
    again = SharpnessAwareStep(make_engine("one"), FriendlySAM(0.1))
    again.load_state_dict(state)
    del state["rule"]  # as written before rules were named
    again.load_state_dict(state)
    other.load_state_dict(state | {"memory": None, "rule": "FriendlySAM"})
