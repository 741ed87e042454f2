"""Values of every kind for every key: refused before work with a message, or rightly accepted."""

import json
import math
import random
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
from torch import nn

from flatcal_dist import config as configuration
from flatcal_dist import inputs
from flatcal_dist.config import ConfigError, load
from flatcal_dist.config.checking.choosing import CHOOSERS, keys
from flatcal_dist.data import DataError, expand, training_transform
from flatcal_dist.networks.registry import build
from flatcal_dist.runs.directory import RunDirectory
from flatcal_dist.training.optimizers import build_optimizer, build_schedule

BASE = "sharpness: {rule: sam}\nmodel: {name: mlp}\ndata: {image_size: 8, channels: 3}\n"
BASE += "train: {epochs: 400}\n"  # so that FLSc changes within the run
KEYS = list(keys())

# Numbers as the core schema of YAML 1.2 reads them, and what it calls text.
NUMBERS = {
    "0": 0, "-1": -1, "1": 1, "2": 2, "010": 10, "0o17": 15, "0x1F": 31, "3.0": 3.0, "1e3": 1e3,
    "1e-6": 1e-6, "1e20": 1e20, "1e308": 1e308, "1e300": 1e300, "5e-324": 5e-324, "-0.0": 0.0,
    ".5": 0.5, "100000": 100000, "18446744073709551615": 2**64 - 1, "18446744073709551616": 2**64,
    "99999999999999999999": 10**20 - 1,
}  # fmt: skip
TEXTS = ["1:30", "0b1", "1_000", "yes", "off", "2024-05-01", "３", "٣", "1,000", "sam", "a b"]
ODD = [
    *NUMBERS, *TEXTS, "", " ", "null", "~", "true", ".inf", "-.inf", ".nan", "1e999", "9" * 5000,
    "!!binary aGk=", "!!python/object:os.system x", "!!int word", "!!set {a}", "[]", "{}",
    "[1, 2, 3]", "[0.5]", "[.nan]", "[1e300, 1e300, 1e300]", "{a: .nan}", "{a: {b: [.inf]}}",
    "{width: -4}", "{width: 1e3}", "{depth: 0}", "{nesterov: [1]}", "{1: 2}", "{a: 1, a: 2}",
    "[" * 40 + "]" * 40, "[" * 5000 + "]" * 5000, "&a [*a]", "&a {b: *a}", "*missing",
    "[&a [1, 1, 1, 1], &b [*a, *a, *a, *a], &c [*b, *b, *b, *b], [*c, *c]]",
    '"a\\0b"', '"\\ud800"', '"a\\nb"', "'  '", "~nosuchuser/x", "{0..99999999}",
    "x{0..9999}{0..9999}.tar", "x{0..9.tar", "x" * 5000, "a/" + "b" * 300, "\ufeff1", "\t", "a: b",
    "- 1", "@x", "%x", "[", "'", "global", "[a, b]", "https://host/a.tar", "pipe:true", "\udcff",
]  # fmt: skip


@pytest.mark.parametrize("draws", [2, pytest.param(12, marks=pytest.mark.exhaustive)])
def test_every_key_with_odd_values(draws, tmp_path):
    file = tmp_path / "base.yaml"
    file.write_text(BASE)
    draw = random.Random(20)
    cases = [(key, draw.choice(ODD)) for key in KEYS for _ in range(draws)]
    cases += [(draw.choice(KEYS) + draw.choice(["", ".x", ".0", "."]), t) for t in ODD]
    wrong = []
    accepted = 0
    assert len(cases) > 300
    for key, text in cases:
        try:
            config = load(file, [*_choice(key), f"{key}={text}"])
        except ConfigError as error:
            told, named = str(error), ".".join(key.split(".")[:2])
            if not told or len(told) > 1500 or not (named in told or "override" in told):
                wrong.append((key, text[:40], told[:200]))
            continue
        except Exception as error:
            wrong.append((key, text[:40], repr(error)[:200]))
            continue
        accepted += 1
        try:
            _holds(config, key, text, tmp_path)
        except Exception as error:
            wrong.append((key, text[:40], "accepted", repr(error)[:300]))
    assert not wrong, "\n".join(map(str, wrong))
    assert accepted > 10


def _choice(key):
    """The override that chooses what reads the key, where something has to."""
    section, _, name = key.partition(".")
    chooser = CHOOSERS.get(section)
    name = name.partition(".")[0]
    owners = chooser.owners(name) if chooser and name != chooser.by else []
    if section == "schedule":  # some of them follow an average
        more = ["average={name: swa, start_epoch: 120}", "train.epochs=201"]
    else:
        more = []
    return [f"{chooser.key}={owners[-1]}", *more] if owners else []


