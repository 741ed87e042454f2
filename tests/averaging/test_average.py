"""The average of weights, with running statistics that belong to it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flatcal_dist.averaging import EMA, SWA, Moment
from flatcal_dist.averaging.average import Average
from flatcal_dist.averaging.norm_statistics import norm_layers, reestimate
from flatcal_dist.config import load
from flatcal_dist.inputs import (
    open_training,
    statistics_batches,
)
from flatcal_dist.sharpness import SAM, ReplicatedEngine, SharpnessAwareStep
from tests.support.engines import MOST_ENGINES, everywhere, make_engine
from tests.support.ranks import on_ranks
from tests.support.readme import example_class

LEFT = ("num_batches_tracked", "frozen")


class Counter(nn.Module):
    """A buffer of its own that a pass in training mode moves, and one in evaluation does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.passes += 1
        return x


class Norms(nn.Module):
    """Each kind of layer with statistics: plain averages of all batches, shared, frozen, unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.batch = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.instance = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
        self.drop, self.counter = nn.Dropout(0.5), Counter()
        self.frozen = nn.BatchNorm2d(6).eval()
        self.hidden = nn.Linear(96, 10)
        self.plain = nn.BatchNorm1d(10, momentum=None)
        self.head = nn.Linear(10, 5)
        self.unused = nn.BatchNorm1d(3, affine=False)
        self.without = nn.BatchNorm1d(10, affine=False, track_running_stats=False)

    def forward(self, x):
        x = self.batch(self.first(x)).relu()
        x = self.frozen(self.drop(self.instance(self.second(x)))).relu()
        x = self.plain(self.counter(self.hidden(x.flatten(1))))
        return self.head(self.without(self.plain(2 * x)))


def pictures(number: int, size: int = 8) -> torch.Tensor:
    return torch.randn(size, 1, 4, 4, generator=torch.Generator().manual_seed(number)) + number / 3


def expected(network: Norms, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the layers' inputs themselves: of all that passed through, at once, in float64."""
    network = copy.deepcopy(network).eval()
    inputs: dict[str, list[torch.Tensor]] = {"batch": [], "instance": [], "plain": []}
    for name, seen in inputs.items():
        layer = getattr(network, name).train()
        layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].double()))
    with torch.no_grad():
        for batch in batches:
            network(batch)
    values = {name: torch.cat(seen) for name, seen in inputs.items()}
    by_channel = {
        "batch": values["batch"].transpose(0, 1).flatten(1),
        "plain": values["plain"].T,
    }
    found = {}
    for name, rows in by_channel.items():
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = rows.mean(1), rows.var(1)
    planes = values["instance"].flatten(2)
    found["instance.running_mean"] = planes.mean(2).mean(0)
    found["instance.running_var"] = planes.var(2).mean(0)
    return found


def far(found: dict, right: dict) -> float:
    return max(float((found[name] - right[name]).abs().max()) for name in right)


def test_statistics_are_those_of_all_values_and_the_network_stays_as_it_is():
    """Batches of 8, 8 and 3, by counts; batch norm within them as in training."""
    network = Norms()
    network.batch.running_mean.fill_(torch.inf)  # what was there before does not matter
    before = copy.deepcopy(network)
    modes = [m.training for m in network.modules()]
    batches = [pictures(0), pictures(1), pictures(2, 3)]
    random = torch.get_rng_state()
    layers = norm_layers(network)
    assert set(layers) == {"batch", "instance", "plain", "unused"}
    surplus = (pictures(9), False)
    found = reestimate(network, layers, [*((b, True) for b in batches), surplus], ranks=1)
    # Of sums of some 300 float32 values, rounded in another order.
    assert far(found, expected(network, batches)) < 1e-5
    assert torch.equal(found["unused.running_var"], before.unused.running_var), "no input, no news"
    assert torch.equal(torch.get_rng_state(), random), "dropout is off"
    assert [m.training for m in network.modules()] == modes
    assert (network.plain.momentum, network.batch.momentum) == (None, 0.1)
    for (name, ours), theirs in zip(
        network.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def averaged(rank, world_size, kind):
    """Statistics of five batches dealt to the ranks, at known weights; then after three steps."""
    engine = make_engine(kind, Norms())
    five = [pictures(number) for number in range(5)]

    def batches():
        rounds = -(-5 // world_size) * world_size
        return ((five[min(b, 4)], b < 5) for b in range(rank, rounds, world_size))

    average = Average(engine, EMA(decay=0.7), batches)
    average.settle()
    first = dict(average.statistics)
    step = SharpnessAwareStep(engine, SAM(0.05))
    for number in range(3):
        mine = pictures(number, 12).tensor_split(world_size)[rank]
        step([(mine, torch.arange(len(mine)) % 5)])
        average.update(1, False, 1, 9)
    engine.synchronize_buffers()
    before = copy.deepcopy(engine.full_weights())
    with average.applied():
        inside = copy.deepcopy(engine.full_weights())
    after = engine.full_weights()
    if rank:
        return first, None, None, None
    network = Norms()
    network.load_state_dict(inside)
    same = all(torch.equal(before[name], after[name]) for name in before)
    kept = all(torch.equal(inside[n], before[n]) for n in before if n.rpartition(".")[2] in LEFT)
    return first, far(inside, expected(network, five)), same, kept


@pytest.mark.parametrize("kind", MOST_ENGINES)
def test_every_average_has_its_own_statistics_the_same_on_any_number_of_ranks(kind):
    one = everywhere("one", averaged)[0][0]
    for first, off, same, kept in everywhere(kind, averaged):
        assert all(torch.equal(first[name], one[name]) for name in one), "bit for bit"
        if off is not None:
            assert off < 1e-5
            assert same, "the network is itself again, buffers as well"
            assert kept


def test_without_batches_the_statistics_are_averaged_as_torch_does():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), lr=0.5))
    step, average = SharpnessAwareStep(engine, SAM(0.1)), Average(engine, EMA(decay=0.9))
    reference = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    reference.update_parameters(network)  # the first only copies
    for number in range(4):
        inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(number))
        step([(inputs, torch.arange(6) % 4)])
        average.update(1, False, 1, 9)
        reference.update_parameters(network)
    own = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with average.applied():
        for name, right in reference.module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                assert network[1].num_batches_tracked == 4, "the network's"
            else:
                assert torch.equal(network.state_dict()[name], right), name
    assert all(torch.equal(buffer, own[name]) for name, buffer in network.named_buffers())


