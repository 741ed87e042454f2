"""What cannot be is refused before anything is trained, with the reason and a way out."""

import math
import os

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from flatcal_dist.objectives import csam_loss
from flatcal_dist.sharpness import (
    ASAM,
    CSAM,
    SAM,
    LookSAM,
    ReplicatedEngine,
    SharpnessAwareStep,
    StepError,
)
from flatcal_dist.sharpness.engines.fsdp2.engine import ShardedEngine
from flatcal_dist.sharpness.engines.fsdp2.start import shard
from tests.support.engines import CPU, ENGINES, make_engine
from tests.support.ranks import on_ranks
from tests.support.reference import (
    CLASSES,
    bits,
    make_batch,
    make_network,
    make_optimizer,
    my_part,
    train,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(-0.1), "SAM: rho = -0.1: input should be greater than or equal to 0"),
        (lambda: CSAM(math.nan), "rho = nan: input should be a finite number"),
        (lambda: CSAM(0.1, gamma=2.5), "gamma = 2.5: input should be less than or equal to 2"),
        (lambda: CSAM(0.1, gamma=math.nan), "gamma = nan: input should be a finite number"),
        (lambda: SAM(0.1, every=0), "every = 0: input should be greater than or equal to 1"),
        (lambda: SAM(0.1, every=2.5), "every = 2.5: input should be a valid integer"),
        (lambda: ASAM(0.1, eta=-1), "eta = -1: input should be greater"),
        (lambda: LookSAM(0.1, alpha=math.inf), "alpha = inf: input should be a finite"),
        (lambda: csam_loss(torch.zeros(1, 2), torch.zeros(1, 2), 1.0), "hard labels only"),
    ],
)
def test_numbers_and_labels(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (SAM(0.1), {"scope": "nodes"}, "one of global, rank, node or a number of ranks"),
        (LookSAM(0.1), {"per_micro_batch": True}, "use scope 'global' without per_micro_batch"),
    ],
)
def test_scopes_of_any_engine(rule, options, message):
    network = make_network()
    with pytest.raises(ValueError, match=message):
        SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), rule, **options)


def test_what_no_step_can_serve():
    network = make_network()
    optimizer = make_optimizer(network)
    engine = ReplicatedEngine(network, optimizer)
    frozen = make_network().requires_grad_(False)
    lbfgs = torch.optim.LBFGS(network.parameters())
    for make, expected in (
        (lambda: ReplicatedEngine(make_network(), optimizer), "parameters of another network"),
        (lambda: ReplicatedEngine(frozen, optimizer), "nothing to train"),
        (lambda: ReplicatedEngine(make_network().double(), optimizer), "call network.float"),
        (lambda: ReplicatedEngine(network, lbfgs), "LBFGS evaluates the loss by itself"),
        (lambda: SharpnessAwareStep(engine, None, clip_norm=-1.0), "clip_norm must be positive"),
        (lambda: SharpnessAwareStep(engine, CSAM(0.1), loss=F.cross_entropy), "leave `loss` out"),
    ):
        with pytest.raises(StepError, match=expected):
            make()


def test_a_batch_that_cannot_be_taken_changes_nothing():
    network = make_network(norm=True)
    before = bits(network.state_dict())
    batch = make_batch(0)

    def refused(expected, micro_batches, loss=None, **options):
        engine = ReplicatedEngine(network, make_optimizer(network))
        step = SharpnessAwareStep(engine, SAM(0.1), loss=loss)
        with pytest.raises(StepError, match=expected):
            step(micro_batches, **options)
        assert bits(network.state_dict()) == before

    refused("nothing to learn from", [])
    refused("nothing to learn from", [(batch[0][:0], batch[1][:0])])
    refused("nothing to learn from", [batch], samples=0)
    refused(r"list of \(inputs, target\) pairs", batch)
    refused("needs one value each", [batch], loss=F.cross_entropy)
    refused("rho must be finite", [batch], rho=math.nan)
    for weight in network[0].parameters():
        weight.requires_grad_(False)
    step = SharpnessAwareStep(ReplicatedEngine(network, make_optimizer(network)), SAM(0.1))
    network.requires_grad_(True)
    with pytest.raises(StepError, match="frozen or thawed"):
        step([batch])


def different_numbers(rank, world_size, kind):
    step = SharpnessAwareStep(make_engine(kind), SAM(0.1))
    return message(lambda: step([make_batch(0)] * (rank + 1)))


@pytest.mark.parametrize("kind", ENGINES)
def test_ranks_with_different_numbers_of_micro_batches(kind):
    """Refused on all of them, instead of waiting for one another."""
    for refused in on_ranks(2, different_numbers, kind):
        assert "different numbers of micro-batches" in refused


NOTHING = "nothing was refused"


def message(work) -> str:
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return NOTHING


class WithNumber(nn.Linear):
    def __init__(self):
        super().__init__(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(()))


