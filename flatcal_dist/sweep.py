"""A sweep: one base configuration and a grid of values; each combination is a run of its own.

    name: digits_sweep                     # by default the file's
    base: ../digits/csam.yaml              # relative to the sweep's file
    directory: runs/digits_sweep           # by default runs/NAME; each run is a directory in it
    set: {train.epochs: 20}                # the same for all runs
    grid:
      sharpness.rule: [sam, csam]
      sharpness.gamma: [0.5, 1.0]
      run.seed: [0, 1, 2]
    exclude:                               # what matches all of an entry is left out
      - {sharpness.rule: sam, sharpness.gamma: [0.5]}

The last key of the grid turns fastest. A run is named by its values, not by its number, so that a
grid that grows finds the runs it has.
"""

import hashlib
import itertools
import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from flatcal_dist import config as configuration
from flatcal_dist.config import Config, ConfigError, Section, choosing, conditions, fingerprint
from flatcal_dist.config.files import as_override
from flatcal_dist.config.kinds import PathText
from flatcal_dist.files import expanded, read_bytes
from flatcal_dist.urls import identified, public

FROM_SWEEP = ("run.dir", "wandb.name")  # each run has its own
TAKEN = ("code", "comparison", "logs", "slurm", "summary.csv")  # beside the runs
MOST_RUNS = 10_000  # before `exclude`; each is read as a configuration
LONGEST = 200  # bytes of a run's name; file systems take 255, with what is put around it


class Sweep(Section):
    name: str = Field(
        pattern=r"^[\w+-][\w.+-]*$", max_length=100, description="also the W&B group of its runs"
    )
    base: PathText = Field(description="configuration that all runs start from")
    directory: PathText = Field(description="holds the run directories")
    set: dict[str, Any] = Field({}, description="overrides of all runs, by dotted key")
    grid: dict[str, list[Any]] = Field(min_length=1, description="values by dotted key")
    exclude: list[dict[str, Any]] = Field([], description="combinations to leave out")


@dataclass(frozen=True)
class Element:
    """One run of a sweep: `overrides` of the base configuration are all but its run.dir."""

    index: int
    name: str
    run: Path
    overrides: tuple[str, ...]
    config: Config

    @property
    def arguments(self) -> list[str]:
        """What a recipe takes after `--config BASE`."""
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
        lines = (
            f"{'.'.join(map(str, problem['loc']))}: "
            + str(problem.get("ctx", {}).get("error") or problem["msg"].lower())
            for problem in error.errors()
        )
        raise ConfigError(f"{path} is not a sweep:\n" + "\n".join(lines)) from None
    _check(sweep, path)
    return sweep


