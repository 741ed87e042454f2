"""A sweep has one base configuration, axes and a grid of values. Each combination is a run.

    name: digits_sweep                     # by default the file's
    base: ../digits/csam.yaml              # relative to the sweep's file
    directory: runs/digits_sweep           # by default runs/NAME; each run is a directory in it
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

The last key of the grid changes fastest, the first axis slowest. A run is named by its places and
values, not by its number, so that a study that grows finds the runs that it has. The configuration
of a run records its places as `run.axes`.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from flatcal_dist import config as configuration
from flatcal_dist.config.files import COMMAND_LINE
from flatcal_dist.config.kinds import PathText, Section
from flatcal_dist.config.yaml_core import as_override
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import expanded, read_bytes
from flatcal_dist.urls import identified, public

if TYPE_CHECKING:  # its import takes seconds, and only loading needs it
    from flatcal_dist.config import Config

FROM_SWEEP = ("run.dir", "run.axes", "wandb.name")  # the sweep sets them for each run
TAKEN = ("code", "comparison", "logs", "slurm", "summary.csv")  # beside the runs
MOST_RUNS = 10_000  # before `exclude`; each is read as a configuration
LONGEST = 200  # bytes of a run's name; file systems take 255, and something is added

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w+-]*$", max_length=64)]


class Sweep(Section):
    """The file of a sweep."""

    name: str = Field(
        pattern=r"^[\w+-][\w.+-]*$",
        max_length=100,
        description="The name of the sweep, and the W&B group of its runs.",
    )
    base: PathText = Field(description="The configuration that all runs start from.")
    directory: PathText = Field(description="The directory of the run directories.")
    set: dict[str, Any] = Field({}, description="Values of all runs, by dotted key.")
    axes: dict[Word, dict[Word, dict[str, Any]]] = Field(
        {}, description="Bundles of values, by the names of the axis and of the place on it."
    )
    grid: dict[str, list[Any]] = Field({}, description="The values of each dotted key.")
    exclude: list[dict[str, Any]] = Field([], description="Combinations to leave out.")

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield every combination that is not excluded: places by axis, then values by key."""
        turned = {name: list(places) for name, places in self.axes.items()} | self.grid
        for values in itertools.product(*turned.values()):
            point = dict(zip(turned, values, strict=True))
            if not any(_matches(point, entry) for entry in self.exclude):
                yield point

    def overrides(self, point: dict[str, Any]) -> dict[str, Any]:
        """Return what a combination sets by dotted key, with its places."""
        found: dict[str, Any] = {}
        for name, value in point.items():
            found |= self.axes[name][value] if name in self.axes else {name: value}
        places = {name: place for name, place in point.items() if name in self.axes}
        return found | ({"run.axes": places} if places else {})

    def turned(self) -> Iterator[str]:
        """Yield every key that differs between runs."""
        yield from self.grid
        for places in self.axes.values():
            for bundle in places.values():
                yield from bundle


@dataclass(frozen=True)
class Element:
    """One run of a sweep.

    Attributes:
        index: The number of the run, from 0.
        name: The name of its directory.
        point: Its place on each axis, and its values of the grid.
        run: Its directory.
        overrides: What it changes in the base configuration, except run.dir.
        config: Its whole configuration.
    """

    index: int
    name: str
    point: dict[str, Any]
    run: Path
    overrides: tuple[str, ...]
    config: "Config"

    @property
    def arguments(self) -> list[str]:
        """The words that a recipe takes after `--config BASE`."""
        return [as_override("run.dir", str(self.run)), *self.overrides]


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep's file. Raises ConfigError with the key and what was expected there."""
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the sweep {path}: {error}") from None
    values = configuration.parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold the keys of a sweep: base, grid, ...")
    values.setdefault("name", path.stem)
    values.setdefault("directory", f"runs/{values['name']}")
    if isinstance(values.get("base"), str):
        with suppress(RuntimeError):  # of a user who is unknown: the message follows
            values["base"] = str((path.parent / Path(values["base"]).expanduser()).resolve())
    try:
        sweep = Sweep.model_validate(values)
        sweep = sweep.model_copy(update={"directory": str(expanded(sweep.directory))})
    except ValidationError as error:
        lines = "\n".join(_in_words(problem) for problem in error.errors())
        raise ConfigError(f"{path} is not a sweep:\n{lines}") from None
    _check(sweep, path)
    return sweep