def test_swa_is_the_plain_average_at_the_ends_of_the_last_epochs():
    """Skipped steps move nothing and an epoch may end with one; nothing is averaged before."""
    torch.manual_seed(1)
    network = nn.Linear(3, 4)
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), lr=0.5))
    average = Average(engine, SWA(start=0.5, every_epochs=2))
    reference = AveragedModel(network)
    for number in range(1, 31):  # ten epochs of three steps
        with torch.no_grad():
            network.weight += torch.randn(4, 3)
        average.update(number, number == 24, 3, 30)
        if number in (18, 24, 30):
            reference.update_parameters(network)
        own = network.weight.clone()
        with average.applied():
            right = reference.module.weight if number >= 18 else own
            torch.testing.assert_close(network.weight, right, rtol=0, atol=1e-6)
        assert torch.equal(network.weight, own)
    assert average.count == 3
    short = SWA(start=0.5, every_epochs=5)
    shares = [short.share(Moment(step, False, 4, 10, 0)) for step in range(1, 11)]
    assert shares == [None] * 9 + [1.0], "the last step counts where no epoch did"


def ranks_average(rank, world_size):
    """Each rank's own running statistics are averaged; what counts is rank 0's, on every rank."""
    engine = make_engine("ddp", Norms())
    average = Average(engine, EMA(decay=0.7))
    step = SharpnessAwareStep(engine, SAM(0.05))
    for number in range(3):
        step([(pictures(number + 5 * rank), torch.arange(8) % 5)])
        average.update(1, False, 1, 9)
    own = {name: t.clone() for name, t in average.statistics.items()}
    average.settle()
    return own, average.statistics


def test_averaged_statistics_are_those_of_rank_0():
    (first, settled), (second, other) = on_ranks(2, ranks_average)
    assert not torch.equal(first["batch.running_mean"], second["batch.running_mean"])
    for name, right in first.items():
        assert torch.equal(settled[name], right)
        assert torch.equal(other[name], right)


def test_a_network_without_such_layers_has_no_cost():
    def never():
        raise AssertionError("asked for batches")

    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), lr=0.5))
    average = Average(engine, EMA(decay=0.9), never)
    average.update(1, False, 1, 9)
    average.settle()
    with average.applied():
        assert average.statistics == {}


@pytest.mark.parametrize("mixing", ["none", "mixup"])
def test_training_images_are_dealt_the_same_to_any_number_of_ranks(digits_shards, mixing):
    """The first of the epoch's order, in batches that no rank changes; nobody gets more."""
    words = [f"data.train={digits_shards}/digits-train-*.tar", f"mixing.name={mixing}"]
    words += ["data.global_batch_size=96", "evaluate.batch_size=61"]
    if mixing == "mixup":
        words += ["sharpness.rule=sam"]
    config = load("configs/digits/csam.yaml", words)
    train = open_training(config.data, 10)

    def dealt(ranks: int) -> dict[int, torch.Tensor]:
        found = {}
        for rank in range(ranks):
            batches, count = statistics_batches(config, train, rank, ranks, pin_memory=False)
            assert len(batches) == -(-count // ranks)
            found |= {b.step: b.images for b in batches if b.step < count}
        return found

    one = dealt(1)
    size = 60 if mixing == "mixup" else 61
    assert [len(images) for images in one.values()] == [size] * (800 // size)
    for ranks in (2, 3, 5):
        other = dealt(ranks)
        assert other.keys() == one.keys()
        assert all(torch.equal(other[b], one[b]) for b in one)


def test_the_average_of_the_readme():
    network = nn.Linear(1, 1, bias=False)
    engine = ReplicatedEngine(network, torch.optim.SGD(network.parameters(), lr=0.1))
    average = Average(engine, example_class("averaging", "EveryStep")())
    for step, value in enumerate((1.0, 2.0, 6.0, 100.0), start=1):
        with torch.no_grad():
            network.weight.fill_(value)
        average.update(step, skipped=value == 100, epoch_steps=2, total_steps=4)
    with average.applied():
        assert network.weight.item() == pytest.approx(3.0)
    assert network.weight.item() == 100
