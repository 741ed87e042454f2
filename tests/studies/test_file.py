"""Study files: which runs they mean, their names, and errors that say how to mend them."""

from pathlib import Path

import pytest

from flatcal_dist.config import ConfigError, load, method_of
from flatcal_dist.evaluation.provenance import settings_of
from flatcal_dist.studies.elements import elements
from flatcal_dist.studies.file import load_study

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "configs/studies"


@pytest.fixture
def study_file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(f"base: {ROOT}/configs/digits/csam.yaml\n{text}")
        return path

    return write


GRID = """
set: {train.epochs: 3}
grid:
  sharpness.rule: [none, sam, csam]
  sharpness.rho: [0.05, 1e-4]
  run.seed: [0, 1]
exclude:
  - {sharpness.rule: none, sharpness.rho: [1e-4]}
  - {sharpness.rule: csam, run.seed: 1}
"""


def test_the_grid_in_its_order_without_what_is_excluded(study_file):
    found = elements(load_study(study_file(GRID)))
    assert [element.name for element in found] == [
        "none-rho0.05-seed0", "none-rho0.05-seed1",
        "sam-rho0.05-seed0", "sam-rho0.05-seed1", "sam-rho0.0001-seed0", "sam-rho0.0001-seed1",
        "csam-rho0.05-seed0", "csam-rho0.0001-seed0",
    ]  # fmt: skip
    assert [element.index for element in found] == list(range(8))
    assert found[4].run == Path("runs/study/sam-rho0.0001-seed0")
    assert found[4].overrides == (
        "wandb.group=study", "train.epochs=3",
        "sharpness.rule=sam", "sharpness.rho=0.0001", "run.seed=0",
    )  # fmt: skip


AXES = """
set: {train.epochs: 3}
axes:
  method:
    sgd: {sharpness.rule: none}
    csam: {sharpness.rule: csam, sharpness.rho: 0.1}
    focal-swa: {sharpness.rule: none, objective.name: focal, average: {name: swa, start: 0.5}}
  network: {small: {model.options.width: 8}, large: {}}
grid: {run.seed: [0, 1]}
exclude: [{method: focal-swa, network: large}]
"""


def test_axes_are_bundles_of_overrides(study_file):
    study = load_study(study_file(AXES))
    found = elements(study)
    assert [element.name for element in found] == [
        "sgd-small-seed0", "sgd-small-seed1", "sgd-large-seed0", "sgd-large-seed1",
        "csam-small-seed0", "csam-small-seed1", "csam-large-seed0", "csam-large-seed1",
        "focal-swa-small-seed0", "focal-swa-small-seed1",
    ]  # fmt: skip
    last = found[-1].config
    assert last.run.axes == {"method": "focal-swa", "network": "small"}
    assert (last.average.start, last.run.seed, last.model.options["width"]) == (0.5, 1, 8)
    assert [method_of(e.config) for e in found[::4]] == ["sgd", "csam", "sgd+focal+swa"]
    assert found[4].config.sharpness.rho == 0.1
    for element in found:
        assert load(study.base, element.arguments) == element.config
    with pytest.raises(ConfigError, match=r"sharpness\.rho is set by axes or grid"):
        elements(study, ["sharpness.rho=0.3"])
    twins = AXES.replace("large: {}", "large: {}, again: {}")
    with pytest.raises(ConfigError, match=r"compute the same"):
        elements(load_study(study_file(twins)))


def test_the_overrides_alone_make_the_configuration(study_file):
    study = load_study(study_file(GRID))
    for element in elements(study, ["train.epochs=7", "wandb.group=mine"]):
        config = load(study.base, element.arguments)
        assert config == element.config
        assert (config.train.epochs, config.wandb.group) == (7, "mine")
        assert config.run.dir == str(element.run)


