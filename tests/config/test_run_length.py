"""Runs that are too short for a phase of their schedule, or for their average, are refused."""

from pathlib import Path

import pytest
from torch import nn

from flatcal_dist.config import ConfigError, load
from flatcal_dist.config.checking.run_length import length_of, no_average, refuse_short
from flatcal_dist.training.dry_run import phases_in_words
from flatcal_dist.training.optimizers import build_optimizer, build_schedule

DIGITS = Path(__file__).parents[2] / "configs/digits"
SWA = "average.name=swa"
FMFP = ["average={name: swa, start_epoch: 120}", "schedule.name=swa_2022"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([SWA, "train.epochs=2"], ["those of one epoch", "2 epochs", "train.epochs"]),
        ([SWA, "average.start_epoch=90"], ["average none", "90 epochs", "average.start_epoch"]),
        ([SWA, "average.start_epoch=500"], ["average none", "begins after 500"]),
        ([SWA, "average.every_epochs=30"], ["one epoch", "every 30", "average.every_epochs"]),
        ([SWA, "average.start_epoch=30", "average.start=0.5"], ["average.start = 0.5 (on the"]),
        (["schedule.name=swa_constant"], ["set average.name=swa", "schedule.start"]),
        (["schedule.name=cyclical", "average.name=ema"], ["set average.name=swa"]),
        (
            ["schedule={name: swa_constant, start: 0.5}", SWA],
            ["after 45 epochs", "after 67", "leave schedule.start out"],
        ),
        (
            ["schedule.name=swa_constant", SWA, "average.start_epoch=1"],
            ["begins after 1 epochs", "none in which the rate falls", "raise average.start or"],
        ),
        (
            ["schedule.name=swa_constant", SWA, "optimizer.warmup_epochs=40"],
            ["optimizer.warmup_epochs", "a warm-up of 40 epochs", "after 35 epochs", "shorten"],
        ),
        (
            ["schedule={name: cyclical, cycle_epochs: 2}", SWA],
            ["schedule.cycle_epochs=2", "average.every_epochs=1", "must be equal"],
        ),
        (
            ["schedule={name: cyclical, cycle_epochs: 60, start: 0.75}"],
            ["would not end in a run of 90", "shorten the cycle"],
        ),
        (["schedule={name: cyclical, low: 0.6}", SWA], ["schedule.low=0.6 is above"]),
        (FMFP, ["average.name=swa", "average none"]),
        (["schedule.name=swa_2022"], ["after 130 epochs", "the run has 90", "train.epochs"]),
        ([*FMFP, "train.epochs=130"], ["reached after 130 epochs", "the run has 130"]),
        (
            ["schedule.name=swa_2022", SWA, "train.epochs=201"],
            ["schedule.start_epoch=120", "after 150 epochs", "set average.start_epoch=120"],
        ),
        (
            [*FMFP, "train.epochs=201", "optimizer.warmup_epochs=121"],
            ["optimizer.warmup_epochs", "schedule.start_epoch=120"],
        ),
    ],
)
def test_a_phase_that_would_never_begin_is_refused_at_load(words, told):
    with pytest.raises(ConfigError) as error:
        load(None, words)
    for text in told:
        assert text in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        [SWA, "train.epochs=5"],
        [*FMFP, "train.epochs=131"],
        ["schedule={name: swa_constant, start: 0.75}"],
        ["schedule={name: cyclical, cycle_epochs: 2}", SWA, "average.every_epochs=2"],
    ],
)
def test_one_that_is_long_enough_is_not(words):
    load(None, words)


def test_a_run_that_was_recorded_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text("average: {name: swa}\ntrain: {epochs: 2}")
    assert load(tmp_path / "config.yaml", recorded=True).average.start == 0.75
    with pytest.raises(ConfigError, match="those of one epoch"):
        load(tmp_path / "config.yaml")


def test_the_length_in_steps_is_checked_when_the_data_is_known():
    """train.max_steps wins over epochs; an average of one moment is said, a lost phase refused."""
    config = load(DIGITS / "swa.yaml", ["train.max_steps=120"])
    build_schedule(config, build_optimizer(config.optimizer, nn.Linear(2, 2)), 120, 12)
    assert no_average(config, length_of(config, 120, 12)) is None
    assert "3 weights are averaged, at the ends of epochs after 7.5" in phases_in_words(config, 12)
    assert "those of one epoch" in no_average(config, length_of(config, 120, 60))
    assert phases_in_words(load(DIGITS / "sam.yaml"), 12).startswith("schedule.name=cosine")
    short = load(DIGITS / "swa.yaml", ["train.max_steps=120", "schedule.name=cosine"])
    assert phases_in_words(short, 60).startswith("warning: average.name=swa averages")
    with pytest.raises(ConfigError, match=r"the run has 0\.1"):
        phases_in_words(load(DIGITS / "fmfp.yaml", ["train.max_steps=12"]), 120)


def test_shipped_files_of_swa_are_what_they_say():
    fmfp, swa = load(DIGITS / "fmfp.yaml"), load(DIGITS / "swa.yaml")
    for config, count in ((fmfp, 60), (swa, 38)):
        assert f"; {count} weights are averaged" in phases_in_words(config, 12)


@pytest.mark.parametrize(
    "words",
    [
        "sharpness.start_epoch=0.01 sharpness.stop_epoch=0.02",
        "sharpness.every=1000 sharpness.start_epoch=1",
        "sharpness.every=7 sharpness.start_epoch=1 sharpness.stop_epoch=1.1",
    ],
)
def test_a_rule_that_perturbs_in_no_step_is_refused(words):
    """12 steps in an epoch, 120 in the run."""
    config = load(None, ["sharpness.rule=sam", "train.epochs=10", *words.split()])
    with pytest.raises(ConfigError, match="would perturb in no step"):
        refuse_short(config, length_of(config, 120, 12))


def test_a_rule_that_perturbs_once_is_not():
    for words in (
        ["sharpness.every=1000"],
        ["sharpness.start_epoch=9.9"],
        ["sharpness.every=7", "sharpness.start_epoch=1", "sharpness.stop_epoch=1.25"],
    ):
        config = load(None, ["sharpness.rule=sam", "train.epochs=10", *words])
        refuse_short(config, length_of(config, 120, 12))
