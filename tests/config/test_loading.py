"""Configuration: inheritance, overrides, and errors that say how to mend them."""

from pathlib import Path

import pytest

from flatcal_dist import config as configuration
from flatcal_dist.config import ConfigError, load
from flatcal_dist.config.method import method_of
from flatcal_dist.config.parser import command_line

SAM = ("sharpness.rule=sam", "sharpness.allow_other_samples=true")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ("cifar10", "cifar100", "tiny_imagenet")
SHIPPED = sorted(
    path
    for folder in ("digits", *SMALL, "imagenet")
    for path in (ROOT / f"configs/{folder}").glob("*.yaml")
)
METHODS = sorted((ROOT / "configs/methods").glob("*.yaml"))


@pytest.fixture
def file(tmp_path):
    """Write configuration files by name; gives the path of the last one."""

    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path / f"{name}.yaml"

    return write


def test_later_wins_file_by_file_then_the_command_line(file):
    path = file(
        a="sharpness: {rule: csam, rho: 0.1, gamma: 0.5}\ntrain: {epochs: 7}",
        b="inherits: a.yaml\nsharpness: {rho: 0.2}",
        c="inherits: [a.yaml, b.yaml]\nsharpness: {rule: csam}",
    )
    config = load(path, ["train.epochs=3", "model.options.width=64"])
    assert (config.sharpness.rule, config.sharpness.rho) == ("csam", 0.2)
    assert config.sharpness.gamma == 0.5
    assert config.train.epochs == 3
    assert config.model.options == {"width": 64}


def test_several_files_are_as_if_the_last_inherited_the_others(file):
    file(a="sharpness: {rule: csam, rho: 0.1, gamma: 0.5}\ntrain: {epochs: 7}", b="mixing: {}")
    path = file(c="sharpness: {rule: sam, rho: 0.3}", d="inherits: [a.yaml, c.yaml]")
    folder = path.parent
    several = load([folder / "a.yaml", folder / "c.yaml"], ["run.seed=4"])
    one = load(path, ["run.seed=4"])
    assert several.model_dump(exclude={"run"}) == one.model_dump(exclude={"run"})
    assert (several.sharpness.rule, several.sharpness.rho, several.run.seed) == ("sam", 0.3, 4)
    named, last = several.run.dir, one.run.dir
    assert named == last.replace("_d-", "_a+c-"), "equal configurations, with equal fingerprints"
    with pytest.raises(ConfigError, match=r"sharpness.gamma .*c\.yaml|gamma"):
        load([folder / "a.yaml", file(e="sharpness: {rule: sam, gamma: 2}")])


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_a_method_goes_over_any_network_and_data(method):
    longest = {"imagenet/resnet50_sgd", "imagenet/vit_s16_adamw", "tiny_imagenet/resnet18_sgd"}
    for base in ("cifar10/resnet18_sgd", "cifar100/resnet18_sgd", *sorted(longest)):
        files = [ROOT / f"configs/{base}.yaml", method]
        if method.stem == "late_sam" and base in longest:  # it says so: fewer epochs than 160
            with pytest.raises(ConfigError, match="start_epoch=160 comes after the last step"):
                load(files)
            continue
        config, plain = load(files), load(files[0])
        assert config.model == plain.model
        assert method_of(config) != method_of(plain)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configurations_load_and_round_trip(path, tmp_path):
    config = load(path)
    (tmp_path / "again.yaml").write_text(configuration.to_yaml(config))
    assert load(tmp_path / "again.yaml") == config


