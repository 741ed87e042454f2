"""Configuration files are layers of plain values: YAML, inherited files, and overrides.

YAML is read by the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): 010 is
ten, 1e-3 is a number, and yes, 1:30 or 2024-05-01 are text. PyYAML alone reads YAML 1.1, where
these are eight, text, true, ninety and a date.
"""

import json
import re
import reprlib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from flatcal_dist.errors import ConfigError
from flatcal_dist.files import read_bytes
from flatcal_dist.urls import hide, public

MAX_DEPTH = 32  # of nested keys and lists
MAX_VALUES = 1_000_000  # in one file; aliases are counted each time that they are used
MAX_FILES = 100  # that one file inherits, directly or not
MAX_BYTES = 16 << 20
COMMAND_LINE = "the command line"


CORE = (  # tag, pattern, first characters; the order decides
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class _TooMuch(Exception):
    pass


class _Loader(yaml.SafeLoader):
    """Reads the core schema and merge keys. Each key is a word, and stands there once."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (none of YAML 1.1's)
    yaml_constructors: ClassVar[dict] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rsplit(":", 1)[1] in ("null", "bool", "str", "seq", "map")
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooMuch
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    # types-PyYAML takes the anchor for a dict; PyYAML passes its name.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            word = isinstance(key, yaml.ScalarNode) and key.tag.endswith((":str", ":merge"))
            if not word:
                text = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise _problem(f"a key has to be a word, not {text!r}", key)
            if key.value in seen:
                raise _problem(f"key written twice: {key.value}", key)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace merge keys. Values of the mapping win, then those of the first merged mapping.

        Only some versions of PyYAML do the second.
        """
        merges = [value for key, value in node.value if key.tag.endswith(":merge")]
        own = [pair for pair in node.value if not pair[0].tag.endswith(":merge")]
        node.value = own  # before looking into others, which may contain this one
        seen, merged = {key.value for key, _ in own}, []
        for value in merges:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    raise _problem("<< merges a mapping, or a list of mappings", value)
                self.flatten_mapping(source)
                new = [pair for pair in source.value if pair[0].value not in seen]
                seen |= {key.value for key, _ in new}
                merged += new
        node.value = merged + own


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    try:
        return int(text if base == 10 else text[2:], base)
    except ValueError:  # more digits than Python reads, or `!!int word`
        raise _problem(f"{text[:20]} is not a whole number that can be read", node) from None


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node)
    try:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise _problem(f"{text[:20]} is not a number", node) from None


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in CORE:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Return the values of a YAML document: plain values, lists, and dicts with words as keys.

    Args:
        text: The document; bytes may be UTF-8, or UTF-16 with a byte order mark.
        where: What the document is, for the message.

    Raises:
        ConfigError: The text is not YAML, or has a tag, a depth or a size that is not read.
    """
    try:
        value = yaml.load(text, _Loader)
        _measure(value)
        return value
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}{_hint(str(error))}") from None
    except _TooMuch:
        raise ConfigError(
            f"{where} cannot be read: at most {MAX_DEPTH} levels and {MAX_VALUES:,} values are "
            "allowed, aliases counted as often as they are used"
        ) from None
    except (ValueError, KeyError) as error:  # a value does not fit its explicit tag
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _hint(problem: str) -> str:
    if "'\\t'" in problem:
        return "\nA line is indented with a tab: write spaces"
    if "unacceptable character" in problem and "byte string" in problem:
        return "\nIt is not text in UTF-8: save it so"
    if "could not determine a constructor" in problem:
        return "\nNo tag is needed: write numbers, words, lists and keys as they are"
    return ""


def _measure(value: Any) -> None:
    """Raise _TooMuch for a value that is too deep or too large, or contains itself."""
    found, level = 1, [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                found += len(one)
                if found > MAX_VALUES:
                    raise _TooMuch
                inner.extend(one.values() if isinstance(one, dict) else one)
        level = inner
    if level:
        raise _TooMuch


def dump_yaml(values: dict[str, Any]) -> str:
    """Return YAML that `parse_yaml` reads back as these values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def as_override(key: str, value: Any) -> str:
    """Return `key=value`, which is read back as just this value."""
    if isinstance(value, str):
        try:
            if parse_yaml(value, key) == value:
                return f"{key}={value}"
        except ConfigError:
            pass
    # JSON is YAML, except for escapes of letters beyond 16 bits.
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


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
        quoted = shlex.quote(as_override(key, text))
        hint = f"\nIf it is a text, put it into quotes: {quoted}" if len(quoted) < 200 else ""
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