def _in_words(problem: ErrorDetails) -> str:
    """Return the key of a problem, and what was expected there."""
    kind, loc = problem["type"], [str(part) for part in problem["loc"]]
    if loc[-1] == "[key]":
        what = "an axis" if len(loc) == 3 else "a place on an axis"
        return (
            f"{'.'.join(loc[:-1])}: the name of {what} begins with a letter or a digit, and has at "
            "most 64 letters, digits and the signs _ + -"
        )
    key = ".".join(loc)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, Sweep.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(Sweep.model_fields)}"
        return f"{key}: no such key; {hint}"
    if kind == "missing":
        return f"{key}: this key is missing. {Sweep.model_fields[key].description}"
    if kind == "dict_type":
        example = {1: "{NAME: {PLACE: {key.sub: value}}}", 2: "{PLACE: {key.sub: value}}"}
        wanted = example.get(len(loc) if loc[0] == "axes" else 0, "{key.sub: value}")
        return f"{key}: expected {wanted}, not {reprlib.repr(problem['input'])}"
    if kind == "list_type" and isinstance(problem["input"], dict):
        inner = next(iter(problem["input"]), "sub")
        return f"{key}: expected a list of values. Write the whole key: {loc[-1]}.{inner}"
    if kind == "list_type":
        return f"{key}: expected a list of values, not {reprlib.repr(problem['input'])}"
    return f"{key}: {problem.get('ctx', {}).get('error') or problem['msg'].lower()}"