def test_values_are_read_back_as_they_were_written(study_file):
    text = "grid:\n  wandb.project: ['1', 'true', '- b', plain]\n  data.mean: [[0.0], [0.5]]\n"
    study = load_study(study_file(text + "  wandb.tags: [[a, b]]\n  train.max_steps: [null]"))
    with pytest.raises(ConfigError, match="compute the same"):  # W&B's keys change no result
        elements(study)
    study = study.model_copy(update={"grid": {**study.grid, "wandb.project": ["true"]}})
    found = [element.config for element in elements(study)]
    assert [config.data.mean for config in found] == [[0.0], [0.5]]
    for config in found:
        assert (config.wandb.project, config.wandb.tags) == ("true", ["a", "b"])
        assert config.train.max_steps is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {}", "neither axes nor grid says in what the runs differ"),
        ("axes: {method: {}}", "axes.method lists no value"),
        ("axes: {a b: {x: {}}}", "axes.a b"),
        ("axes: {m: {../x: {}}}", "axes.m.../x"),
        ("axes: {m: {x: 3}}", "axes.m.x: expected {key.sub: value}, not 3"),
        ("axes: {m: [x, y]}", "axes.m: expected {PLACE: {key.sub: value}}, not ['x', 'y']"),
        ("axes: {a.b: {x: {}}}", "axes.a.b: the name of an axis begins with a letter"),
        (
            "axes: {m: {x: {sharpness.rule: sam, sharpness.gamma: 1}, y: {sharpness.rule: csam}}}",
            "run 0 of the study, x: sharpness.gamma = 1 (in the study's file) belongs to",
        ),
        ("axes: {m: {x: {run.dir: a}}}", "run.dir follows from the study"),
        ("axes: {m: {x: {run.axes: {}}}}", "run.axes follows from the study"),
        (
            "axes: {m: {x: {run.seed: 1}}}\ngrid: {run.seed: [1]}",
            "run.seed stands in grid.run.seed and in axes.m",
        ),
        ("axes: {m: {x: {}}}\nexclude: [{m: y}]", "exclude[0].m = 'y' is not one of its values"),
        ("grid: {run.seed: 3}", "grid.run.seed: expected a list of values, not 3"),
        (
            "grid: {run: {seed: [1]}}",
            "grid.run: expected a list of values. Write the whole key: run.seed",
        ),
        ("grid: {run.seed: []}", "grid.run.seed lists no value"),
        ("gird: {run.seed: [1]}", "gird: no such key; did you mean grid?"),
        ("grid: {run.dir: [a]}", "run.dir follows from the study"),
        (
            "grid: {run.seed: [1]}\nset: {run.seed: 2}",
            "run.seed stands in grid.run.seed and in set",
        ),
        (
            "grid: {run.seed: [1]}\nexclude: [{run.sed: 1}]",
            "exclude[0].run.sed is not an axis or a key",
        ),
        (
            "grid: {run.seed: [1]}\nexclude: [{run.seed: 2}]",
            "exclude[0].run.seed = 2 is not one of its values",
        ),
        ("grid: {run.seed: [1]}\nexclude: [{run.seed: 1}]", "leaves out every run"),
        ("grid: {run.seed: [1, 1]}", "runs 0 and 1 of the study are called the same"),
        ("grid: {sharpness.rho: [1, 1.0]}", "runs 0 and 1 of the study compute the same"),
        ("grid: {sharpness.roh: [1]}", "did you mean sharpness.rho?"),
        ("grid: {sharpness.rho: [0.1, -1]}", "run 1 of the study, rho-1: sharpness.rho = -1"),
        ("name: a/b\ngrid: {run.seed: [1]}", "name: string should match pattern"),
        ("- 1", "study.yaml"),
        ("directory: ''\ngrid: {run.seed: [1]}", "directory: is empty; is a variable of the shell"),
        ("directory: $HOME/X\ngrid: {run.seed: [1]}", "$HOME is not replaced by its value"),
        (f"grid: {{a: {list(range(200))}, b: {list(range(200))}}}", "there are 40,000 combin"),
    ],
)
def test_what_cannot_be_swept_is_refused_with_its_key(study_file, text, message):
    with pytest.raises(ConfigError) as error:
        elements(load_study(study_file(text)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.dir=/elsewhere", "run.dir follows from the study"),  # of all runs at once
        ("wandb.name=one", "wandb.name follows from the study"),
        ("run.seed=5", "run.seed is set by axes or grid"),
    ],
)
def test_an_override_of_what_is_each_runs_own_is_refused(study_file, override, message):
    with pytest.raises(ConfigError, match=message):
        elements(load_study(study_file("grid: {run.seed: [1, 2]}")), [override])


@pytest.mark.parametrize("directory", ["a b #c", "{a,b}", "*x", "7", "a: b", "it's", "[x]", "😀"])
def test_a_study_s_directory_may_have_any_name(study_file, directory):
    study = load_study(study_file("grid: {run.seed: [1]}"))
    study = study.model_copy(update={"directory": directory})
    (element,) = elements(study)
    assert element.config.run.dir == f"{directory}/seed1"
    assert load(study.base, element.arguments) == element.config


