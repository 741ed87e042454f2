"""Schedules of SWA against the code and the formulas that they are from, epoch by epoch."""

import random

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel

from flatcal_dist.averaging import Moment
from flatcal_dist.config import Config, load
from flatcal_dist.training.optimizers import build_optimizer, build_schedule

EPOCH = 7  # steps
PEAK = 0.1
FMFP = ["train.epochs=201", "average={name: swa, start_epoch: 120}", "schedule.name=swa_2022"]
CONSTANT = ["train.epochs=200", "average={name: swa, start_epoch: 160}"]
CYCLICAL = [
    "train.epochs=60", "average={name: swa, start_epoch: 40, every_epochs: 4}",
    "schedule={name: cyclical, cycle_epochs: 4, high: 0.4, low: 0.1}",
]  # fmt: skip


def configured(*words: str) -> Config:
    return load(None, [f"optimizer.learning_rate={PEAK}", *words])


def scheduled(config: Config, optimizer: torch.optim.Optimizer | None = None):
    """The function from step to rate, of a run in epochs of EPOCH steps."""
    optimizer = optimizer or build_optimizer(config.optimizer, nn.Linear(2, 2))
    schedule = build_schedule(config, optimizer, config.train.epochs * EPOCH, EPOCH)

    def rate(step: int) -> float:
        schedule.step_update(step)
        found = {group["lr"] for group in optimizer.param_groups}
        assert len(found) == 1
        return found.pop()

    return rate


def rates(*words: str) -> list[float]:
    config = configured(*words)
    rate = scheduled(config)
    return [rate(step) for step in range(config.train.epochs * EPOCH)]