def half(supported: bool | None = None) -> str:
    """What start_zero says to float16; supported: in place of what DeepSpeed says of the device."""
    accelerator = deepspeed.get_accelerator()
    if supported is not None:
        accelerator.is_fp16_supported = lambda: supported
    try:
        return message(lambda: make_engine("zero1", precision=torch.float16))
    finally:
        accelerator.__dict__.pop("is_fp16_supported", None)


def under_zero(rank, world_size):
    engines = {kind: make_engine(kind) for kind in ("zero1", "zero2", "zero3")}
    low = make_engine("zero1", precision=torch.bfloat16)
    clips = make_engine("zero1", clip_norm=0.5)

    def refused(engine, **options):
        return message(lambda: SharpnessAwareStep(engine, SAM(0.1), **options))

    return {
        "rank 3": refused(engines["zero3"], scope="rank"),
        "micro 3": refused(engines["zero3"], per_micro_batch=True),
        "micro 2": refused(engines["zero2"], per_micro_batch=True),
        "low": refused(low, scope=1),
        "stage": message(lambda: make_engine("zero0")),
        "number": message(lambda: make_engine("zero1", WithNumber())),
        "precision": message(lambda: make_engine("zero1", precision=torch.float64)),
        "half here": (half(), bool(deepspeed.get_accelerator().is_fp16_supported())),
        "half": half(supported=False),
        "half elsewhere": half(supported=True),
        "clip": message(lambda: train(SharpnessAwareStep(clips, SAM(0.1)), rank, world_size)),
    }


def test_under_zero():
    for refused in on_ranks(2, under_zero):
        assert "ZeRO-3 cannot do scope 'rank'" in refused["rank 3"]
        assert "or DDP, or ZeRO-1" in refused["rank 3"]
        assert "ZeRO-3 cannot do per_micro_batch" in refused["micro 3"]
        assert "ZeRO-2 cannot do per_micro_batch" in refused["micro 2"]
        assert "or ZeRO-1" in refused["micro 2"]
        assert "bfloat16 cannot do scope '1'" in refused["low"]
        assert "ZeRO-1 in float32" in refused["low"]
        assert "stages 1, 2 and 3, not 0" in refused["stage"]
        assert "without a dimension, such as scale" in refused["number"]
        assert "precision must be" in refused["precision"]
        assert "does not run float16 on this machine" in refused["half"]
        assert refused["half elsewhere"] == NOTHING
        said, supported = refused["half here"]
        assert (said == NOTHING) == supported, "the device decides, as DeepSpeed knows it"
        assert "give start_zero the same clip_norm" in refused["clip"]


def under_fsdp2(rank, world_size):
    engine = make_engine("fsdp2")
    network = make_network()
    stale = make_optimizer(network)
    model = shard(network, CPU, smallest_block=100)
    state = engine.local_state()
    state["layout"]["rank"] = 7
    return {
        "rank": message(lambda: SharpnessAwareStep(engine, SAM(0.1), scope="rank")),
        "micro": message(lambda: SharpnessAwareStep(engine, SAM(0.1), per_micro_batch=True)),
        "stale": message(lambda: ShardedEngine(model, stale)),
        "plain": message(lambda: ShardedEngine(make_network(), stale)),
        "groups": message(lambda: shard(make_network(), CPU, ranks_per_group=3)),
        "whole": message(engine.whole_weights),
        "state": message(lambda: engine.load_local_state(state)),
    }


def test_under_fsdp2():
    refused = on_ranks(2, under_fsdp2)[0]
    assert "gather their weights from each other's shards; use scope 'global'" in refused["rank"]
    assert "use DDP, or perturb once per step" in refused["micro"]
    assert "build it after shard()" in refused["stale"]
    assert "every parameter is sharded" in refused["plain"]
    assert refused["groups"] == "groups of 3 ranks do not divide the 2 ranks that run"
    assert "whole weights" in refused["whole"]
    assert "start from the full weights" in refused["state"]


def bad_group(rank, world_size):
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    engine = make_engine("ddp")
    node = SharpnessAwareStep(engine, SAM(0.1), scope="node")
    node(my_part(rank, world_size, 0))
    return message(lambda: SharpnessAwareStep(engine, SAM(0.1), scope=3)), node.scope.ranks


def test_groups_that_do_not_divide_the_ranks():
    for refused, ranks_of_a_node in on_ranks(2, bad_group):
        assert refused == (
            "scope 3 makes groups of 3 ranks, which do not divide the 2 ranks that run; choose a "
            "divisor, or scope 'global' or 'rank'"
        )
        assert ranks_of_a_node == 1


def test_accelerates_mixed_precision_that_the_engine_was_not_told_of():
    AcceleratorState._reset_state(reset_partial_state=True)  # of another test in this process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    network = make_network()
    optimizer = make_optimizer(network)
    prepared = accelerator.prepare_model(network)
    with pytest.raises(StepError, match=r"in mixed precision, and the engine was not told"):
        ReplicatedEngine(prepared, optimizer)
    step = SharpnessAwareStep(ReplicatedEngine(prepared, optimizer, torch.bfloat16), SAM(0.1))
    assert math.isfinite(step([make_batch(0)]).loss)
    AcceleratorState._reset_state(reset_partial_state=True)
