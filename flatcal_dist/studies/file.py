"""A study has one base configuration, axes and a grid of values. Each combination is a run.

    name: methods                          # by default the file's
    base: ../digits/csam.yaml              # relative to the study's file
    directory: runs/methods                # by default runs/NAME; each run is a directory in it
    set: {train.epochs: 20}                # the same for all runs
    axes:                                  # a place on an axis is a bundle of overrides
      method:
        sam: {sharpness.rule: sam, sharpness.rho: 0.1}
        csam: {sharpness.rule: csam, sharpness.rho: 0.05}
        focal: {sharpness.rule: none, objective.name: focal}
    grid:                                  # one key each
      model.options.width: [64, 128]
      run.seed: [0, 1, 2]
    exclude:                               # what matches all of an entry is left out
      - {method: focal, model.options.width: [64]}
    evaluate: [--data, DATA, --data, imagenet_c=DATA]   # after each run: `flatcal evaluate RUN ...`
    choose: {...}                          # settings chosen without the test images (`choice`)
    question: Does CSAM calibrate better than SAM?   # the head of the page
    panels: [model.options.width]          # not compared: a table each; by default network and data
    published: zhu2022.csv                 # published figures to show beside ours (`published`)

The last key of the grid changes fastest, the first axis slowest. A run is named by its places and
values, not by its number, so that a study that grows finds the runs that it has. The configuration
of a run records its places as `run.axes`.
"""

import difflib
import itertools
import json
import math
import reprlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from flatcal_dist import config as configuration
from flatcal_dist.calibration.metrics.entries import METRICS
from flatcal_dist.config.kinds import PathText, Section
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import expanded, read_bytes
from flatcal_dist.studies.choice import SEED, Choice, check_figures, matches

SET_HERE = ("run.dir", "run.axes", "wandb.name")  # the study sets them for each run
COLUMNS = (  # of results.csv and of published figures that are about a run, not its place
    *METRICS, "run", "seed", "phase", "temperature", "step_seconds", "steps", "commit",
    "uncommitted_changes", "engine", "precision", "world_size", "python", "torch", "timm",
    "flatcal_dist", "machine", "study", "overrides", "metric", "value", "sd", "source", "differs",
)  # fmt: skip
MOST_RUNS = 10_000  # before `exclude`; each is read as a configuration

Axis = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w+-]*$", max_length=64)]
Place = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]*$", max_length=64)]