def by_epoch(found: list[float]) -> list[float]:
    """One rate for each epoch, which all of its steps have."""
    epochs = [found[first : first + EPOCH] for first in range(0, len(found), EPOCH)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


def test_swa_2022_is_what_torch_does_in_the_loop_of_that_code():
    """main_fmfp.py: both schedulers exist from the start; one of them steps after each epoch."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), PEAK, momentum=0.9)
    scheduler, swa_scheduler = (
        CosineAnnealingLR(optimizer, T_max=100),
        SWALR(optimizer, swa_lr=0.05),
    )
    trained = []
    for epoch in range(1, 202):
        trained.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (swa_scheduler if epoch > 120 else scheduler).step()
    assert by_epoch(rates(*FMFP)) == pytest.approx(trained, abs=1e-12)
    assert min(trained) == trained[100] == pytest.approx(0, abs=1e-12)
    assert trained[120] == pytest.approx(0.00955, abs=1e-5)
    assert trained[130:] == pytest.approx([0.05] * 71)


def test_swa_2022_with_other_numbers_is_torchs():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), PEAK)
    scheduler = CosineAnnealingLR(optimizer, T_max=9)
    swa_scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
    trained = []
    for epoch in range(1, 13):
        trained.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        (swa_scheduler if epoch > 6 else scheduler).step()
    words = (
        "schedule={name: swa_2022, cosine_epochs: 9, start_epoch: 6, anneal_epochs: 3, rate: 0.2}"
    )
    found = rates("train.epochs=12", "average={name: swa, start_epoch: 6}", words)
    assert by_epoch(found) == pytest.approx(trained, abs=1e-12)


def snapshots(config: Config) -> list[float]:
    """After how many epochs weights are averaged."""
    rule, found = config.average.build(), []
    total = config.train.epochs * EPOCH
    for step in range(1, total + 1):
        share = rule.share(Moment(step, False, EPOCH, total, len(found)))
        if share is not None:
            found.append(step / EPOCH)
            assert share == 1 / len(found), "an equal average"
    return found


def test_the_snapshots_of_that_code():
    """main_fmfp.py: `epoch > swa_start` with 120, of 201 epochs. AveragedModel is equal to ours."""
    config = configured(*FMFP)
    averaged = snapshots(config)
    assert averaged == [epoch for epoch in range(1, 202) if epoch > 120] == list(range(121, 202))
    network = nn.Linear(1, 1, bias=False)
    swa_model, ours = AveragedModel(network), 0.0
    for count, epoch in enumerate(averaged):
        nn.init.constant_(network.weight, epoch**0.5)
        swa_model.update_parameters(network)
        ours += (network.weight.item() - ours) / (count + 1)
    assert ours == pytest.approx(swa_model.module.weight.item(), rel=1e-6)
    # The share of training that is nearest to 120 of 201 epochs, and one that rounds down.
    assert snapshots(configured("train.epochs=201", "average={name: swa, start: 0.6}")) == averaged
    third = snapshots(configured("train.epochs=200", "average={name: swa, start: 0.7}"))
    assert third[0] == 141, "0.7 * 200 is 140, whatever floating-point numbers say"


def code_of_izmailov(epoch: int, swa_start: int, swa_lr: float, lr_init: float) -> float:
    """timgaripov/swa, train.py, `schedule`, with --swa."""
    t = epoch / swa_start
    lr_ratio = swa_lr / lr_init
    if t <= 0.5:
        factor = 1.0
    elif t <= 0.9:
        factor = 1.0 - (1.0 - lr_ratio) * (t - 0.5) / 0.4
    else:
        factor = lr_ratio
    return lr_init * factor


@pytest.mark.parametrize(
    ("words", "epochs", "swa_start"),
    [
        (["average={name: swa, start_epoch: 160}"], 200, 161),
        (["average={name: swa, start: 0.8}"], 200, 161),
        (["average={name: swa, start: 0.75}"], 90, 68),  # 67.5 epochs
        (["average={name: swa, start: 0.7}"], 90, 64),
        (["average={name: swa, start: 0.5, every_epochs: 3}"], 12, 7),
        (["schedule.start=0.75"], 90, 68),  # without an average
        (["schedule.start=0.75", "average.name=ema"], 90, 68),
        (["schedule.start=0.75", "average={name: swa, start: 0.75}"], 90, 68),
        (["schedule.start=0.8", "average={name: swa, start_epoch: 160}"], 200, 161),
    ],
)
def test_swa_constant_is_that_of_its_authors(words, epochs, swa_start):
    words = [f"train.epochs={epochs}", "schedule={name: swa_constant, rate: 0.3}", *words]
    right = [code_of_izmailov(epoch, swa_start, 0.03, PEAK) for epoch in range(epochs)]
    assert by_epoch(rates(*words)) == pytest.approx(right, abs=1e-15)
    config = configured(*words)
    if config.average.name == "swa":
        every = config.average.every_epochs
        first = min(epoch for epoch in range(swa_start, epochs + 1) if epoch % every == 0)
        assert snapshots(config) == list(range(first, epochs + 1, every))


def test_cyclical_is_the_papers_and_weights_are_averaged_where_a_cycle_ends():
    """Section 3.2: alpha(i) = (1 - t(i)) alpha_1 + t(i) alpha_2, t(i) = (mod(i - 1, c) + 1) / c."""
    found, c = rates(*CYCLICAL), 4 * EPOCH
    for i in range(1, 20 * EPOCH + 1):
        t = ((i - 1) % c + 1) / c
        right = (1 - t) * 0.4 * PEAK + t * 0.1 * PEAK
        assert found[40 * EPOCH + i - 1] == pytest.approx(right, abs=1e-15)
    before = [code_of_izmailov(epoch, 41, 0.4 * PEAK, PEAK) for epoch in range(40)]
    assert by_epoch(found[: 40 * EPOCH]) == pytest.approx(before, abs=1e-15)
    averaged = snapshots(configured(*CYCLICAL))
    assert averaged == [44, 48, 52, 56, 60]
    assert all(found[int(e * EPOCH) - 1] == pytest.approx(0.1 * PEAK) for e in averaged)
    # SWA begins within a cycle: the first snapshot is at its end.
    between = [*CYCLICAL[:1], CYCLICAL[1].replace("40", "42"), *CYCLICAL[2:]]
    assert rates(*between) == found
    assert snapshots(configured(*between)) == averaged


ALL = pytest.mark.parametrize(
    "words",
    [FMFP, [*CONSTANT, "schedule.name=swa_constant"], CYCLICAL],
    ids=["swa_2022", "swa_constant", "cyclical"],
)


@ALL
def test_a_warm_up_takes_the_place_of_the_first_steps(words):
    plain, warm = rates(*words), rates(*words, "optimizer.warmup_epochs=3")
    steps = 3 * EPOCH
    assert warm[steps:] == plain[steps:]
    first = PEAK / steps  # timm's: from the first step's share to the peak
    right = [first + step * (PEAK - first) / steps for step in range(steps)]
    assert warm[:steps] == pytest.approx(right, abs=1e-15)


@ALL
def test_a_resumed_run_has_the_rates_of_one_that_stayed(words):
    """In any order, and on an optimizer that has been filled from one in the midst of a run."""
    config = configured(*words)
    right = rates(*words)
    steps = list(range(len(right)))
    random.Random(0).shuffle(steps)
    rate = scheduled(config)
    assert [rate(step) for step in steps] == [right[step] for step in steps]
    for resumed in (len(right) // 2, len(right) - EPOCH):
        old, new = (build_optimizer(config.optimizer, nn.Linear(2, 2)) for _ in range(2))
        scheduled(config, old)(resumed)
        rate = scheduled(config, new)
        new.load_state_dict(old.state_dict())
        assert [rate(step) for step in range(resumed, len(right))] == right[resumed:]
