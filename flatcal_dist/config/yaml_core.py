"""Plain values as YAML: the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema).

010 is ten, 1e-3 is a number, and yes, 1:30 or 2024-05-01 are text. PyYAML alone reads YAML 1.1,
where these are eight, text, true, ninety and a date.
"""

import copy
import json
import re
from functools import lru_cache
from typing import Any, ClassVar

import yaml

from flatcal_dist.errors import ConfigError

MAX_DEPTH = 32  # of nested keys and lists
MAX_VALUES = 1_000_000  # in one file; aliases are counted each time that they are used
KEPT_BYTES = 1 << 16  # documents up to this size are parsed once, as those that runs inherit

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

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Refuse brackets that are nested too deeply before all that follow have been read."""
        super().fetch_flow_collection_start(token)
        if self.flow_level > MAX_DEPTH:
            raise _TooMuch

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
        if len(text) > KEPT_BYTES:
            return _measured(text)
        return copy.deepcopy(_kept(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}{_hint(str(error))}") from None
    except _TooMuch:
        raise ConfigError(
            f"{where} cannot be read: at most {MAX_DEPTH} levels and {MAX_VALUES:,} values are "
            "allowed, aliases counted as often as they are used"
        ) from None
    except (ValueError, KeyError) as error:  # a value does not fit its explicit tag
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _measured(text: str | bytes) -> Any:
    value = yaml.load(text, _Loader)
    _measure(value)
    return value


_kept = lru_cache(maxsize=128)(_measured)


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