def test_the_names_that_others_rely_on_exist():
    names = {f"{path.parent.name}/{path.stem}" for path in SHIPPED}
    assert names == {
        "cifar10/resnet8_sgd",
        *(f"digits/{method}" for method in ("sgd", "sam", "csam", "swa", "fmfp")),
        *(
            f"{data}/resnet18_{method}"
            for data in SMALL
            for method in ("sgd", "sam", "csam", "fmfp")
        ),
        *(f"imagenet/resnet50_{method}" for method in ("sgd", "sam", "csam", "sam_foret")),
        *(f"imagenet/vit_s16_{method}" for method in ("adamw", "sam", "csam")),
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sharpness.roh=1", "sharpness.roh: no such key (on the command line); did you mean"),
        ("rho=1", "rho: no such key (on the command line); did you mean sharpness.rho?"),
        ("optimizer.lr=1", "did you mean optimizer.learning_rate?"),
        ("optimizer.foo=1", "no such key (on the command line); `flatcal config optimizer` lists"),
        ("Train={}", "did you mean train?"),
        ("mixup.alpha=1", "mixup is a choice of mixing: write mixing.name=mixup"),
        ("grid={}", "this is a key of a study, which `recipes/study.py` reads"),
        ("train=null", "set one of its keys, or write {} to clear what was inherited"),
        (
            "sharpness.rule=null",
            "sharpness.rule = None (on the command line): expected one of none",
        ),
        ("sharpness.rule=M-SAM", "stale_sam, wsam; did you mean sam?"),
        ("evaluate.confidence=trust_score", "a valid list; write [trust_score]"),
        ("model.options=3", "write keys and values: {key: value}"),
        (
            "sharpness={rule: sam, rho: -1}",
            "sharpness.rho = -1 (on the command line): input",
        ),
        ("sharpness={rule: asam, rho: .nan}", "sharpness.rho = nan (on the command line): input"),
        ("sharpness=sam", "this is a section; set one of its keys: sharpness.rule=sam"),
        ("average=none", "this is a section; set one of its keys: average.name=none"),
        ("objective=[focal]", "objective = ['focal'] (on the command line): this is a section"),
        (
            "sharpness.rule=same",
            "expected one of none, asam, csam, friendly_sam, functional_sam, gsam, le_sam, "
            "looksam, momentum_sam, sam, ssam, stale_sam, wsam",
        ),
        ("sharpness={rule: csam, gamma: 2.1}", "input should be less than or equal to 2"),
        ("train.epochs=2.5", "train.epochs = 2.5 (on the command line): input should be a valid"),
        ("train.epochs=yes", "train.epochs = 'yes'"),
        ("train.epochs.x=1", "train.epochs = {'x': 1}"),
        ("data=3", "data = 3 (on the command line): this is a section"),
        ("data.channels=1", "data.mean has 3 values for data.channels=1"),
        ("data.crop_scale=[0.9,0.1]", "0 < smallest <= largest <= 1"),
        ("train.epochs", "'train.epochs' is not an override: write key.sub=value"),
        ("train.epochs=[", "is not valid YAML"),
        ("optimizer.learning_rate=0,1", "a decimal point is no comma: write 0.1"),
        ("data.global_batch_size=1,024", "write 1024"),
        ("train.max_steps=None", "write null for none"),
        ("train.engine=zero9", "train.engine = 'zero9'"),
    ],
)
def test_bad_overrides_are_refused(file, override, message):
    with pytest.raises(ConfigError) as error:
        load(file(a="{}"), [override])
    assert message in str(error.value)


def test_csam_refuses_soft_labels(file):
    with pytest.raises(ConfigError, match=r"from hard labels: set objective\.name=cross_entropy"):
        load(file(a="sharpness: {rule: csam}\nobjective: {name: label_smoothing}"))
    for name in ("mixup", "cutmix", "mixup_cutmix"):
        with pytest.raises(ConfigError, match=r"mixing makes soft ones: set mixing\.name=none"):
            load(file(a=f"sharpness: {{rule: csam}}\nmixing: {{name: {name}}}"))
        with pytest.raises(ConfigError, match=r"objective\.name=focal is defined for hard labels"):
            load(file(a=f"objective: {{name: focal}}\nmixing: {{name: {name}}}"))
        for rule in ("none", "sam", "asam", "looksam"):
            load(file(a=f"sharpness: {{rule: {rule}}}\nmixing: {{name: {name}}}"))


@pytest.mark.parametrize(
    "key", ["auto_augment: autoaugment", "color_jitter: 0.4", "random_erasing: 1.0"]
)
def test_no_augmentation_means_none(file, key):
    with pytest.raises(ConfigError, match="augmentation=none varies nothing"):
        load(file(a=f"data: {{augmentation: none, {key}}}"))


def test_the_magnitude_of_augmix_ends_at_ten(file):
    path = file(a="data: {auto_augment: augmix}")
    assert load(path).data.auto_augment_magnitude == 9
    with pytest.raises(ConfigError, match="between 1 and 10, not 11"):
        load(path, ["data.auto_augment_magnitude=11"])


def test_the_decoder_belongs_to_the_run_and_the_limit_does_not(file):
    old = load(file(a="{}"))
    new = load(file(a="{}"), ["data.decoder=pil", "data.max_bad_samples=0"])
    assert [line.split(":")[0] for line in configuration.differences(old, new)] == ["data.decoder"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharpness: {rho: 1, rho: 2}", "key written twice: rho"),
        ("- a\n- b", "must hold keys and values, not a list"),
        ("inherits: missing.yaml", "missing.yaml, inherited by"),
        ("inherits: a.yaml", "inherits itself"),
        ("sharpness: {roh: 1}", "a.yaml); did you mean sharpness.rho?"),
    ],
)
def test_bad_files_are_refused(file, text, message):
    with pytest.raises(ConfigError) as error:
        load(file(a=text))
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nowhere.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_an_empty_mapping_clears_what_was_inherited(file):
    path = file(a="model: {options: {width: 1}}", b="inherits: a.yaml")
    assert load(path, ["model.options={}"]).model.options == {}
    assert load(path, ["model.options.depth=2"]).model.options == {"width": 1, "depth": 2}


