"""EMA and SWA of SAM on every engine, against torch's averages of one process; then carried on.

Each engine is started once, with two ranks. It trains with all averages, saves a checkpoint of
each, and loads those that the engines before it have saved.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from flatcal_dist.averaging import EMA, SWA
from flatcal_dist.averaging.average import Average
from flatcal_dist.checkpoints import format as checkpoint
from flatcal_dist.checkpoints import resharding
from flatcal_dist.checkpoints.format import Progress
from flatcal_dist.sharpness import SharpnessAwareStep
from flatcal_dist.sharpness.engines.registry import ENGINES as REGISTRY
from tests.support.engines import EVERYWHERE, make_engine
from tests.support.ranks import on_ranks
from tests.support.reference import CLOSE, RULES, make_batch, make_network, my_part, reference

STEPS, EPOCH = 7, 2  # the last epoch is a short one: its end is no snapshot
NORM = partial(make_network, norm=True)
RULE = RULES["sam"]
AVERAGES = {
    "ema": EMA(decay=0.7),
    "swa": SWA(start_epoch=1),  # after the steps 4 and 6
    "ema of statistics": EMA(decay=0.7, norm_statistics="average"),
    "swa of statistics": SWA(start_epoch=1, norm_statistics="average"),
}
# Of the averaged network: four batches and a smaller one, which two and four ranks do not divide.
SIZES = (8, 8, 8, 8, 3)
IMAGES = torch.cat([make_batch(number)[0] for number in (90, 91)])[: sum(SIZES)]


def dealt(rank: int, world_size: int):
    """This rank's batches for statistics, and whether they count: in turn, as runs deal them."""
    batches, rounds = IMAGES.split(SIZES), -(-len(SIZES) // world_size)
    return (
        (batches[min(number, len(SIZES) - 1)], number < len(SIZES))
        for number in range(rank, rounds * world_size, world_size)
    )


def beginning(engine, rank: int, world_size: int) -> dict[str, Average]:
    return {
        name: Average(
            engine,
            rule,
            partial(dealt, rank, world_size) if rule.norm_statistics == "reestimate" else None,
        )
        for name, rule in AVERAGES.items()
    }


def train(engine, rank: int, world_size: int):
    step, averages = SharpnessAwareStep(engine, RULE), beginning(engine, rank, world_size)
    for number in range(STEPS):
        step(my_part(rank, world_size, number))
        for average in averages.values():
            average.update(number + 1, False, EPOCH, STEPS)
    engine.synchronize_buffers()
    return step, averages


def whole(engine, average: Average) -> dict[str, torch.Tensor]:
    """The averaged network, as it is exported."""
    with average.applied():
        return {name: t.clone() for name, t in engine.full_weights().items()}


def trained(rank, world_size, kind, folder: Path, earlier: list[str]):
    """All averages of some steps of SAM, saved; and what the averages saved earlier are here."""
    engine = make_engine(kind, make_network())
    _, averages = train(engine, rank, world_size)
    own = {f"{name}, no norm": whole(engine, averages[name]) for name in ("ema", "swa")}
    engine = make_engine(kind, NORM())
    step, averages = train(engine, rank, world_size)
    own |= {name: whole(engine, average) for name, average in averages.items()}
    for name, average in averages.items():
        save(folder / kind / name, step, average, kind, rank, world_size)
    carried = {}
    for source in earlier:
        for name, average in beginning(engine, rank, world_size).items():
            path = newest(folder / source / name)
            resharding.load(path, step, checkpoint.load_progress(path), average)
            carried[source, name] = average.count, whole(engine, average)
    return own, carried


def save(folder: Path, step, average: Average, kind: str, rank: int, world_size: int) -> None:
    sharded = kind != "one" and REGISTRY[kind].sharded
    average.settle()
    state = checkpoint.state_of(step, average)
    beside = folder / f".step_{STEPS}"
    if rank == 0:
        beside.mkdir(parents=True)
    wait(world_size)
    if sharded or rank == 0:
        checkpoint.write_part(beside, rank, state)
    wait(world_size)
    if rank == 0:
        engine = "ddp" if kind == "one" else kind
        progress = Progress(STEPS, None, engine, world_size, sharded, 0.0)
        checkpoint.publish(beside, progress, keep=1)
    wait(world_size)


def wait(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()


def newest(folder: Path) -> Path:
    path, remarks = checkpoint.newest(folder)
    assert path is not None, remarks
    return path


def expected(ranks: int) -> dict[str, dict[str, torch.Tensor]]:
    """By torch's AveragedModel and update_bn, in one process, of the plain loop of `reference`.

    With batch norm, `ranks` parts of a batch have batch statistics of their own, as ranks have. All
    else is that of whole batches. update_bn sees all images as one whole batch.
    """
    found = {}
    for name in ("ema", "swa"):
        found[f"{name}, no norm"] = averaged(name, make_network, 1, use_buffers=False)
        found[name] = averaged(name, NORM, ranks, use_buffers=False)
        found[f"{name} of statistics"] = averaged(name, NORM, ranks, use_buffers=True)
    return found


def averaged(name: str, network, ranks: int, use_buffers: bool) -> dict[str, torch.Tensor]:
    moments = range(STEPS + 1) if name == "ema" else (4, 6)  # EMA begins at the initial weights
    how = {"multi_avg_fn": get_ema_multi_avg_fn(0.7)} if name == "ema" else {}
    own = network()
    model = AveragedModel(own, use_buffers=use_buffers, **how)
    for steps in moments:
        if steps:
            own.load_state_dict(reference(RULE, ranks, network=network, numbers=range(steps))[0])
        model.update_parameters(own)
    if not use_buffers:
        update_bn([IMAGES], model)
    return model.module.state_dict()


def far(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference relative to the largest weight."""
    names = [name for name in theirs if not name.endswith("num_batches_tracked")]
    largest = max(float(theirs[name].abs().max()) for name in names)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in names) / largest


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def check(kinds: tuple[str, ...], ranks: int, folder: Path) -> float:
    """Start each engine in turn; returns the largest difference from torch's averages."""
    right = {count: expected(count) for count in (1, ranks)}
    counts = {name: STEPS if "ema" in name else 2 for name in AVERAGES}
    saved: dict[str, dict] = {}
    worst = 0.0
    for kind in kinds:
        count = 1 if kind == "one" else ranks
        found = on_ranks(count, trained, kind, folder, list(saved))
        own, carried = found[0]  # all weights are on rank 0 alone
        for name, theirs in right[count].items():
            worst = max(worst, far(own[name], theirs))
        assert set(carried) == {(source, name) for source in saved for name in AVERAGES}
        for (source, name), (snapshots, weights) in carried.items():
            assert snapshots == counts[name]
            assert same(weights, saved[source][name]), (source, kind, name)
        saved[kind] = own
        for name in AVERAGES:  # `flatcal export` and `flatcal evaluate` read a checkpoint alone
            network = NORM()
            resharding.fill_network(network, newest(folder / kind / name))
            assert same(network.state_dict(), saved[kind][name])
    return worst


def test_averages_of_every_engine_are_torchs_and_are_carried_to_the_others_exactly(tmp_path):
    assert check(EVERYWHERE, 2, tmp_path) < CLOSE  # measured: 2.5e-7


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_averages_on_more_ranks_and_carried_the_other_way(ranks, turned, tmp_path):
    kinds = EVERYWHERE[::-1] if turned else EVERYWHERE
    assert check(kinds, ranks, tmp_path) < CLOSE
