"""What only DeepSpeed's ZeRO has: a master in parts beside the weights that are used."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from flatcal_dist.sharpness import SAM, LookSAM, SharpnessAwareStep
from flatcal_dist.sharpness.engines.zero.start import RunningStatisticsInFp32
from tests.sharpness.test_precision import wide_network
from tests.sharpness.test_restore import Spoiled, raise_error
from tests.support.engines import MOST_ZERO, ZERO, make_engine, used
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, RULES, bits, far, reference, train

RHO = 0.002  # in bf16: a tenth of the spacing of the numbers that most weights are


def moves(rank, world_size, kind):
    """bf16: the move against e, by the weights that are used; then training against fp32."""
    seen: list[torch.Tensor] = []
    engine = make_engine(kind, wide_network(), torch.bfloat16)
    moved = engine.moved

    @contextmanager
    def watched(shards):
        wanted = [e.clone() for e in shards.gradients]
        with moved(shards) as displacement:
            for part, e in zip(engine.layout.parts, wanted, strict=True):
                move = part.used.float() - part.master.bfloat16().float()
                seen.append(torch.stack([(move * e).sum(), e.square().sum()]))
            yield displacement

    engine.moved = watched
    results = train(SharpnessAwareStep(engine, SAM(RHO)), rank, world_size, 2, measure=True)
    return torch.stack(seen).sum(0), results, engine.full_weights(), bits(used(engine))


@pytest.mark.parametrize("kind", ZERO)
def test_bf16_weights_are_built_from_the_master_and_the_perturbation(kind):
    """Of e, most of which is below the spacing of bf16, all must be there on average."""
    outcomes = on_ranks(2, moves, kind)
    projected, wanted = sum(outcome[0] for outcome in outcomes)
    assert 0.8 < projected / wanted < 1.2
    _, results, weights, _ = outcomes[0]
    assert all(1 < result.effective_rho / RHO < 10 for result in results), "with the noise"
    assert all(result.cosine > 0.5 for result in results), "the cosine is that of e"
    assert far(weights, reference(SAM(RHO), network=wide_network)[0]) < 2e-3
    assert outcomes[0][3] == outcomes[1][3], "the same bits on all ranks"


def clipped(rank, world_size, kind):
    """LookSAM changes gradients by hand: what DeepSpeed clips by must have seen it."""
    engine = make_engine(kind, wide_network(), torch.bfloat16, clip_norm=0.05)
    rule = LookSAM(0.1, every=2, alpha=3.0)
    train(SharpnessAwareStep(engine, rule, clip_norm=0.05), rank, world_size)
    return engine.full_weights()


def test_in_bf16_all_stages_clip_alike():
    """Stage 1 in bf16 is a class of its own, which keeps a gradient beside that of the others."""
    first, second, third = (on_ranks(2, clipped, kind)[0] for kind in ZERO)
    assert far(first, third) < CLOSE
    assert far(second, third) < CLOSE


def gathers(rank, world_size, kind):
    """Collectives of the weights in a step that fails on this rank."""
    engine = make_engine(kind, Spoiled(wide_network(), 2, raise_error))
    seen, publish = [], engine.layout.publish
    engine.layout.publish = lambda: (seen.append(1), publish())
    with pytest.raises(RuntimeError):
        train(SharpnessAwareStep(engine, SAM(0.5)), rank, world_size, numbers=[0])
    return len(seen)


@pytest.mark.parametrize("kind", ZERO)
def test_an_exception_gathers_nothing_on_its_way_out(kind):
    """The others may not be there: one gather to perturb, none to restore."""
    assert on_ranks(2, gathers, kind) == [1, 1]


def alone(rank, world_size, kind):
    engine = make_engine(kind)
    train(SharpnessAwareStep(engine, RULES["csam"]), rank, world_size)
    return engine.full_weights()


@pytest.mark.parametrize("kind", MOST_ZERO)
def test_one_process_needs_no_launcher(kind):
    assert far(on_ranks(1, alone, kind)[0], reference(RULES["csam"])[0]) < CLOSE


def test_running_statistics_do_not_stop_short():
    """In bf16 itself, 0.1 of a difference of a percent is rounded away."""
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
