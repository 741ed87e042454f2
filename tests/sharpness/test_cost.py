"""What a step costs beside its passes: collectives, memory, graphs."""

import gc
import math
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from flatcal_dist.sharpness import (
    ASAM,
    CSAM,
    SAM,
    ReplicatedEngine,
    SharpnessAwareStep,
    rule_table,
)
from flatcal_dist.sharpness.engines.fsdp2.engine import ShardedEngine
from tests.support.engines import ENGINES, UNLIKE, ZERO, everywhere, make_engine
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLOSE,
    RULES,
    far,
    make_network,
    make_optimizer,
    my_part,
    reference,
    train,
)

# Collectives

WEIGHTS = 4 * sum(w.numel() for w in make_network().parameters())  # bytes
NORM = ("gloo:all_reduce", 4, "float")
SIZES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1}


def traffic(rank, world_size, kind, cases):
    """Name, bytes and type of each collective of the third step, by when all is in place."""
    counted = []
    for rule, scope in cases:
        step = SharpnessAwareStep(make_engine(kind), rule, scope=scope)
        for number in range(3):
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
                step(my_part(rank, world_size, number, 2), samples=24)
        events = profiler.profiler.kineto_results.events()
        counted.append(
            [
                (event.name(), math.prod(shape) * SIZES[kind_of], kind_of)
                for event in events
                if event.name().startswith("gloo:")
                for shape, kind_of in zip(event.shapes()[:1], event.dtypes()[:1], strict=True)
            ]
        )
    return counted


def apart(collectives) -> tuple[Counter, list]:
    """Those of weights and gradients; and the numbers that a step agrees on, float64 or one."""
    small = [c for c in collectives if c[2] == "double" or c[1] == 4]
    return Counter(c for c in collectives if c not in small), small


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2"])
def test_rank_scope_moves_the_gradient_bytes_of_plain_training(kind):
    """One gradient reduction, not two; and no reduction of numbers that plain steps have not."""
    cases = [(None, "global"), (SAM(0.1), "rank"), (CSAM(0.1), "rank"), (ASAM(0.5), "rank")]
    for plain, *sharp in on_ranks(2, traffic, kind, cases):
        bulk, numbers = apart(plain)
        assert sum(size for _, size, _ in numbers) <= 120
        for collectives in sharp:
            own_bulk, own_numbers = apart(collectives)
            assert own_numbers == numbers
            if kind == "ddp":
                assert own_bulk == bulk == Counter({("gloo:all_reduce", WEIGHTS, "float"): 1})
                assert len(numbers) == 1
            assert own_bulk == bulk


@pytest.mark.parametrize("kind", ENGINES)
def test_global_scope_keeps_to_its_plan(kind):
    """Twice what a plain step moves; and one number more, the norm, where ranks hold parts."""
    cases = [(None, "global"), (SAM(0.1), "global"), (CSAM(0.1), "global"), (ASAM(0.5), "global")]
    for plain, *sharp in on_ranks(2, traffic, kind, cases):
        bulk, numbers = apart(plain)
        for collectives in sharp:
            own_bulk, own_numbers = apart(collectives)
            assert own_bulk == bulk + bulk
            assert len(own_numbers) == len(numbers) + (kind != "ddp")
            assert Counter(own_numbers) - Counter(numbers) <= Counter({NORM: 1})


# Memory


def memory(rank, world_size, kind, cases):
    """Bytes of the tensors that are alive in the second forward pass and were not in the first."""
    more = []
    for rule, scope in cases:
        network = nn.Sequential(nn.Linear(6, 50_000), nn.GELU(), nn.Linear(50_000, 5))
        engine = make_engine(kind, network)
        SharpnessAwareStep(engine, None)(my_part(rank, world_size, 0))  # momentum is there
        step = SharpnessAwareStep(engine, rule, scope=scope)
        seen = []
        network.register_forward_pre_hook(lambda *_, seen=seen: seen.append(bytes_alive()))
        gc.collect()
        step(my_part(rank, world_size, 0))
        more.append(seen[1] - seen[0])
        own = sum(w.nbytes for w in parts_of(engine))
    return more, own


def parts_of(engine) -> list[torch.Tensor]:
    """The weights that this rank holds, of those it would have to keep."""
    if isinstance(engine, ShardedEngine):
        return [w.to_local() for w in engine.weights.values()]
    return list(engine.module.parameters())


