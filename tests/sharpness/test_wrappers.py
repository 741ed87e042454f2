"""DistributedDataParallel within a wrapper of the user's: found, and used as what it is."""

import math
import warnings

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flatcal_dist.sharpness import ReplicatedEngine, SharpnessAwareStep, StepError
from flatcal_dist.sharpness.engines.zero.engine import ZeroEngine
from tests.support.engines import make_engine
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLOSE,
    RULES,
    bits,
    far,
    make_batch,
    make_network,
    make_optimizer,
    reference,
    train,
)

CASES = (("global", False, 1), ("global", True, 2), ("rank", False, 1), ("rank", True, 2))


class Wrapper(nn.Module):
    """As Lightning Fabric's: it holds what it calls, and the network within that as well."""

    def __init__(self, model: nn.Module, original: nn.Module | None = None) -> None:
        super().__init__()
        self._forward_module = model
        self._original_module = model if original is None else original

    def forward(self, x):
        return 0.5 * self._forward_module(x)


class Halved(nn.Module):
    """What such a wrapper computes, in one process."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def forward(self, x):
        return 0.5 * self.network(x)


def wrapped(rank, world_size):
    outcome = []
    for scope, each, parts in CASES:
        network = make_network()
        model = nn.Sequential(Wrapper(DistributedDataParallel(network), network))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            engine = ReplicatedEngine(model, make_optimizer(network))
        step = SharpnessAwareStep(engine, RULES["csam"], scope=scope, per_micro_batch=each)
        torch.manual_seed(1 + rank)
        train(step, rank, world_size, parts)
        weights = {name: w.clone() for name, w in engine.full_weights().items()}
        logits = engine.inference(make_batch(0)[0]).detach()
        spoiled = make_batch(7)[0] * (math.nan if rank else 1), make_batch(7)[1]
        skipped = step([spoiled] * parts).skipped
        before = bits(weights) == bits(engine.full_weights())
        said = [str(w.message) for w in said if "not wrapped" in str(w.message)]
        outcome.append((weights, logits, skipped, before, said, step.scope.ranks))
    return outcome


def test_a_wrapper_around_ddp_is_a_part_of_the_network():
    first, second = on_ranks(2, wrapped)
    for number, (scope, each, parts) in enumerate(CASES):
        ranks = 2 if each or scope == "rank" else 1
        expected = reference(
            RULES["csam"], ranks, 1 if scope == "rank" else None, parts,
            network=Halved, per_micro_batch=each,
        )[0]  # fmt: skip
        expected = {name.removeprefix("network."): w for name, w in expected.items()}
        weights, logits, *_ = first[number]
        assert weights.keys() == make_network().state_dict().keys(), "the network's own names"
        assert far(weights, expected) < CLOSE, (scope, each)
        assert bits(weights) == bits(second[number][0]), "on all ranks"
        plain = make_network()
        plain.load_state_dict(weights)
        assert torch.equal(logits, 0.5 * plain(make_batch(0)[0])), "evaluation goes through it"
        for _, _, skipped, still, said, in_scope in (first[number], second[number]):
            assert skipped, "a NaN on one rank"
            assert still
            assert not said
            assert in_scope == (2 if scope == "global" else 1)


class Outside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(5, 5)


def refused(rank, world_size):
    def message(make) -> str:
        try:
            make()
        except StepError as error:
            return str(error)
        return ""

    def of(model: nn.Module) -> ReplicatedEngine:
        return ReplicatedEngine(model, make_optimizer(model))

    ddp = DistributedDataParallel
    return [
        message(lambda: of(Outside(ddp(make_network())))),
        message(lambda: of(nn.Sequential(ddp(nn.Linear(2, 2)), ddp(nn.Linear(2, 2))))),
        message(lambda: of(make_engine("fsdp2").model)),
        message(lambda: of(make_engine("zero1").zero)),
        message(lambda: of(make_engine("zero3").zero.module)),
        message(lambda: ZeroEngine(Wrapper(make_engine("zero1").zero))),
    ]


def test_what_is_wrapped_in_part_or_for_another_engine_is_refused():
    for outside, two, fsdp2, zero, zero3, wrapper in on_ranks(2, refused):
        assert "weight head.weight is outside of the DistributedDataParallel" in outside
        assert "2 parts of the network are wrapped in DistributedDataParallel" in two
        assert "the engine for that is ShardedEngine" in fsdp2
        assert "the engine for that is ZeroEngine" in zero
        assert "the engine for that is ZeroEngine" in zero3
        assert "ZeroEngine takes DeepSpeed's engine itself" in wrapper