def _holds(config, key, text, folder):
    """What was accepted means what YAML 1.2 says, survives, and can be worked with."""
    value = dict(configuration.flatten(config)).get(key)
    if text in NUMBERS and not isinstance(value, str | dict | list):
        right = NUMBERS[text]
        assert value == (float(right) if isinstance(value, float) else right)
    if text in TEXTS and key in dict(configuration.flatten(config)):
        assert value == text
    again = folder / "again.yaml"
    again.write_text(configuration.to_yaml(config), encoding="utf-8")
    assert load(again) == config
    json.dumps(config.model_dump(), allow_nan=False)
    torch.manual_seed(config.run.seed)
    RunDirectory(config.run.dir).check(config)
    train, data = config.train, config.data
    for minutes in (train.collective_timeout_minutes, train.hang_minutes, train.stop_after_minutes):
        assert minutes is None or timedelta(minutes=minutes) < timedelta(days=366)
    schedule = None
    for section in (config.objective, config.mixing, config.average, config.sharpness):
        section.build()
    assert math.isfinite(config.sharpness.rho_at(0.5))
    network = nn.Linear(2, 2)
    with suppress(ConfigError):
        optimizer = build_optimizer(config.optimizer, network)
        schedule = build_schedule(config, optimizer, 10, 2)
        schedule.step_update(3)
        if config.model.name == "mlp" and data.image_size < 100 and config.model.num_classes < 1e5:
            build("mlp", config.model.num_classes, data.channels, data.image_size,
                  config.model.options)  # fmt: skip
    training_transform(inputs.augmentation(data), min(data.image_size, 64))
    inputs.normalization(data)
    if isinstance(data.train, list) or (data.train and not inputs.remote(data.train)):
        with pytest.raises(DataError):
            expand(data.train)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.seed=18446744073709551616", "less than 18446744073709551616"),
        ("optimizer.learning_rate=1e308", "less than or equal to 1000000"),
        ("evaluate.batch_size=100000000000000000000", "less than or equal to 16777216"),
        ("evaluate.folds=100000000000000000000", "less than or equal to 1000"),
        ("data.image_size=100000", "less than or equal to 8192"),
        ("data.workers=100000", "less than or equal to 1024"),
        ("data.train=s-{0..99999999}.tar", "stands for 100,000,000 shards"),
        ("train.collective_timeout_minutes=1e300", "less than or equal to 10080"),
        ("data.stall_timeout=1e-6", "greater than or equal to 0.1"),
        ("model.options.x=.nan", "a number that is not finite"),
        ("run.dir=", "Is a variable of the shell unset? Write run.dir=null for none"),
        ("run.dir=''", "is a variable of the shell unset"),
        ("run.dir=~nosuchuser/x", "there is no user 'nosuchuser' here"),
        ("train.epochs=1:30", "write a number in decimal digits"),
        ("train.epochs=1_000", "write 1000"),
        ("train.epochs=1e3", "write 1000"),
        ("data.allow_pipe=yes", "write true"),
        ("model.options=!!binary aGk=", "No tag is needed"),
        ("data.mean=[123.7, 116.3, 103.5]", "less than or equal to 1"),
        ("sharpness.rho_min=0.5", "sharpness.rho_min = 0.5 (on the command line) belongs to"),
        ("optimizer.name=", "has no value"),
    ],
)
def test_what_would_fail_late_is_refused_at_once(tmp_path, override, message):
    (tmp_path / "a.yaml").write_text("sharpness: {rule: sam}")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "a.yaml", [override])
    assert message in str(error.value)


def test_rho_falls(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "sharpness: {rule: sam, rho: 0.1, rho_schedule: learning_rate, rho_min: 0.2}"
    )
    with pytest.raises(ConfigError, match=r"rho_min=0\.2 is above sharpness\.rho=0\.1"):
        load(tmp_path / "a.yaml")
    assert load(tmp_path / "a.yaml", ["sharpness.rho=0.2"]).sharpness.rho_min == 0.2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("010", 10), ("0o10", 8), ("0x10", 16), ("+3", 3), ("!!int 5", 5), ("'7'", None)],
)
def test_whole_numbers_are_those_of_yaml_1_2(tmp_path, text, expected):
    (tmp_path / "a.yaml").write_text(f"train: {{epochs: {text}}}")
    if expected is None:
        with pytest.raises(ConfigError, match="write 7"):
            load(tmp_path / "a.yaml")
    else:
        assert load(tmp_path / "a.yaml").train.epochs == expected


@pytest.mark.parametrize(
    "text",
    ["yes", "1e-4", "0o17", "010", "2024-05-01", "1:30", "null", "=", "<<", "a: b", "é", "~"],
)
def test_text_that_looks_like_something_else_comes_back_as_text(tmp_path, text):
    (tmp_path / "a.yaml").write_text("{}")
    config = load(tmp_path / "a.yaml", [f"model.options.x={json.dumps(text)}"])
    assert config.model.options == {"x": text}
    (tmp_path / "b.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    assert load(tmp_path / "b.yaml") == config