class Study(Section):
    """The file of a study."""

    name: str = Field(
        pattern=r"^[\w+-][\w.+-]*$",
        max_length=100,
        description="The name of the study, and the W&B group of its runs.",
    )
    base: PathText = Field(description="The configuration that all runs start from.")
    directory: PathText = Field(description="The directory of the run directories.")
    set: dict[str, Any] = Field({}, description="Values of all runs, by dotted key.")
    axes: dict[Axis, dict[Place, dict[str, Any]]] = Field(
        {}, description="Bundles of values, by the names of the axis and of the place on it."
    )
    grid: dict[str, list[Any]] = Field({}, description="The values of each dotted key.")
    exclude: list[dict[str, Any]] = Field([], description="Combinations to leave out.")
    evaluate: list[str] = Field(
        [],
        description="Words for `flatcal evaluate RUN`, which follows each run, such as --data "
        "imagenet_c_generated=DATA.",
    )
    choose: dict[Place, Choice] = Field(
        {}, description="Settings to choose by images kept apart (data.holdout), by a name."
    )
    question: str = Field("", description="What the study asks, for the head of its page.")
    panels: list[str] = Field(
        ["network", "data"],
        description="Axes and keys whose values are not compared: each has a table of its own. By "
        "default they are network and data, where something else differs as well.",
    )
    published: PathText | None = Field(
        None, description="A CSV file of published figures, which the page shows beside these."
    )

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield every combination that is not excluded: places by axis, then values by key."""
        turned = {name: list(places) for name, places in self.axes.items()} | self.grid
        for values in itertools.product(*turned.values()):
            point = dict(zip(turned, values, strict=True))
            if not any(matches(point, entry) for entry in self.exclude):
                yield point

    def apart(self) -> list[str]:
        """Return the axes and keys whose values are not compared with each other."""
        turned = [key for key in (*self.axes, *self.grid) if key != SEED]
        found = [key for key in turned if key in self.panels]
        return [] if found == turned and "panels" not in self.model_fields_set else found

    def overrides(self, point: dict[str, Any]) -> dict[str, Any]:
        """Return what a combination sets by dotted key, with its places."""
        found: dict[str, Any] = {}
        for name, value in point.items():
            found |= self.axes[name][value] if name in self.axes else {name: value}
        places = {name: place for name, place in point.items() if name in self.axes}
        return found | ({"run.axes": places} if places else {})

    def turned(self) -> Iterator[str]:
        """Yield every key that differs between runs, and each key of a section that does."""
        for key, values in self.grid.items():
            for value in values:
                yield from keys_of(key, value)
        for places in self.axes.values():
            for bundle in places.values():
                for key, value in bundle.items():
                    yield from keys_of(key, value)


def keys_of(key: str, value: Any) -> Iterator[str]:
    """Yield a key, and the keys below it if its value is a section: run, run.dir."""
    yield key
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from keys_of(f"{key}.{name}", inner)


def load_study(path: str | Path) -> Study:
    """Read a study's file. Raises ConfigError with the key and what was expected there."""
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the study {path}: {error}") from None
    values = configuration.parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the keys of a study: base, grid, ...")
    values.setdefault("name", path.stem)
    values.setdefault("directory", f"runs/{values['name']}")
    for key in ("base", "published"):
        if isinstance(values.get(key), str):
            with suppress(RuntimeError):  # of a user who is unknown: the message follows
                values[key] = str((path.parent / Path(values[key]).expanduser()).resolve())
    try:
        study = Study.model_validate(values)
        study = study.model_copy(update={"directory": str(expanded(study.directory))})
    except ValidationError as error:
        lines = "\n".join(_in_words(problem) for problem in error.errors())
        raise ConfigError(f"{path} is not a study:\n{lines}") from None
    check_study(study, path)
    return study


def _in_words(problem: ErrorDetails) -> str:
    """Return the key of a problem, and what was expected there."""
    kind, loc = problem["type"], [str(part) for part in problem["loc"]]
    fields = (Choice if loc[0] == "choose" and len(loc) > 2 else Study).model_fields
    if loc[-1] == "[key]":
        what, dot = ("an axis", "") if len(loc) == 3 else ("a place on an axis", ". ")
        what, dot = ("a choice", ". ") if loc[0] == "choose" else (what, dot)
        return (
            f"{'.'.join(loc[:-1])}: the name of {what} begins with a letter from A to Z or a "
            f"digit, and has at most 64 such letters, digits and the signs {dot}_ + -"
        )
    key = ".".join(loc)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
        return f"{key}: no such key; {hint}"
    if kind == "missing":
        return f"{key}: this key is missing. {fields[loc[-1]].description}"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key}: expected a section with {', '.join(Choice.model_fields)}"
    if kind == "dict_type":
        example = {1: "{NAME: {PLACE: {key.sub: value}}}", 2: "{PLACE: {key.sub: value}}"}
        wanted = example.get(len(loc) if loc[0] == "axes" else 0, "{key.sub: value}")
        return f"{key}: expected {wanted}, not {reprlib.repr(problem['input'])}"
    if kind == "list_type" and key == "exclude":
        return f"{key}: expected a list of combinations, such as [{{run.seed: 0}}]"
    if kind == "list_type" and isinstance(problem["input"], dict):
        inner = next(iter(problem["input"]), "sub")
        return f"{key}: expected a list of values. Write the whole key: {loc[-1]}.{inner}"
    if kind == "list_type":
        return f"{key}: expected a list of values, not {reprlib.repr(problem['input'])}"
    return f"{key}: {problem.get('ctx', {}).get('error') or problem['msg'].lower()}"


