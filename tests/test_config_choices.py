"""Keys that only one choice reads are refused beside another, and make no other run."""

from pathlib import Path

import pytest
from torch import nn

from flatcal_dist import config as configuration
from flatcal_dist.config import ConfigError, OptimizerConfig, load
from flatcal_dist.run_directory import RunDirectory
from flatcal_dist.sweep import elements, load_sweep
from flatcal_dist.training.optimizers import build_optimizer

ROOT = Path(__file__).resolve().parents[1]
SGD = ROOT / "configs/digits/sgd.yaml"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("sharpness.gamma=2", "sharpness.rule=csam"),
        ("sharpness.gamma=1.0", "sharpness.rule=csam"),  # its default: asked for all the same
        ("sharpness.alpha=3", "sharpness.rule=looksam or gsam"),
        ("sharpness.momentum=0.5", "sharpness.rule=momentum_sam"),
        ("sharpness.eta=0.1", "sharpness.rule=asam"),
        ("sharpness.rho=0.1", "a sharpness.rule such as sam"),
        ("sharpness.scope=rank", "a sharpness.rule such as sam"),
        ("sharpness.rho_min=0.01", "a sharpness.rule such as sam and sharpness.rho_schedule"),
        ("train.average_decay=0.9", "train.average=ema"),
        ("data.flip=0.1", "data.augmentation=resized_crop"),
        ("data.auto_augment_magnitude=3", "data.auto_augment=randaugment or augmix"),
        ("data.mix_probability=0.5", "a data.mixup or data.cutmix above 0"),
        ("data.cache_limit=3", "a data.cache"),
    ],
)
def test_a_key_of_another_choice_is_refused(override, where):
    with pytest.raises(ConfigError) as error:
        load(SGD, [override])
    key = override.partition("=")[0]
    assert str(error.value).startswith(f"{key} = ")
    assert f"(on the command line) belongs to {where}" in str(error.value)


def test_all_such_keys_are_named_at_once_and_with_their_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sharpness: {rule: none, gamma: 2.0, alpha: 3.0}")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert str(error.value).count(f"(in {file}) belongs to") == 2
    assert "sharpness.rule is none" in str(error.value)


def test_what_is_chosen_makes_the_fingerprint_and_nothing_else(tmp_path):
    """A base that several methods share may hold the keys of all of them."""
    (tmp_path / "base.yaml").write_text("sharpness: {rule: csam, rho: 0.1, gamma: 2.0, eta: 0.5}")
    (tmp_path / "plain.yaml").write_text("inherits: base.yaml\nsharpness: {rule: none}")
    plain, bare = load(tmp_path / "plain.yaml"), load(None, ["run.dir=x"])
    assert configuration.fingerprint(plain) == configuration.fingerprint(bare)
    assert not configuration.differences(plain, bare)
    csam = load(tmp_path / "plain.yaml", ["sharpness.rule=csam"])
    assert (csam.sharpness.rho, csam.sharpness.gamma) == (0.1, 2.0)
    sam = load(tmp_path / "plain.yaml", ["sharpness.rule=sam"])
    assert (sam.sharpness.rho, sam.sharpness.gamma) == (0.1, 1.0)


def test_a_run_that_recorded_such_a_key_goes_on(tmp_path):
    config = load(SGD, [f"run.dir={tmp_path}/run"])
    directory = RunDirectory(config.run.dir)
    directory.checkpoints.mkdir(parents=True)
    old = configuration.to_yaml(config).replace("gamma: 1.0", "gamma: 2.0")
    assert "gamma: 2.0" in old
    directory.config_file.write_text(old)
    directory.check(config)


def test_every_choice_names_keys_that_exist_and_is_made_by_keys_that_exist():
    from flatcal_dist.config_choices import CHOICES

    known = {key for key, _ in configuration.flatten(configuration.Config())}
    for choice in CHOICES:
        assert {*choice.keys, *choice.by} <= known


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=str)
def test_shipped_sweeps_load(path):
    found = elements(load_sweep(path))
    assert len(found) == 30
    for element in found:
        assert load(load_sweep(path).base, element.arguments) == element.config


def test_a_grid_over_rules_and_their_keys(tmp_path):
    """Plain training has no gamma, so two such points of the grid are one run."""
    text = (
        f"base: {SGD}\nset: {{sharpness.scope: global}}\ngrid:\n  sharpness.rule: [none, csam]\n"
        "  sharpness.gamma: [0.5, 1.0]\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"compute the same(?s:.*)leave one of them out by `exc"):
        elements(load_sweep(tmp_path / "s.yaml"))
    text += "exclude: [{sharpness.rule: none, sharpness.gamma: 0.5}]\n"
    (tmp_path / "s.yaml").write_text(text)
    found = elements(load_sweep(tmp_path / "s.yaml"))
    assert [element.name for element in found] == [
        "none-gamma1.0", "csam-gamma0.5", "csam-gamma1.0",
    ]  # fmt: skip
    assert found[0].overrides == ("wandb.group=s", "sharpness.rule=none")
    assert "sharpness.scope=global" in found[1].overrides
    (tmp_path / "s.yaml").write_text(f"base: {SGD}\ngrid: {{sharpness.gamma: [0.5, 1.0]}}\n")
    with pytest.raises(ConfigError, match=r"belongs to sharpness\.rule=csam"):
        elements(load_sweep(tmp_path / "s.yaml"))


def test_momentum_belongs_to_optimizers_that_have_it():
    with pytest.raises(ConfigError, match=r"optimizer\.name=adamw has none"):
        build_optimizer(OptimizerConfig(name="adamw", momentum=0.5), nn.Linear(2, 2))
    build_optimizer(OptimizerConfig(name="adamw"), nn.Linear(2, 2))
