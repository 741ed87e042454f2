"""Configuration files as they come from other systems and editors, and names that are no files."""

import os
import shlex
import threading
from pathlib import Path

import pytest

from flatcal_dist.config import ConfigError, load
from flatcal_dist.config.yaml_core import MAX_DEPTH, as_override, parse_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "content",
    [
        b"train:\r\n  epochs: 7\r\n",  # Windows
        b"\xef\xbb\xbftrain:\n  epochs: 7\n",  # a byte order mark
        "train:\n  epochs: 7\n".encode("utf-16"),  # `>` in a PowerShell
        b"%YAML 1.2\n---\ntrain: {epochs: 7}\n...\n",
        b"# only: a comment\ntrain: {'epochs': 7} # and one more",
        b"train: {epochs: !!int 7}",
        b'{"train": {"epochs": 7}}',  # JSON
        b"x: &x {epochs: 9}\ntrain:\n  <<: *x\n  epochs: 7\n",
        b"train:\n  <<: [{epochs: 7}, {epochs: 9}]\n",
        "train: {epochs: 7}\nwandb: {name: 'Läufe 走る'}\n".encode(),
    ],
    ids=lambda content: content[:20],
)
def test_files_of_other_systems_are_read(content, tmp_path):
    (tmp_path / "a file.yaml").write_bytes(content)
    if content.startswith(b"x:"):
        with pytest.raises(ConfigError, match="x: no such key"):
            load(tmp_path / "a file.yaml")
        (tmp_path / "a file.yaml").write_bytes(content.replace(b"x: &x", b"data: &x {}\nwandb: &x"))
        return
    assert load(tmp_path / "a file.yaml").train.epochs == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train:\n\tepochs: 7\n", "indented with a tab: write spaces"),
        (b"train: {epochs: 7}\ntrain: {epochs: 8}\n", "key written twice: train"),
        (b"train: {epochs: 7, 'epochs': 8}", "key written twice: epochs"),
        (b"train: {epochs: 7}\n---\ntrain: {}\n", "is not valid YAML"),
        (b"\xff\xfetrain\xe9", "must hold keys and values"),
        (b"train: {epochs: 7}\n\x00", "is not valid YAML"),
        ("name: Läufe".encode("latin-1"), "It is not text in UTF-8: save it so"),
        ("name: a".encode("utf-16-le"), "It is not text in UTF-8: save it so"),
        (b"train.epochs: 7", "train.epochs: no such key"),
        (b"train.epochs: 7", "write epochs into the section train"),
        (b"train: {sharpness.rho: 7}", "write rho into the section sharpness"),
        (b"data: {global-batch-size: 7}", "did you mean data.global_batch_size?"),
        (b"Optimiser: {}", "Optimiser: no such key"),
        (b"Optimiser: {}", "did you mean optimizer?"),
        ("train:\n\u00a0 epochs: 7".encode(), "'\\xa0 epochs': no such key"),
        (b"1: 2", "a key has to be a word, not '1'"),
        (b"true: 2", "a key has to be a word"),
        (b"? [a, b]\n: 2", "a key has to be a word, not 'a list or a mapping'"),
        (b"!!python/name:os.system", "No tag is needed"),
        (b"train: !!timestamp 2024-05-01", "No tag is needed"),
        (b"train: {epochs: !!int word}", "is not a whole number that can be read"),
        (b"optimizer: {momentum: !!float word}", "is not a number"),
        (b"train: {epochs: !!bool 7}", "is not valid YAML"),
        (b"train: &a {epochs: *a}", "cannot be read: at most"),
        (b"train: *nowhere", "is not valid YAML"),
        (b"train: {<<: 7}", "<< merges a mapping"),
        (b"train: &a {<<: *a, epochs: 0}", "train.epochs = 0"),
        (b"inherits: 5", "inherits = 5: expected the name of a file, or a list of names"),
        (b"inherits: [5]", "expected the name of a file, or a list of names"),
        (b"inherits: {a: b}", "expected the name of a file, or a list of names"),
        (b"inherits: null", "expected the name of a file, or a list of names"),
        (b"inherits: .", "Is a directory"),
        (b"inherits: ~nosuchuser/a.yaml", "cannot read the configuration"),
        (b"inherits: [a.yaml]", "inherits itself"),
        (b"inherits: https://host/a.yaml", "A URL is not read"),
        (b"text", "must hold keys and values, not a str"),
        (b"train:", "train = None"),
        (b"x: " + b"[" * 3000, "at most 32 levels"),
        (b"data: {train: [" + b"{0..9}," * 3 + b"'{0..9999999}']}", "stands for 10,000,000 shards"),
        (b"run: {dir: ''}", "is a variable of the shell unset?"),
        (b"#" * (17 << 20), "is larger than 16 MiB"),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else "",
)
def test_files_that_cannot_be_read_are_refused(content, message, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value)
    assert "a.yaml" in str(error.value) or "nosuchuser" in str(error.value)


def test_aliases_count_as_often_as_they_are_used(tmp_path):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="aliases counted as often as they are used"):
        load(tmp_path / "a.yaml")