def check_study(study: Study, path: Path) -> None:
    """Raise ConfigError if the parts of a study contradict each other."""
    turned: dict[str, list[Any]] = {axis: list(places) for axis, places in study.axes.items()}
    turned |= study.grid
    if taken := [axis for axis in study.axes if axis in COLUMNS]:
        raise ConfigError(
            f"{path}: axes.{taken[0]} has the name of a column of results.csv; give it another name"
        )
    if not turned:
        raise ConfigError(f"{path}: neither axes nor grid says in what the runs differ")
    for key, values in turned.items():
        if not values:
            where = "axes" if key in study.axes else "grid"
            raise ConfigError(f"{path}: {where}.{key} lists no value")
    if (count := math.prod(map(len, turned.values()))) > MOST_RUNS:
        raise ConfigError(
            f"{path}: there are {count:,} combinations, and at most {MOST_RUNS:,} are read: check "
            "axes and grid, or make several studies of it"
        )
    each = [("set", key, value) for key, value in study.set.items()]
    each += [("grid", key, value) for key, values in study.grid.items() for value in values]
    each += [
        (f"axes.{axis}.{place}", key, value)
        for axis, places in study.axes.items()
        for place, bundle in places.items()
        for key, value in bundle.items()
    ]
    for where, key, value in each:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ConfigError(
                f"{path}: {where}.{key} has {value!r}, which is a {type(value).__name__} in YAML; "
                "expected a number, a text, true, false, null, or a list or section of these. Put "
                "a text that looks like something else into quotes"
            ) from None
    if "panels" in study.model_fields_set:
        for key in study.panels:
            if key not in turned or key == SEED:
                raise ConfigError(
                    f"{path}: panels names {key}, which is not an axis or a key of the grid "
                    f"other than {SEED}; there are {', '.join(k for k in turned if k != SEED)}"
                )
    keys = _refuse_two_writers(study, path)
    everywhere = keys | {each for key, value in study.set.items() for each in keys_of(key, value)}
    for key in SET_HERE:
        if key in everywhere:
            raise ConfigError(f"{path}: {key} follows from the study (`directory`, `axes`, `grid`)")
    for number, entry in enumerate(study.exclude):
        _check_values(f"{path}: exclude[{number}]", entry, turned)
    for name, choice in study.choose.items():
        _check_values(f"{path}: choose.{name}.among", choice.among, turned)
        _check_values(f"{path}: choose.{name}.against", choice.against, turned)
    check_figures(study.choose, path)


def _check_values(where: str, entry: dict[str, Any], turned: dict[str, list[Any]]) -> None:
    """Raise ConfigError if an entry names what is no axis, or a value that it does not have."""
    for key, values in entry.items():
        for value in values if isinstance(values, list) else [values]:
            if key not in turned:
                raise ConfigError(f"{where}.{key} is not an axis or a key of the grid")
            if value not in turned[key]:
                lists = any(isinstance(one, list) for one in turned[key])
                raise ConfigError(
                    f"{where}.{key} = {value!r} is not one of its values, which are {turned[key]}"
                    + ". A value that is a list stands in a list: [[0.0]]" * lists
                )


def _refuse_two_writers(study: Study, path: Path) -> set[str]:
    """Return the keys that axes and grid set. Raises ConfigError if two of them set the same."""
    writers = {
        f"grid.{key}": [(key, value) for value in values] for key, values in study.grid.items()
    }
    writers |= {
        f"axes.{axis}": [pair for bundle in places.values() for pair in bundle.items()]
        for axis, places in study.axes.items()
    }
    turned: dict[str, str] = {}
    for writer, pairs in (*writers.items(), ("set", list(study.set.items()))):
        # Of a section only what it holds: others may set other keys of it.
        own = {each for key, value in pairs for each in keys_of(key, value)}
        whole = {key for key, value in pairs if isinstance(value, dict) and value}
        for key in sorted(own - whole):
            if key in turned:
                raise ConfigError(
                    f"{path}: {key} stands in {turned[key]} and in {writer}; keep one"
                )
        if writer != "set":
            turned |= dict.fromkeys(sorted(own), writer)
    return set(turned)
