"""Keys that only one choice reads are refused beside another, and make no other run."""

from pathlib import Path

import pytest
import yaml
from torch import nn

from flatcal_dist import config as configuration
from flatcal_dist.choices import found_in
from flatcal_dist.config import ConfigError, OptimizerConfig, load
from flatcal_dist.config.checking import choosing
from flatcal_dist.objectives import Focal
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.sharpness import CSAM, SAM, MomentumSAM, StepError
from flatcal_dist.studies.elements import elements
from flatcal_dist.studies.file import load_study
from flatcal_dist.studies.published import read_published
from flatcal_dist.training.optimizers import build_optimizer

ROOT = Path(__file__).resolve().parents[2]
RUNS = {  # of the shipped studies
    "cifar10_causes": 39, "cifar10_cost": 24, "cifar10_methods": 30, "digits_scope": 45,
    "digits": 3, "digits_choosing": 150, "digits_rho_gamma": 30, "digits_methods": 3 * 24 * 5,
    "foret2021_imagenet": 18,
    "guo2017_cifar10": 12, "guo2017_cifar100": 12, "tan2026_cifar10": 24,
    "tan2026_imagenet_resnet50": 3, "tan2026_imagenet_vit_s16": 3,
    "zhu2022_cifar10": 156, "zhu2022_cifar100": 156, "zhu2022_tiny_imagenet": 18,
}  # fmt: skip
SGD = ROOT / "configs/digits/sgd.yaml"


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("sharpness.gamma=2", "sharpness.rule=csam"),
        ("sharpness.gamma=1.0", "sharpness.rule=csam"),  # its default: asked for all the same
        ("sharpness.alpha=3", "sharpness.rule=gsam or looksam"),
        ("sharpness.momentum=0.5", "sharpness.rule=momentum_sam"),
        ("sharpness.eta=0.1", "sharpness.rule=asam"),
        ("sharpness.rho=0.1", "sharpness.rule other than none"),
        ("sharpness.scope=rank", "sharpness.rule other than none"),
        ("sharpness.rho_min=0.01", "sharpness.rule other than none"),
        ("average.decay=0.9", "average.name=ema"),
        ("objective.smoothing=0.2", "objective.name=label_smoothing"),
        ("schedule.milestones=[3.0]", "schedule.name=multi_step"),
        ("data.flip=0.1", "data.augmentation=resized_crop or pad_crop"),
        ("data.auto_augment_magnitude=3", "data.auto_augment=randaugment or augmix"),
        ("mixing.probability=0.5", "mixing.name other than none"),
        ("mixing.alpha=0.5", "mixing.name=cutmix or mixup"),
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


def test_an_unknown_key_is_named_before_what_follows_from_it(tmp_path):
    """Without the choice, which is misspelled or in the file that is not inherited."""
    file = tmp_path / "a.yaml"
    for text, message in {
        "inherit: base.yaml\nsharpness: {rho: 0.2}": "inherit: no such key .*did you mean inherits",
        "sharpness: {rules: csam, gamma: 1}": "sharpness.rules: no such key .*sharpness.rule",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message) as error:
            load(file)
        assert "belongs to" not in str(error.value)


