"""Buffers keep what they are: their tensors, memory and values, on one rank and on many."""

import pytest
import torch
from torch import nn

from tests.support.engines import MOST_ENGINES, everywhere, make_engine, used
from tests.support.ranks import on_ranks
from tests.support.reference import make_network

LAYOUTS = {
    "dense": lambda: torch.arange(6.0),
    "a number": lambda: torch.tensor(3),
    "empty": lambda: torch.zeros(0, 3),
    "expanded": lambda: torch.arange(3.0)[:, None].expand(3, 4),
    "expanded number": lambda: torch.ones(()).expand(5),
    "sliced": lambda: torch.arange(12.0).view(6, 2)[:, 1],
    "reversed order": lambda: torch.arange(6.0).view(2, 3).T,
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "windows": lambda: torch.arange(8.0).unfold(0, 3, 1),
    "boolean": lambda: torch.tensor([True, False])[:, None].expand(2, 2),
    "complex": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "half": lambda: torch.rand(3).half(),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_state_comes_back(layout):
    """After changes in memory, of shape, and of the name's tensor."""
    from flatcal_dist.sharpness.passes.buffers import BufferState, distinct_memory

    module = nn.Module()
    module.register_buffer("b", LAYOUTS[layout]())
    module.register_buffer("nothing", None)
    buffer, value = module.b, module.b.to_dense().clone()
    state = BufferState([module])
    if buffer.layout == torch.strided:
        distinct_memory(buffer).logical_not_()
        if buffer.numel():
            assert not torch.equal(module.b, value)
    else:
        buffer.mul_(7)
    module.b = torch.ones(2, 2)
    module.nothing = torch.ones(3)
    module.register_buffer("new", torch.ones(1))
    state.restore()
    assert module.b is buffer
    assert torch.equal(module.b.to_dense(), value)
    assert module._buffers.keys() == {"b", "nothing"}
    assert module.nothing is None
    if buffer.layout == torch.strided and not buffer.is_conj():
        module.b.data = torch.ones(9, dtype=buffer.dtype)
        state.restore()
        assert module.b.stride() == LAYOUTS[layout]().stride()
        assert torch.equal(module.b, value)


def synchronized(rank, world_size, kind):
    """Buffers that differ between ranks in values, shape, layout, and in whether they are there."""
    torch.manual_seed(rank)
    network = make_network(norm=True)
    engine = make_engine(kind, network)
    odd = nn.Module()
    for number, make in enumerate(LAYOUTS.values()):
        odd.register_buffer(f"b{number}", make() if rank == 0 else make() * 0)
    guard = torch.full((4, 4), 7.0)  # what lies beside an expanded buffer
    one = guard[1, :1] if rank else torch.ones(1)
    odd.register_buffer("guarded", one.expand(4))
    odd.register_buffer("here", torch.ones(2) if rank == 0 else None)
    odd.register_buffer("elsewhere", None if rank == 0 else torch.ones(2))
    odd.register_buffer("rows", torch.rand(2 + rank, 3))
    engine.module.add_module("odd", odd)
    engine.synchronize_buffers()
    rest = torch.cat([guard[0], guard[1, 1:], guard[2:].flatten()])
    assert (rest == 7).all(), "memory that is not the buffer's is left alone"
    return {n: b.to_dense().clone() for n, b in odd.named_buffers()}


@pytest.mark.parametrize("kind", MOST_ENGINES)
def test_all_ranks_get_the_buffers_of_the_first(kind):
    first, second = on_ranks(2, synchronized, kind)
    assert first.keys() == second.keys()
    assert "here" in second
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def spoiled(rank, world_size, kind):
    """Whether a step of NaN is skipped, and each buffer the same tensor with the same values."""
    from flatcal_dist.sharpness import SAM, SharpnessAwareStep
    from tests.support import zoo
    from tests.support.reference import my_part, train

    outcome = {}
    for name in ("rebound", "starts as None"):
        for rule in (None, SAM(0.1)):
            network, batch = zoo.make(name), zoo.batches(name)
            step = SharpnessAwareStep(make_engine(kind, network), rule)
            last = rank == world_size - 1
            for counted in range(2):  # before any step has counted, and after one
                before = dict(network[1]._buffers)
                values = {n: b if b is None else b.clone() for n, b in before.items()}
                [(inputs, target)] = my_part(rank, world_size, 5, batch=batch)
                result = step([(inputs * float("nan") if last else inputs, target)])
                now = network[1]._buffers
                same = now.keys() == before.keys() and all(
                    now[n] is b and (b is None or torch.equal(b, values[n]))
                    for n, b in before.items()
                )
                outcome[name, rule, counted] = result.skipped and same
                train(step, rank, world_size, numbers=[0], batch=batch)
            assert network[1].mean.isfinite().all()
            assert network[1].mean.count_nonzero(), "steps that count change it"
    return outcome


@pytest.mark.parametrize("kind", ["one", "ddp"])
def test_a_skipped_step_leaves_rebound_buffers_as_before(kind):
    for outcome in everywhere(kind, spoiled):
        assert len(outcome) == 8
        assert [case for case, same in outcome.items() if not same] == []


def continued(rank, world_size, kind):
    """A state with buffers that were None, or of another shape, at the start."""
    from flatcal_dist.sharpness import SAM, SharpnessAwareStep
    from tests.support import zoo
    from tests.support.reference import bits, train

    same = []
    for name in ("starts as None", "grows"):
        ends = []
        for resumed in (False, True):
            engine = make_engine(kind, zoo.make(name))
            step = SharpnessAwareStep(engine, SAM(0.1))
            train(step, rank, world_size, numbers=[0, 1], batch=zoo.batches(name))
            if resumed:
                state = engine.local_state()
                engine = make_engine(kind, zoo.make(name))
                engine.load_local_state(state)
                step = SharpnessAwareStep(engine, SAM(0.1))
            train(step, rank, world_size, numbers=[2], batch=zoo.batches(name))
            ends.append(bits(used(engine)))
        same.append(ends[0] == ends[1])
    return same


@pytest.mark.parametrize("kind", ["ddp", "zero2", "fsdp2"])
def test_a_state_goes_on_with_buffers_that_changed_their_shape(kind):
    assert on_ranks(2, continued, kind) == [[True, True]] * 2