def bytes_alive() -> int:
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    storages = [getattr(t, "_local_tensor", t).untyped_storage() for t in found]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("kind", UNLIKE)
def test_extra_memory_is_one_copy_of_the_local_weights_and_none_on_zero(kind):
    cases = [(rule, "global") for rule in (SAM(0.1), CSAM(0.1), ASAM(0.5))]
    if kind == "ddp":
        cases.append((SAM(0.1), "rank"))
    for more, own in everywhere(kind, memory, cases):
        expected = 0 if kind in ZERO else own
        # Beside it: a state of the random generator, 5 kB, and a few scalars.
        assert all(0 <= bytes_ - expected < 16_384 for bytes_ in more), (more, own)


def held(rank, world_size, kind):
    """By rule: copies of this rank's weights in the last pass of a step, and bytes beside them."""
    names = ("gsam", "momentum_sam", "wsam", "friendly_sam", "ssam", "stale_sam", "functional_sam")
    return {name: held_by(RULES[name], rank, world_size, kind) for name in names}


def held_by(rule, rank, world_size, kind):
    network = nn.Sequential(nn.Linear(6, 10_000), nn.GELU(), nn.Linear(10_000, 5))
    engine = make_engine(kind, network)
    step, seen = SharpnessAwareStep(engine, rule), []
    train(SharpnessAwareStep(engine, None), rank, world_size, numbers=[0])  # momentum is there
    gc.collect()
    before = bytes_alive()
    step(my_part(rank, world_size, 0), at=0)  # what it remembers is there
    gc.collect()
    network.register_forward_pre_hook(lambda *_: seen.append(bytes_alive()))
    step(my_part(rank, world_size, 0), at=0)
    own = sum(weight.nbytes for weight in engine.masters().values())
    return divmod(seen[-1] - before + 1_000, own)


@pytest.mark.parametrize("kind", ["one", "zero1"])
def test_rules_hold_as_many_copies_as_the_readme_says(kind):
    for found in everywhere(kind, held):
        for name, (copies, beside) in found.items():
            assert copies + (kind in ZERO) == int(rule_table.copies(RULES[name])[0]), name
            assert beside < 20_000, name


# Graphs


def compiled(rank, world_size):
    """Graphs and recompilations of CSAM's steps with noise and batch norm; one or many ranks."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = make_network(0.2, norm=True)
    model = torch.compile(network, backend=count)
    if world_size > 1:
        model = DistributedDataParallel(model, broadcast_buffers=False)
    engine = ReplicatedEngine(model, make_optimizer(network))
    step = SharpnessAwareStep(engine, CSAM(0.1))
    seen = []
    for number in range(5):
        rho = 0.1 / (number + 1)
        step(my_part(rank, world_size, number, 2), rho=rho, measure=number == 3)
        seen.append(len(graphs))
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_compiled_graph_serves_both_passes(world_size):
    """Of the network, within DDP if it is; rho, measuring and micro-batches change nothing."""
    assert on_ranks(world_size, compiled) == [[1] * 5] * world_size


def trained_compiled(rank, world_size, scope):
    """torch.compile within DistributedDataParallel, and around it as Accelerate does it."""
    ends = []
    for within in (True, False):
        network = make_network()
        if within:
            model = DistributedDataParallel(torch.compile(network, backend="aot_eager"))
        else:
            model = torch.compile(DistributedDataParallel(network), backend="aot_eager")
        engine = ReplicatedEngine(model, make_optimizer(network))
        step = SharpnessAwareStep(engine, CSAM(0.1), scope=scope)
        train(step, rank, world_size, 2)
        ends.append(engine.full_weights())
    return ends


@pytest.mark.parametrize("scope", ["global", "rank"])
def test_a_compiled_network_gives_the_same_weights_by_its_own_names(scope):
    expected = reference(CSAM(0.1), 2, 2 if scope == "global" else 1)[0]
    for weights in on_ranks(2, trained_compiled, scope)[0]:
        assert far(weights, expected) < CLOSE


def pointers(rank, world_size, kind):
    """Where what the passes use lies: whole weights, or this rank's shards."""
    engine = make_engine(kind)
    step = SharpnessAwareStep(engine, CSAM(0.1))
    seen = set()
    for number in range(3):
        step(my_part(rank, world_size, number))
        shards = engine.masters().values() if kind == "fsdp2" else engine.module.parameters()
        if kind == "zero3":
            shards = [part.used for part in engine.layout.parts]
        seen.add(tuple(w.data_ptr() for w in shards))
    return len(seen)


@pytest.mark.parametrize("kind", UNLIKE)
def test_weights_stay_where_they_are(kind):
    """A CUDA graph, or a compiled one, would otherwise be recorded again, or see old weights."""
    assert set(everywhere(kind, pointers)) == {1}