def test_what_is_chosen_makes_the_fingerprint_and_nothing_else(tmp_path):
    """A file that others inherit may hold the keys of its own choice."""
    (tmp_path / "base.yaml").write_text("sharpness: {rule: csam, rho: 0.1, gamma: 2.0}")
    (tmp_path / "plain.yaml").write_text("inherits: base.yaml\nsharpness: {rule: none}")
    plain, bare = load(tmp_path / "plain.yaml"), load(None, ["run.dir=x"])
    assert configuration.fingerprint(plain) == configuration.fingerprint(bare)
    assert not configuration.differences(plain, bare)
    assert plain.model_dump()["sharpness"] == {"rule": "none"}
    csam = load(tmp_path / "plain.yaml", ["sharpness.rule=csam"])
    assert (csam.sharpness.rho, csam.sharpness.gamma) == (0.1, 2.0)
    sam = load(tmp_path / "plain.yaml", ["sharpness.rule=sam"])
    assert sam.sharpness.rho == 0.1
    assert "gamma" not in sam.model_dump()["sharpness"]
    (tmp_path / "base.yaml").write_text("sharpness: {rule: sam, gamma: 2.0}")
    with pytest.raises(ConfigError, match=r"gamma = 2.0 \(in .*base.yaml\) belongs to .*rule=csam"):
        load(tmp_path / "base.yaml")


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """It recorded all keys that there were, those that it did not read among them."""
    words = ["average.name=ema", "average.decay=0.9", "sharpness={rule: sam, every: 2}"]
    words += ["objective={name: label_smoothing, smoothing: 0.3}", "mixing.name=mixup_cutmix"]
    config = load(SGD, [f"run.dir={tmp_path}/run", *words])
    directory = RunDirectory(config.run.dir)
    directory.checkpoints.mkdir(parents=True)
    old = config.model_dump()
    for section in ("average", "objective", "mixing", "schedule"):
        del old[section]
    old["train"] |= {"average": "ema", "average_decay": 0.9, "label_smoothing": 0.3,
                     "average_norm_statistics": "reestimate"}  # fmt: skip
    old["data"] |= {"mixup": 0.8, "cutmix": 1.0, "mix_probability": 1.0}
    old["sharpness"] |= {"gamma": 1.0, "eta": 0.01, "alpha": None, "momentum": 0.9}
    directory.config_file.write_text(yaml.safe_dump(old))
    directory.check(config)
    assert load(directory.config_file, recorded=True) == config
    with pytest.raises(ConfigError) as error:
        load(directory.config_file)
    assert "train.label_smoothing (in" in str(error.value)
    assert "objective: {name: label_smoothing, smoothing: ...}" in str(error.value)
    old["sharpness"], old["train"]["average"] = {"rule": "none", "every": None, "rho": 0.05}, "none"
    directory.config_file.write_text(yaml.safe_dump(old))
    assert load(directory.config_file, recorded=True).average.name == "none"


def test_every_condition_names_keys_that_exist_and_is_decided_by_keys_that_exist():
    from flatcal_dist.config.checking.conditions import CONDITIONS

    for condition in CONDITIONS:
        assert {*condition.keys, *condition.by} <= set(choosing.keys())


def test_a_new_class_in_a_package_is_a_new_choice(tmp_path, monkeypatch):
    package = tmp_path / "shapes_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("class Shape: pass")
    (package / "round.py").write_text(
        "from shapes_of_a_test import Shape\n"
        "class Circle(Shape):\n    name = 'circle'\n"
        "class Unnamed(Circle): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from shapes_of_a_test import Shape

    class Elsewhere(Shape):
        name = "elsewhere"

    assert list(found_in("shapes_of_a_test", Shape)) == ["circle"]
    (package / "twin.py").write_text((package / "round.py").read_text())
    with pytest.raises(TypeError, match="both called circle"):
        found_in("shapes_of_a_test", Shape)


def test_only_runs_that_differ_in_their_seed_share_a_setting():
    first = load(SGD, ["sharpness.rule=sam", "run.seed=3", "run.dir=x", "data.workers=2"])
    setting = configuration.setting_of(first)
    assert setting.startswith("sam mlp ")
    assert configuration.setting_of(load(SGD, ["sharpness.rule=sam"])) == setting
    for other in ("sharpness.rho=0.1", "optimizer.name=adamw", "train.epochs=3", "data.train=a.tar",
                  "average.name=swa", "model.options.width=3"):  # fmt: skip
        words = ["sharpness.rule=sam", other]
        assert configuration.setting_of(load(SGD, words)) != setting, other


def test_bounds_of_a_field_hold_for_the_class_as_well():
    for wrong, name in ((CSAM, "gamma"), (SAM, "rho"), (SAM, "every"), (MomentumSAM, "momentum")):
        for value in (-1, float("nan"), "0.1", None, True, 1e9):
            with pytest.raises(StepError, match=f"{wrong.__name__}: {name} = "):
                wrong(**{name: value})
    with pytest.raises(ValueError, match=r"Focal: gamma = -1"):
        Focal(gamma=-1)
    assert SAM(1).rho == 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=str)
