"""Configuration files are layers of plain values: YAML, inherited files, and overrides."""

import re
import reprlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatcal_dist.config.yaml_core import MAX_DEPTH, as_override, parse_yaml
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import read_bytes
from flatcal_dist.urls import hide, public

MAX_FILES = 100  # that one file inherits, directly or not
MAX_BYTES = 16 << 20
COMMAND_LINE = "the command line"

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 80
LONGEST = 200  # characters of a value in a message


def shown(value: Any) -> str:
    """Return a value for a message, cut if it is long."""
    text = SHOWN.repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


@dataclass(frozen=True)
class Origin:
    """Where a value was written. `layer` is its place in the order of layers; the last one wins."""

    layer: int
    name: str

    @property
    def on_command_line(self) -> bool:
        return self.name == COMMAND_LINE

    def __str__(self) -> str:
        return f"on {self.name}" if self.on_command_line else f"in {self.name}"


@dataclass
class Layers:
    """Values by section and key, and the origin of every value by its dotted key.

    `history` has all values that a key was given, with the number of the layer, in their order.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Origin] = field(default_factory=dict)
    history: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)

    def add(self, values: dict[str, Any], origin: Origin) -> None:
        """Put values over those of earlier layers. An empty mapping clears a section."""
        self._merge(self.values, values, origin, "")

    def _merge(self, into: dict, values: dict, origin: Origin, path: str) -> None:
        for key, value in values.items():
            full = f"{path}.{key}" if path else key
            if value and isinstance(value, dict):
                if not isinstance(into.get(key), dict):
                    into[key] = {}
                    self.origin.pop(full, None)
                self._merge(into[key], value, origin, full)
            else:
                # An empty mapping that an alias names twice must not become two names of one.
                into[key] = {} if value == {} else value
                for old in [other for other in self.origin if other.startswith(full + ".")]:
                    del self.origin[old]  # a whole section was replaced
                self.origin[full] = origin
                self.history.setdefault(full, []).append((origin.layer, value))

    def at(self, key: str, layer: int, default: Any) -> Any:
        """Return the value that a key had after a layer."""
        given = [value for number, value in self.history.get(key, ()) if number <= layer]
        return given[-1] if given else default

    def origin_of(self, key: str) -> Origin | None:
        """Return where a key, something in it, or its section was written."""
        inner = (o for k, o in self.origin.items() if k == key or k.startswith(key + "."))
        return next(inner, None) or self.origin.get(key.rsplit(".", 1)[0])


def read_layers(paths: Sequence[Path], overrides: Sequence[str], recorded: bool = False) -> Layers:
    """Read what each file inherits and the file, in their order, and then the command line.

    Args:
        paths: The files.
        overrides: The words of the command line, each `key.sub=value`.
        recorded: Whether a run wrote the file. A named pipe, which may never end, is refused then.

    Raises:
        ConfigError: A file cannot be read or inherits itself, or an override is not key.sub=value.
    """
    if recorded and (pipes := [path for path in paths if path.is_fifo()]):
        raise ConfigError(f"{pipes[0]} is a named pipe: expected the file that the run wrote")
    layers = Layers()
    files = [layer for path in paths for layer in _files(path, ())]
    for number, (name, values) in enumerate(files):
        layers.add(values, Origin(number, name))
    for override in overrides:
        layers.add(_parse_override(override), Origin(len(files), COMMAND_LINE))
    return layers


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"'{override[:100]}' is not an override: write key.sub=value")
    if not text.strip():
        raise ConfigError(
            f"'{override[:100]}' has no value. Is a variable of the shell unset? Write "
            f"{key.strip()}=null for none"
        )
    if len(parts) > MAX_DEPTH:
        raise ConfigError(f"'{override[:100]}...' is nested too deeply: write key.sub=value")
    try:
        value = parse_yaml(text, f"the override '{override[:100]}'")
    except ConfigError as error:
        quoted = shlex.quote(as_override(key, text)) if len(text) < LONGEST else ""
        short = 0 < len(quoted) < LONGEST
        hint = f"\nIf it is a text, put it into quotes: {quoted}" if short else ""
        raise ConfigError(f"{error}{hint}") from None
    if re.search(r"(^|\s)#", text) and "#" not in str(value):
        raise ConfigError(
            f"'{override[:100]}': what stands behind # is a comment in YAML, and would be lost. "
            f"Write quotes around the value: {key.strip()}='\"...\"'"
        )
    for part in reversed(parts):
        value = {part: value}
    return value


def _files(path: Path, chain: tuple[Path, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return name and values of a file, after those of the files that it inherits."""
    if "\0" in str(path):
        raise ConfigError(f"cannot read the configuration {str(path)!r}: no name contains a NUL")
    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path} inherits itself, by way of {chain[-1]}")
    own = _read_file(path, chain)
    parents = own.pop("inherits", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(one, str) and one for one in parents):
        raise ConfigError(
            f"{path}: inherits = {parents!r}: expected the name of a file, or a list of names"
        )
    found = []
    for parent in parents:
        found += _files(path.parent / parent, (*chain, path))
        if len(chain) > MAX_DEPTH or len(found) > MAX_FILES:
            raise ConfigError(f"{chain[0] if chain else path} inherits too many files")
    return [*found, (str(path), own)]


def _read_file(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        written = f", inherited by {chain[-1]}" if chain else ""
        hint = ""
        if re.search(r"\w+:/", str(path)):
            hint = ". A URL is not read: download the file, and name it by its path"
        elif isinstance(error, IsADirectoryError):
            hint = f". Name a file in it{_candidates(path)}"
        raise ConfigError(f"cannot read the configuration {path}{written}: {error}{hint}") from None
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB: it is no configuration")
    own = parse_yaml(text, str(path))
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise ConfigError(f"{path} must hold keys and values, not a {type(own).__name__}")
    return _with_private(own, path)


def private_file(file: Path) -> Path:
    """Return the private file with the credentials of a written configuration."""
    return file.with_name(f"{file.stem}.private{file.suffix}")


def _with_private(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the values of a file, with the credentials beside it put into their URLs."""
    try:
        private = parse_yaml(read_bytes(private_file(file)), str(private_file(file)))
    except FileNotFoundError:
        return values
    except (OSError, ValueError) as error:  # it may be of another user; the server will refuse
        print(f"URLs are opened without credentials: {hide(str(error))}", file=sys.stderr)
        return values

    def filled(own: Any, full: Any) -> Any:
        if isinstance(own, dict) and isinstance(full, dict):
            return own | {key: filled(own[key], full[key]) for key in own.keys() & full.keys()}
        return full if public(full) == own else own

    return filled(values, private)


def _candidates(directory: Path) -> str:
    names = sorted(file.name for file in directory.glob("*.yaml"))
    return f", such as {names[0]}" if names else ""