def test_an_error_names_the_last_to_write_the_value(file):
    path = file(a="sharpness: {rho: 0.1}")
    with pytest.raises(ConfigError, match=r"sharpness = 3 \(on the command line\)"):
        load(path, ["sharpness=3"])


def test_exponents_are_numbers(file):
    assert load(file(a="optimizer: {learning_rate: 1e-3}")).optimizer.learning_rate == 1e-3


def test_the_run_directory_is_a_function_of_what_is_computed(file):
    path = file(a="{}")
    first = load(path).run.dir
    assert first == load(path).run.dir
    assert first == load(path, ["wandb.mode=online", "data.workers=1"]).run.dir
    assert first != load(path, ["run.seed=1"]).run.dir


def test_differences_name_the_keys_that_matter(file):
    path = file(a="{}")
    old = load(path, ["model.options.a=1", "sharpness.rule=sam"])
    words = ["sharpness.rule=csam", "sharpness.rho=0.3", "data.workers=9", "run.dir=x"]
    lines = configuration.differences(old, load(path, words))
    assert len(lines) == 4  # options: {a: 1} against {} counts as the key gone and the empty value
    assert "sharpness.rho: the run has 0.05, now 0.3" in lines
    assert "sharpness.rule: the run has 'sam', now 'csam'" in lines
    assert not configuration.differences(old, load(path, ["model.options.a=1", *SAM]))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("sharpness.start_epoch=90", r"start_epoch=90 comes after the last step .* 90 epochs"),
        ("sharpness.start_epoch=5 train.epochs=5", "start_epoch=5 comes after the last step"),
        ("sharpness.start_epoch=5 sharpness.stop_epoch=5", "is not after sharpness.start_epoch=5"),
        ("sharpness.start_epoch=-1", "greater than or equal to 0"),
    ],
)
def test_a_rule_that_would_never_perturb_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        load(None, ["sharpness.rule=sam", *words.split()])


def test_a_rule_may_begin_in_the_last_epoch_and_end_in_the_first():
    late = load(None, ["sharpness.rule=sam", "sharpness.start_epoch=89"]).sharpness
    assert [late.perturbs_in(epoch) for epoch in (0, 88.99, 89, 89.9)] == [False, False, True, True]
    early = load(None, ["sharpness.rule=sam", "sharpness.stop_epoch=0.5"]).sharpness
    assert [early.perturbs_in(epoch) for epoch in (0, 0.49, 0.5)] == [True, True, False]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("objective.name=label_smoothing objective.spread=others objective.smoothing=0.6 "
         "model.num_classes=2", "does not fit model.num_classes"),
        ("objective.name=flsd objective.low=0.7 objective.high=0.2", "above objective.high"),
        ("objective.name=focal objective.plain_epochs=150", "changes in epoch 150, counted from 0"),
        ("objective.name=flsc train.epochs=100", "changes in epoch 100, .* the run has 100 epochs"),
        ("objective.name=flsc objective.second_from=9 objective.third_from=3", "objective.third"),
        ("sharpness.name=sam", r"sharpness.name: no such key .* did you mean sharpness.rule\?"),
        ("objective.rule=focal", r"did you mean objective.name\?"),
        ("sharpness.rule=sma", r"did you mean sam\?"),
        ("objective.name=crl sharpness.rule=looksam sharpness.share=0.5", "set sharpness.share=1"),
    ],
)  # fmt: skip
def test_settings_of_an_objective_that_cannot_be_true_are_refused_at_load(words, told):
    with pytest.raises(ConfigError, match=told):
        load(None, words.split())


def test_config_may_stand_several_times_on_the_command_line():
    parser = command_line("", Path("default.yaml"))
    files = [Path("a.yaml"), Path("b.yaml")]
    for words, expected in (
        ([], Path("default.yaml")),
        (["--config", "a.yaml"], files[:1]),
        (["--config", "a.yaml", "x.y=1", "--config=b.yaml"], files),
    ):
        assert parser.parse_intermixed_args(words).config == expected
    assert parser.parse_intermixed_args(["--config", "a.yaml", "k=1"]).overrides == ["k=1"]