def test_a_text_that_is_read_again_is_not_what_was_changed_meanwhile():
    text = "a: {b: [1, 2]}"
    first = parse_yaml(text, "x")
    first["a"]["b"].append(3)
    assert parse_yaml(text, "x") == {"a": {"b": [1, 2]}}


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_more_brackets_than_are_allowed_are_refused_before_all_are_read(opening):
    """The refusal comes first, though the text ends in what no YAML can have."""
    allowed = opening * MAX_DEPTH
    with pytest.raises(ConfigError, match="is not valid YAML"):
        parse_yaml(allowed + " %", "x")
    with pytest.raises(ConfigError, match="at most 32 levels"):
        parse_yaml(opening * (MAX_DEPTH + 1) + " %", "x")


def test_files_that_inherit_each_other_twice_over_are_bounded(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.yaml").write_text(
            f"inherits: [{number + 1}.yaml, {number + 1}.yaml]"
        )
    (tmp_path / "20.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="inherits too many files"):
        load(tmp_path / "0.yaml")
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"inherits: {number + 1}.yaml")
    (tmp_path / "60.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="inherits too many files"):
        load(tmp_path / "0.yaml")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".", "Is a directory"),
        ("https://host/config.yaml", "A URL is not read: download the file"),
        ("s3://bucket/config.yaml", "A URL is not read"),
        ("nowhere.yaml", "No such file"),
        ("a\0b.yaml", "cannot read the configuration"),
        ("x" * 300, "File name too long"),
    ],
)
def test_names_that_are_no_files(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("{}")
    with pytest.raises(ConfigError) as error:
        load(name)
    assert message in str(error.value)
    if name == ".":
        assert "such as mine.yaml" in str(error.value)


def test_a_configuration_from_a_pipe(tmp_path):
    """`--config <(command)`: the default name of the run's directory is a plain one."""
    pipe = tmp_path / "pipe:[7]"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=("train: {epochs: 7}",), daemon=True).start()
    config = load(pipe)
    assert config.train.epochs == 7
    assert config.run.dir.rsplit("/", 1)[1].startswith(f"{tmp_path.name}_pipe_7_-")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs= 7 ", "epochs", 7),
        (" train.epochs =7", "epochs", 7),
        ("train.max_steps=null", "max_steps", None),
        ("train.max_steps=~", "max_steps", None),
        ("train.keep_best='nll'", "keep_best", "nll"),
        ("train={epochs: 7, engine: fsdp2}", "engine", "fsdp2"),
    ],
)
def test_overrides_as_they_are_typed(override, key, value, tmp_path):
    assert getattr(load(None, ["train.epochs=5", override]).train, key) == value


@pytest.mark.parametrize(
    "override",
    ["train.epochs", "=7", "train..epochs=7", ".train=7", "train.=7", "", " = ", "a" * 999],
)
def test_what_is_no_override(override):
    with pytest.raises(ConfigError, match="is not an override: write key"):
        load(None, [override])


@pytest.mark.parametrize("text", ["*.tar", "{0..3}.tar", "%20", "@x", "a: b: c", "it's: a: b"])
def test_a_text_that_yaml_cannot_read_is_shown_in_quotes(text):
    with pytest.raises(ConfigError, match="If it is a text, put it into quotes: ") as error:
        load(None, [f"data.train={text}"])
    (word,) = shlex.split(str(error.value).rpartition("quotes: ")[2])
    assert load(None, [word]).data.train == text


@pytest.mark.parametrize("value", ["None", "$HOME/x", "a/${DATA}", "s3://$BUCKET/a.tar"])
def test_words_of_other_languages_are_no_names(value):
    with pytest.raises(ConfigError, match=r"null for none|is not replaced by its value here"):
        load(None, [f"data.train={value}"])
    assert load(None, ["run.dir=a$b/$"]).run.dir == "a$b/$"
    assert load(None, ["data.train=pipe:cat $DATA/a.tar"]).data.train == "pipe:cat $DATA/a.tar"


def test_an_alias_of_an_empty_section_is_a_section_of_its_own(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {options: &none {}}\noptimizer: {options: *none}\n")
    config = load(path, ["model.options.width=64"])
    assert (config.model.options, config.optimizer.options) == ({"width": 64}, {})


@pytest.mark.parametrize("value", ["a #b", "*x", "{a,b}/c", "😀: #", "7", "", ["😀", "é", "a: b"]])
def test_overrides_that_are_written_are_read_back(value):
    key, _, text = as_override("model.options.x", value).partition("=")
    assert load(None, [f"{key}={text}"]).model.options == {"x": value}


@pytest.mark.parametrize("text", ["#", "run #1", "[a, b] # c", " #x"])
def test_a_comment_in_an_override_is_not_lost(text):
    with pytest.raises(ConfigError, match="is a comment in YAML, and would be lost"):
        load(None, [f"wandb.name={text}"])
    assert load(None, ["wandb.name='run #1'"]).wandb.name == "run #1"
    assert load(None, ["wandb.name=run#1"]).wandb.name == "run#1"


def test_an_older_run_goes_on_from_its_own_file(tmp_path):
    """A file that PyYAML wrote by YAML 1.1, with every key there is."""
    import yaml

    config = load(ROOT / "configs/digits/csam.yaml", ["wandb.name='010'", "model.options.x='yes'"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    assert load(tmp_path / "config.yaml") == config
