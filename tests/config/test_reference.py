"""`flatcal config`: every key with what is checked of it, and configs/README.md kept equal."""

from pathlib import Path

import pytest

from flatcal_dist import cli
from flatcal_dist.config import ConfigError, load
from flatcal_dist.config.checking.choosing import CHOOSERS, keys
from flatcal_dist.config.reference import FIRST, LAST, as_text, entries, with_reference

README = Path(__file__).parents[2] / "configs/README.md"


def one(key):
    (entry,) = entries(key)
    return entry


def test_every_key_is_there_and_has_a_meaning():
    found = entries()
    assert {entry.key for entry in found} == set(keys())
    assert [entry.key for entry in found if not entry.meaning or not entry.value] == []


def test_the_readme_holds_the_reference():
    text = README.read_text()
    assert with_reference(text, "README") == text, "write it by `flatcal config --markdown`"


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("data.flip", "number from 0 to 1", "0.5"),
        ("train.max_steps", "whole number from 1 to 1,000,000,000,000 or null", "null"),
        ("data.mean", "list of numbers from 0 to 1", "[0.485, 0.456, 0.406]"),
        ("data.crop_scale", "list of 2 numbers above 0 and at most 1", "[0.08, 1.0]"),
        ("data.train", "text, list of texts or null", "null"),
        ("data.channels", "1 or 3", "3"),
        ("train.keep_best", "accuracy, nll, refined_nll or null", "null"),
        ("wandb.name", "text of at most 128 characters or null", "null"),
        ("optimizer.clip_norm", "number above 0 and at most 1e30 or null", "null"),
        ("sharpness.scope", "global, rank, node or whole number from 1 to 1,048,576", "global"),
        ("evaluate.at_end", "true or false", "true"),
        ("model.options", "keys and values", "{}"),
        ("schedule.milestones", "list of numbers above 0 and at most 1,000,000", "[30.0, 60.0]"),
    ],
)
def test_types_bounds_and_defaults_in_words(key, value, default):
    assert (one(key).value, one(key).default) == (value, default)


def test_defaults_are_read_back_as_the_defaults(tmp_path):
    """Each printed default, written as an override, changes nothing."""
    plain = [entry for entry in entries() if entry.section not in CHOOSERS and not entry.only]
    assert len(plain) > 50
    assert load(None, [f"{entry.key}={entry.default}" for entry in plain]) == load(None)


def test_keys_say_which_choices_have_them():
    assert one("sharpness.decouple").only == "sharpness.rule=wsam"
    defaults = {entry.only: entry.default for entry in entries("sharpness.gamma")}
    assert defaults == {"sharpness.rule=csam": "1.0", "sharpness.rule=wsam": "0.9"}
    assert one("sharpness.rho").only == "sharpness.rule other than none"
    assert one("sharpness.rho_min").only.endswith("and sharpness.rho_schedule=learning_rate")
    assert one("data.flip").only == "data.augmentation=resized_crop or pad_crop"
    defaults = {entry.only: entry.default for entry in entries("mixing.alpha")}
    assert defaults == {
        "mixing.name=cutmix": "1.0",
        "mixing.name=mixup": "0.2",
        "mixing.name=regmixup": "10.0",
    }
    assert "csam: Calibrated SAM" in as_text(entries("sharpness.rule"))


def test_a_section_or_what_lies_below_a_free_key_can_be_asked_for():
    assert {entry.section for entry in entries("schedule")} == {"schedule"}
    assert [entry.key for entry in entries("model.options.width")] == ["model.options"]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("sharpness.roh", "did you mean sharpness.rho?"),
        ("rho", "did you mean sharpness.rho?"),
        ("shrapness", "did you mean sharpness?"),
        ("sharpness.rho=0.1", "did you mean sharpness.rho?"),
        ("train.epochs.x", "no such key"),
        ("train.label_smoothing", "objective: {name: label_smoothing"),
        ("", "no such key"),
        ("\x1b[2J", "no such key"),
        ("x" * 5000, "`flatcal config` lists all of them"),
    ],
)
def test_a_wrong_key_names_the_nearest(key, told):
    with pytest.raises(ConfigError) as error:
        entries(key)
    assert told in str(error.value)
    assert len(str(error.value)) < 300


def test_the_command_prints_one_key(capsys):
    cli.main(["config", "data.flip"])
    assert capsys.readouterr().out.splitlines() == [
        "data.flip",
        "    The probability of a horizontal flip.",
        "    number from 0 to 1; default 0.5; only with data.augmentation=resized_crop or pad_crop",
    ]


def test_markdown_changes_nothing_outside_of_its_marker_lines(tmp_path, capsys):
    file = tmp_path / "keys.md"
    file.write_text(f"before\n{FIRST}\nLEFT OVER\n{LAST}\nafter\n")
    cli.main(["config", "--markdown", str(file)])
    text = file.read_text()
    assert text.startswith(f"before\n{FIRST}\n")
    assert text.endswith(f"{LAST}\nafter\n")
    assert "LEFT OVER" not in text
    assert "| `sharpness.gamma` | number from 0 to 2 | `1.0` |" in text


@pytest.mark.parametrize(
    "text", ["", f"{LAST}\n{FIRST}\n", f"{FIRST}\n", f"{FIRST}\n{FIRST}\n{LAST}\n", None, b"\xff"]
)
def test_markdown_refuses_a_file_without_marker_lines(tmp_path, text, capsys):
    file = tmp_path / "keys.md"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        cli.main(["config", "--markdown", str(file)])
    assert f"--markdown {file}" in str(ended.value)
    if text is not None:
        assert file.read_bytes() == (text if isinstance(text, bytes) else text.encode())