def test_shipped_studies_load_and_their_published_figures_are_of_their_runs(path):
    study = load_study(path)
    found = elements(study)
    assert len(found) == RUNS[path.stem]
    for element in found[:: 5 if len(found) < 50 else 50]:
        assert load(study.base, element.arguments) == element.config
    if study.published:
        places = {axis: list(names) for axis, names in study.axes.items()} | study.grid
        for figure in read_published(study.published, places):
            assert any(figure.matches(element.point) for element in found), figure


def test_a_grid_over_rules_and_their_keys(tmp_path):
    """Plain training has no gamma, so two such points of the grid are one run."""
    text = (
        f"base: {SGD}\nset: {{sharpness.scope: global}}\ngrid:\n  sharpness.rule: [none, csam]\n"
        "  sharpness.gamma: [0.5, 1.0]\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"compute the same(?s:.*)leave one of them out by `exc"):
        elements(load_study(tmp_path / "s.yaml"))
    text += "exclude: [{sharpness.rule: none, sharpness.gamma: 0.5}]\n"
    (tmp_path / "s.yaml").write_text(text)
    found = elements(load_study(tmp_path / "s.yaml"))
    assert [element.name for element in found] == [
        "none-gamma1.0", "csam-gamma0.5", "csam-gamma1.0",
    ]  # fmt: skip
    assert found[0].overrides == ("wandb.group=s", "sharpness.rule=none")
    assert "sharpness.scope=global" in found[1].overrides
    (tmp_path / "s.yaml").write_text(f"base: {SGD}\ngrid: {{sharpness.gamma: [0.5, 1.0]}}\n")
    with pytest.raises(ConfigError, match=r"belongs to sharpness\.rule=csam"):
        elements(load_study(tmp_path / "s.yaml"))


def test_momentum_belongs_to_optimizers_that_have_it():
    with pytest.raises(ConfigError, match=r"optimizer\.name=adamw has none"):
        build_optimizer(OptimizerConfig(name="adamw", momentum=0.5), nn.Linear(2, 2))
    build_optimizer(OptimizerConfig(name="adamw"), nn.Linear(2, 2))


def test_a_key_of_one_name_and_another_meaning_is_not_inherited(tmp_path):
    """CSAM's gamma is no WSAM's, GSAM's alpha no LookSAM's, and each objective has its weight."""
    base = tmp_path / "base.yaml"
    base.write_text(
        "sharpness: {rule: csam, rho: 0.2, every: 2, gamma: 0.5}\n"
        "objective: {name: cross_entropy}\nmixing: {name: none}\n"
    )
    wsam = load(base, ["sharpness.rule=wsam"]).sharpness
    assert (wsam.rho, wsam.every, wsam.gamma) == (0.2, 2, 0.9)
    assert load(base, ["sharpness.rule=wsam", "sharpness.gamma=0.7"]).sharpness.gamma == 0.7
    assert load(base, ["sharpness.rule=csam"]).sharpness.gamma == 0.5, "the choice is the same"
    assert load(base, ["sharpness.rule=looksam"]).sharpness.every == 2, "it means the same"
    child = tmp_path / "child.yaml"
    child.write_text("inherits: base.yaml\nsharpness: {rule: wsam}\n")
    assert load(child, []).sharpness.gamma == 0.9
    assert load(child, ["sharpness.rule=csam"]).sharpness.gamma == 0.5, "and back"
    base.write_text("sharpness: {gamma: 0.5}\n")
    assert load(base, ["sharpness.rule=wsam"]).sharpness.gamma == 0.5, "it was meant for any"
