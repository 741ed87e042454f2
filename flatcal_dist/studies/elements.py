"""The runs of a study: one for each combination, with its directory and its configuration."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatcal_dist import config as configuration
from flatcal_dist.config.files import COMMAND_LINE
from flatcal_dist.config.yaml_core import as_override
from flatcal_dist.errors import ConfigError
from flatcal_dist.studies.file import SET_HERE, Study, keys_of
from flatcal_dist.urls import identified, public

if TYPE_CHECKING:  # its import takes seconds, and only loading needs it
    from flatcal_dist.config import Config

TAKEN = (  # beside the runs
    "chosen", "code", "comparison", "figures", "index.html", "logs", "results.csv", "slurm",
    "study.json",
)  # fmt: skip
LONGEST = 200  # bytes of a run's name; file systems take 255, and something is added


@dataclass(frozen=True)
class Element:
    """One run of a study.

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


def elements(study: Study, overrides: Sequence[str] = ()) -> list[Element]:
    """Return every run of the study in the order of the grid, numbered from 0.

    `overrides` hold for all runs, and win over `set` in the file. Raises ConfigError for a run
    whose configuration cannot be used, for two equal runs, and for an override of what each sets.
    """
    turned = set(study.turned())
    for override in overrides:
        for key in _keys_set_by(override):
            if key in SET_HERE:
                raise ConfigError(f"{override}: {key} follows from the study (`directory`, `grid`)")
            if key in turned:
                raise ConfigError(
                    f"{override}: {key} is set by axes or grid, for each run; change it in the file"
                )
    common = [as_override(key, value) for key, value in study.set.items()] + list(overrides)
    found: list[Element] = []
    for point in study.points():
        name = _name(point)
        run = Path(study.directory) / name
        own = study.overrides(point).items()
        explicit = [*common, *(as_override(key, value) for key, value in own)]
        explicit = _read_ones(study, point, explicit)
        if not any(text.startswith("wandb.group=") for text in explicit):
            explicit.insert(0, as_override("wandb.group", study.name))
        try:
            config = configuration.load(study.base, [*explicit, as_override("run.dir", str(run))])
        except ConfigError as error:
            where = "in the study's file" + (f" or on {COMMAND_LINE}" if overrides else "")
            text = str(error).replace(f"(on {COMMAND_LINE})", f"({where})")
            raise ConfigError(f"run {len(found)} of the study, {name}: {text}") from None
        found.append(Element(len(found), name, point, run, tuple(explicit), config))
    _refuse_twins(found)
    if not found:
        raise ConfigError(f"study {study.name}: exclude leaves out every run")
    return found


def _keys_set_by(override: str) -> list[str]:
    """Return what KEY=VALUE sets: the key, or if the value is a section, the keys that it holds."""
    key, _, text = override.partition("=")
    try:
        value = configuration.parse_yaml(text, override)
    except ConfigError:  # the run refuses it, with its reason
        value = None
    each = list(keys_of(key.strip(), value))
    return each[1:] or each


def _read_ones(study: Study, point: dict[str, Any], overrides: list[str]) -> list[str]:
    """Return the overrides that a run reads. Plain training, chosen by the grid, has no gamma.

    What stands beside the choice, in one place of an axis, was meant for it. It is kept, and
    refused if it is not read.
    """
    from flatcal_dist.config.checking import choosing, conditions

    try:
        config = configuration.load(study.base, overrides, recorded=True)
    except ConfigError:
        return overrides  # the run itself is refused, by its name
    deciding = {key: {choice.key} for key, choice in choosing.unread(config).items()}
    deciding |= {key: set(one.by) for key, one in conditions.unread(config).items()}
    turned = set(study.turned())
    bundles = [set(study.axes[axis][place]) for axis, place in point.items() if axis in study.axes]
    aside = {
        key
        for key, by in deciding.items()
        if by & turned and not any(key in bundle and by & bundle for bundle in bundles)
    }
    return [text for text in overrides if text.partition("=")[0].strip() not in aside]


def _name(point: dict[str, Any]) -> str:
    """Return the name of a run, which can name a directory whatever the values hold.

    A hash of all values shortens a long name, or tells it from other directories of the study.
    """
    name = "-".join(part_of_name(key, value) for key, value in point.items())
    digest = hashlib.sha256(json.dumps(identified(point), sort_keys=True).encode()).hexdigest()[:8]
    if len(name.encode()) > LONGEST:
        return f"{name.encode()[:LONGEST].decode(errors='ignore')}-{digest}"
    return f"{name}-{digest}" if name in TAKEN else name


def part_of_name(key: str, value: Any) -> str:
    """Return a part of a run's name: the value, after the last part of its key unless a word."""
    leaf, value = key.rsplit(".", 1)[-1], public(value)
    text = value if isinstance(value, str) else leaf + json.dumps(value)
    # A name does not begin with a dot: `..` is another directory.
    return re.sub(r"[^\w.+-]+", "_", text).strip("_").lstrip(".") or f"{leaf}_"


def _refuse_twins(found: list[Element]) -> None:
    """Raise ConfigError for two runs of one name, or of one configuration."""
    for what, key, hint in (
        ("are called", lambda e: e.name, "; give their places or values other names"),
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
                    f"runs {twin.index} and {element.index} of the study {what} the same: "
                    f"{twin.name} ({' '.join(twin.overrides)}) and "
                    f"{element.name} ({' '.join(element.overrides)}){hint}"
                )