def elements(sweep: Sweep, overrides: tuple[str, ...] | list[str] = ()) -> list[Element]:
    """Return every run of the sweep in the order of the grid, numbered from 0.

    `overrides` hold for all runs, and win over `set` in the file. Raises ConfigError for a run
    whose configuration cannot be used, for two equal runs, and for an override of what each sets.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in FROM_SWEEP:
            raise ConfigError(f"{override}: {key} follows from the sweep (`directory`, `grid`)")
        if key in set(sweep.turned()):
            raise ConfigError(
                f"{override}: {key} is set by axes or grid, for each run; change it in the file"
            )
    common = [as_override(key, value) for key, value in sweep.set.items()] + list(overrides)
    found: list[Element] = []
    for point in sweep.points():
        name = _name(point)
        run = Path(sweep.directory) / name
        own = sweep.overrides(point).items()
        explicit = [*common, *(as_override(key, value) for key, value in own)]
        explicit = _read_ones(sweep, point, explicit)
        if not any(text.startswith("wandb.group=") for text in explicit):
            explicit.insert(0, as_override("wandb.group", sweep.name))
        try:
            config = configuration.load(sweep.base, [*explicit, as_override("run.dir", str(run))])
        except ConfigError as error:
            where = "in the sweep's file" + (f" or on {COMMAND_LINE}" if overrides else "")
            text = str(error).replace(f"(on {COMMAND_LINE})", f"({where})")
            raise ConfigError(f"run {len(found)} of the sweep, {name}: {text}") from None
        found.append(Element(len(found), name, point, run, tuple(explicit), config))
    _refuse_twins(found)
    if not found:
        raise ConfigError(f"sweep {sweep.name}: exclude leaves out every run")
    return found


def _read_ones(sweep: Sweep, point: dict[str, Any], overrides: list[str]) -> list[str]:
    """Return the overrides that a run reads. Plain training, chosen by the grid, has no gamma.

    What stands beside the choice, in one place of an axis, was meant for it. It is kept, and
    refused if it is not read.
    """
    from flatcal_dist.config.checking import choosing, conditions

    try:
        config = configuration.load(sweep.base, overrides, recorded=True)
    except ConfigError:
        return overrides  # the run itself is refused, by its name
    deciding = {key: {choice.key} for key, choice in choosing.unread(config).items()}
    deciding |= {key: set(one.by) for key, one in conditions.unread(config).items()}
    turned = set(sweep.turned())
    bundles = [set(sweep.axes[axis][place]) for axis, place in point.items() if axis in sweep.axes]
    aside = {
        key
        for key, by in deciding.items()
        if by & turned and not any(key in bundle and by & bundle for bundle in bundles)
    }
    return [text for text in overrides if text.partition("=")[0].strip() not in aside]


def _check(sweep: Sweep, path: Path) -> None:
    turned: dict[str, list[Any]] = {axis: list(places) for axis, places in sweep.axes.items()}
    turned |= sweep.grid
    if not turned:
        raise ConfigError(f"{path}: neither axes nor grid says in what the runs differ")
    for key, values in turned.items():
        if not values:
            where = "axes" if key in sweep.axes else "grid"
            raise ConfigError(f"{path}: {where}.{key} lists no value")
    if (count := math.prod(map(len, turned.values()))) > MOST_RUNS:
        raise ConfigError(
            f"{path}: there are {count:,} combinations, and at most {MOST_RUNS:,} are read: check "
            "axes and grid, or make several sweeps of it"
        )
    each = [("set", key, value) for key, value in sweep.set.items()]
    each += [("grid", key, value) for key, values in sweep.grid.items() for value in values]
    each += [
        (f"axes.{axis}.{place}", key, value)
        for axis, places in sweep.axes.items()
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
    keys = _refuse_two_writers(sweep, path)
    for key in FROM_SWEEP:
        if key in keys or key in sweep.set:
            raise ConfigError(f"{path}: {key} follows from the sweep (`directory`, `axes`, `grid`)")
    for number, entry in enumerate(sweep.exclude):
        for key, values in entry.items():
            for value in values if isinstance(values, list) else [values]:
                if key not in turned:
                    raise ConfigError(
                        f"{path}: exclude[{number}].{key} is not an axis or a key of the grid"
                    )
                if value not in turned[key]:
                    raise ConfigError(
                        f"{path}: exclude[{number}].{key} = {value!r} is not one of its values, "
                        f"which are {turned[key]}"
                    )


def _refuse_two_writers(sweep: Sweep, path: Path) -> set[str]:
    """Return the keys that axes and grid set. Raises ConfigError if two of them set the same."""
    writers = {f"grid.{key}": {key} for key in sweep.grid}
    writers |= {
        f"axes.{axis}": {key for bundle in places.values() for key in bundle}
        for axis, places in sweep.axes.items()
    }
    writers["set"] = set(sweep.set)
    seen: dict[str, str] = {}
    for writer, keys in writers.items():
        for key in sorted(keys):
            if key in seen:
                raise ConfigError(f"{path}: {key} stands in {seen[key]} and in {writer}; keep one")
            seen[key] = writer
    return seen.keys() - sweep.set.keys()


def _matches(point: dict[str, Any], entry: dict[str, Any]) -> bool:
    return all(
        point[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in entry.items()
    )


def _name(point: dict[str, Any]) -> str:
    """Return the name of a run, which can name a directory whatever the values hold.

    A hash of all values shortens a long name, or tells it from other directories of the sweep.
    """
    name = "-".join(_part(key, value) for key, value in point.items())
    digest = hashlib.sha256(json.dumps(identified(point), sort_keys=True).encode()).hexdigest()[:8]
    if len(name.encode()) > LONGEST:
        return f"{name.encode()[:LONGEST].decode(errors='ignore')}-{digest}"
    return f"{name}-{digest}" if name in TAKEN else name


def _part(key: str, value: Any) -> str:
    """Return a part of a run's name: the value, after the last part of its key unless a word."""
    leaf, value = key.rsplit(".", 1)[-1], public(value)
    text = value if isinstance(value, str) else leaf + json.dumps(value)
    # A name does not begin with a dot: `..` is another directory.
    return re.sub(r"[^\w.+-]+", "_", text).strip("_").lstrip(".") or f"{leaf}_"


def _refuse_twins(found: list[Element]) -> None:
    """Raise ConfigError for two runs of one name, or of one configuration."""
    for what, key, hint in (
        ("are called", lambda e: e.name, ""),
        (
            "compute",
            lambda e: configuration.fingerprint(e.config),
            "; leave one of them out by `exclude`",
        ),
    ):
        seen: dict[str, Element] = {}
        for element in found:
            twin = seen.setdefault(key(element), element)
            if twin is not element:
                raise ConfigError(
                    f"runs {twin.index} and {element.index} of the sweep {what} the same: "
                    f"{twin.name} ({' '.join(twin.overrides)}) and "
                    f"{element.name} ({' '.join(element.overrides)}){hint}"
                )