def elements(sweep: Sweep, overrides: tuple[str, ...] | list[str] = ()) -> list[Element]:
    """Every run of the sweep, in the order of the grid, numbered from 0.

    `overrides` of all runs win over the file's `set`. Raises ConfigError for a run whose
    configuration cannot be used, for two that would be the same, and for an override of what
    belongs to each run.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in FROM_SWEEP:
            raise ConfigError(f"{override}: {key} follows from the sweep (`directory`, `grid`)")
        if key in sweep.grid:
            raise ConfigError(f"{override}: {key} is turned by the grid; change it in the file")
    common = [as_override(key, value) for key, value in sweep.set.items()] + list(overrides)
    found: list[Element] = []
    for values in itertools.product(*sweep.grid.values()):
        point = dict(zip(sweep.grid, values, strict=True))
        if any(_matches(point, entry) for entry in sweep.exclude):
            continue
        name = _name(point)
        run = Path(sweep.directory) / name
        explicit = [*common, *(as_override(key, value) for key, value in point.items())]
        explicit = _read_ones(sweep, explicit)
        if not any(text.startswith("wandb.group=") for text in explicit):
            explicit.insert(0, as_override("wandb.group", sweep.name))
        try:
            config = configuration.load(sweep.base, [*explicit, as_override("run.dir", str(run))])
        except ConfigError as error:
            raise ConfigError(f"run {len(found)} of the sweep, {name}: {error}") from None
        found.append(Element(len(found), name, run, tuple(explicit), config))
    _refuse_twins(found)
    if not found:
        raise ConfigError(f"sweep {sweep.name}: exclude leaves out every run of the grid")
    return found


def _read_ones(sweep: Sweep, overrides: list[str]) -> list[str]:
    """Without those that a choice in the grid leaves unread: plain training has no gamma."""
    try:
        config = configuration.load(sweep.base, overrides, recorded=True)
    except ConfigError:
        return overrides  # the run itself is refused, by its name
    aside = {key for key, choice in choosing.unread(config).items() if choice.key in sweep.grid}
    aside |= {
        key
        for key, condition in conditions.unread(config).items()
        if any(by in sweep.grid for by in condition.by)
    }
    return [text for text in overrides if text.partition("=")[0].strip() not in aside]


def _check(sweep: Sweep, path: Path) -> None:
    for key, values in sweep.grid.items():
        if not values:
            raise ConfigError(f"{path}: grid.{key} lists no value")
    if (count := math.prod(map(len, sweep.grid.values()))) > MOST_RUNS:
        raise ConfigError(
            f"{path}: the grid has {count:,} combinations, and at most {MOST_RUNS:,} are read: "
            "check its values, or make several sweeps of it"
        )
    each = [("set", key, value) for key, value in sweep.set.items()]
    each += [("grid", key, value) for key, values in sweep.grid.items() for value in values]
    for where, key, value in each:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise ConfigError(
                f"{path}: {where}.{key} has {value!r}, which is a {type(value).__name__} in YAML; "
                "expected a number, a text, true, false, null, or a list or section of these. Put "
                "a text that looks like something else into quotes"
            ) from None
    for key in FROM_SWEEP:
        if key in sweep.grid or key in sweep.set:
            raise ConfigError(f"{path}: {key} follows from the sweep (`directory`, `grid`)")
    if both := sorted(sweep.grid.keys() & sweep.set.keys()):
        raise ConfigError(f"{path}: {', '.join(both)} stands in grid and in set; keep one")
    for number, entry in enumerate(sweep.exclude):
        for key, values in entry.items():
            for value in values if isinstance(values, list) else [values]:
                if key not in sweep.grid:
                    raise ConfigError(f"{path}: exclude[{number}].{key} is not a key of the grid")
                if value not in sweep.grid[key]:
                    raise ConfigError(
                        f"{path}: exclude[{number}].{key} = {value!r} is not in the grid, which "
                        f"has {sweep.grid[key]}"
                    )


def _matches(point: dict[str, Any], entry: dict[str, Any]) -> bool:
    return all(
        point[key] in (wanted if isinstance(wanted, list) else [wanted])
        for key, wanted in entry.items()
    )


def _name(point: dict[str, Any]) -> str:
    """Of a run: a plain name of a directory, whatever the values hold.

    Shortened, and told from the sweep's own directories, by a hash of all values.
    """
    name = "-".join(_part(key, value) for key, value in point.items())
    digest = hashlib.sha256(json.dumps(identified(point), sort_keys=True).encode()).hexdigest()[:8]
    if len(name.encode()) > LONGEST:
        return f"{name.encode()[:LONGEST].decode(errors='ignore')}-{digest}"
    return f"{name}-{digest}" if name in TAKEN else name


def _part(key: str, value: Any) -> str:
    """Of a run's name: the value, behind the last part of its key unless it is a word itself."""
    leaf, value = key.rsplit(".", 1)[-1], public(value)
    text = value if isinstance(value, str) else leaf + json.dumps(value)
    # A name does not begin with a dot: `..` is another directory.
    return re.sub(r"[^\w.+-]+", "_", text).strip("_").lstrip(".") or f"{leaf}_"


def _refuse_twins(found: list[Element]) -> None:
    """Two runs of one name would share a directory; two of one configuration are one run."""
    for what, key, hint in (
        ("are called", lambda e: e.name, ""),
        ("compute", lambda e: fingerprint(e.config), "; leave one of them out by `exclude`"),
    ):
        seen: dict[str, Element] = {}
        for element in found:
            twin = seen.setdefault(key(element), element)
            if twin is not element:
                raise ConfigError(
                    f"runs {twin.index} and {element.index} of the sweep {what} the same: "
                    f"{' '.join(twin.overrides)} and {' '.join(element.overrides)}{hint}"
                )