def test_a_study_in_the_home_directory(study_file, monkeypatch, tmp_path):
    """What the runs write and what the study writes about them lie in one place."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = study_file("grid: {run.seed: [1]}").read_text().splitlines()[1]
    (tmp_path / "csam.yaml").write_text("{}")
    (tmp_path / "study.yaml").write_text(f"base: ~/csam.yaml\ndirectory: ~/study\n{text}")
    study = load_study(tmp_path / "study.yaml")
    (element,) = elements(study)
    assert Path(study.directory) == element.run.parent == tmp_path / "study"
    assert element.config.run.dir == str(tmp_path / "study/seed1")
    assert study.base == str(tmp_path / "csam.yaml")


NAMES = ["..", ".", ".hidden", "/etc", "a/../..", "=cmd|' /C calc'!A0", "a'b<c>", "-x", "", "///"]


def test_a_run_s_directory_lies_in_the_study_s_whatever_the_values_are(study_file):
    """And is none that the study itself writes to."""
    taken = ["code", "comparison", "logs", "slurm", "x" * 300, "é" * 200, "http://me:secret@h/x?s"]
    for value in NAMES + taken:
        study = load_study(study_file("grid: {run.seed: [1]}"))
        study = study.model_copy(update={"grid": {"model.options.x": [value]}})
        (element,) = elements(study)
        assert element.run.parent == Path("runs/study"), value
        assert element.name not in ("", ".", "..", *taken), value
        assert not element.name.startswith(".")
        assert len(element.name.encode()) < 220
        assert "secret" not in element.name
        assert element.config.model.options["x"] == value


@pytest.mark.parametrize("stem", ["7", "1e3", "true", "2024-01-01", "null", "a+b", "0x10"])
def test_a_study_may_be_called_like_a_number(study_file, stem):
    path = study_file("grid: {run.seed: [1]}")
    path = path.rename(path.with_name(f"{stem}.yaml"))
    (element,) = elements(load_study(path))
    assert element.config.wandb.group == stem


@pytest.mark.parametrize("value", ["!!binary aGk=", ".nan", "!!set {a, b}", "-.inf"])
@pytest.mark.parametrize(
    "place",
    ["grid: {model.options.x: [VALUE]}", "grid: {run.seed: [1]}\nset: {model.options.x: VALUE}"],
)
def test_a_value_that_no_command_line_takes_is_refused(study_file, value, place):
    where = r"study\.yaml is not valid YAML" if "!!" in value else r"model\.options"
    with pytest.raises(ConfigError, match=where):
        elements(load_study(study_file(place.replace("VALUE", value))))


def test_a_date_is_text(study_file):
    (element,) = elements(load_study(study_file("grid: {model.options.x: [2024-01-01]}")))
    assert element.config.model.options["x"] == "2024-01-01"


@pytest.mark.parametrize(
    ("axes", "more", "apart"),
    [
        ("network: {a: {}, b: {model.options.width: 8}}", "", []),
        ("network: {a: {}, b: {model.options.width: 8}}", "panels: [network]", ["network"]),
        ("network: {a: {}}, method: {sam: {sharpness.rule: sam}}", "", ["network"]),
        ("network: {a: {}}, method: {sam: {sharpness.rule: sam}}", "panels: []", []),
    ],
)
def test_networks_are_compared_where_nothing_else_differs(study_file, axes, more, apart):
    text = f"axes: {{{axes}}}\ngrid: {{run.seed: [0]}}\n{more}\n"
    assert load_study(study_file(text)).apart() == apart


@pytest.mark.parametrize("name", ["..", ".", ".x", "a/b", "", "x" * 101])
def test_a_name_that_leaves_the_directory_of_runs_is_refused(study_file, name):
    with pytest.raises(ConfigError, match="name: string should"):
        load_study(study_file(f"name: '{name}'\ngrid: {{run.seed: [1]}}"))


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_of_the_package_loads_and_tells_its_methods_apart(file):
    found = elements(load_study(file))
    places = {tuple(sorted(one.config.run.axes.items())) for one in found}
    by_method: dict[str, set[tuple]] = {}
    for one in found:
        if "method" in one.config.run.axes:
            settings = tuple(sorted(settings_of(one.config).items()))  # rho and gamma
            name = (method_of(one.config), settings)
            by_method.setdefault(one.config.run.axes["method"], set()).add(name)
    names = [name for found_names in by_method.values() for name in found_names]
    assert len(names) == len(set(names)), "two methods of a study have one name"
    assert places
