"""Every key of a configuration in words, for `flatcal config` and configs/README.md.

Types, bounds, defaults and meanings come from pydantic's JSON schema of each section, so that what
is shown is what is checked.
"""

import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from flatcal_dist.config.checking.choosing import CHOOSERS, Chooser, keys, sections_of
from flatcal_dist.config.checking.conditions import CONDITIONS
from flatcal_dist.config.checking.messages import as_written, nearest
from flatcal_dist.config.checking.older import NOW
from flatcal_dist.config.root import Config
from flatcal_dist.config.yaml_core import as_override
from flatcal_dist.errors import ConfigError
from flatcal_dist.files import read_bytes, write_text

FIRST, LAST = "<!-- keys: flatcal config --markdown -->", "<!-- end of keys -->"
WIDTH = 100


@dataclass(frozen=True)
class Entry:
    """One key of a configuration.

    Attributes:
        key: The dotted key.
        value: Type and bounds in words.
        default: The default, as YAML writes it.
        meaning: The description of the key.
        only: The choices or values of other keys without which the key is not read; "" for none.
        choices: What can be chosen and what it is, for the key that makes a section's choice.
        free: Whether keys of any name may stand below this one.
    """

    key: str
    value: str
    default: str
    meaning: str
    only: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    free: bool = False

    @property
    def section(self) -> str:
        return self.key.partition(".")[0]


def entries(key: str | None = None) -> list[Entry]:
    """Return every key, those of a section, or one key with each of its meanings.

    A key that several choices of a section have is there once for each different meaning, type or
    default. Raises ConfigError for an unknown key, and names the nearest one.
    """
    every = list(_all())
    if key is None:
        return every
    found = [
        one
        for one in every
        if key in (one.section, one.key) or (one.free and key.startswith(f"{one.key}."))
    ]
    if found:
        return found
    if key in NOW:
        raise ConfigError(f"{key}: this key has another place now: {NOW[key]}")
    near = nearest(key.partition("=")[0], list(keys()))
    raise ConfigError(
        f"{as_written(key)}: no such key or section"
        + (f"; did you mean {near}?" if near else "; `flatcal config` lists all of them")
    )


def _all() -> Iterator[Entry]:
    for name in Config.model_fields:
        if name in CHOOSERS:
            yield from _of_choice(CHOOSERS[name])
        else:
            yield from _of_section(name, *sections_of(name))


def _of_section(name: str, section: type[BaseModel]) -> Iterator[Entry]:
    for key, schema in section.model_json_schema()["properties"].items():
        default = section.model_fields[key].get_default(call_default_factory=True)
        dotted = f"{name}.{key}"
        yield Entry(
            dotted,
            _in_words(schema),
            as_override("", default).removeprefix("="),
            schema.get("description", ""),
            next((one.where for one in CONDITIONS if dotted in one.keys), ""),
            free=schema.get("type") == "object",
        )


def _of_choice(chooser: Chooser) -> Iterator[Entry]:
    """Yield the key that chooses, then the keys of the choices, equal ones together."""
    choices = {name: _first_line(section) for name, section in chooser.sections.items()}
    text = "What the section chooses. The other keys follow from it."
    yield Entry(chooser.key, _one_of(list(choices)), chooser.default, text, choices=choices)
    owners: dict[tuple, list[str]] = {}
    for name, section in chooser.sections.items():
        for one in _of_section(chooser.section, section):
            if one.key != chooser.key:
                shown = (one.key, one.value, one.default, one.meaning, one.only, one.free)
                owners.setdefault(shown, []).append(name)
    order = list(keys())
    for shown in sorted(owners, key=lambda shown: order.index(shown[0])):
        key, value, default, meaning, only, free = shown
        made = f"{chooser.key}={_one_of(owners[shown])}"
        if len(owners[shown]) == len([name for name in choices if name != "none"]):
            made = f"{chooser.key} other than none"
        yield Entry(key, value, default, meaning, f"{made} and {only}" if only else made, free=free)


def _first_line(section: type) -> str:
    return (inspect.getdoc(section) or "").partition("\n")[0]


def _one_of(words: list[Any]) -> str:
    texts = [word if isinstance(word, str) else json.dumps(word) for word in words]
    return " or ".join([", ".join(texts[:-1]), texts[-1]]) if len(texts) > 1 else texts[0]


NAMES = {"integer": "whole number", "number": "number", "boolean": "true or false",
         "object": "keys and values", "null": "null", "string": "text"}  # fmt: skip
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most",
          "exclusiveMaximum": "below"}  # fmt: skip


def _in_words(schema: dict[str, Any]) -> str:
    """Return the type and bounds that a JSON schema describes."""
    return _one_of(list(_alternatives(schema)))


def _alternatives(schema: dict[str, Any]) -> Iterator[Any]:
    """Yield each value, or kind of values, that a JSON schema allows."""
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from _alternatives(one)
    elif "enum" in schema or "const" in schema:
        yield from schema.get("enum", [schema.get("const")])
    elif schema["type"] == "array":
        least, most = schema.get("minItems"), schema.get("maxItems")
        count = f"{most} " if least == most and most else ""
        yield f"list of {count}{_one_kind(schema['items'], many='s')}"
    else:
        yield _one_kind(schema)


def _one_kind(schema: dict[str, Any], many: str = "") -> str:
    bounds = [f"{BOUNDS[key]} {_number(schema[key])}" for key in BOUNDS if key in schema]
    if "minimum" in schema and "maximum" in schema:
        bounds = [f"from {_number(schema['minimum'])} to {_number(schema['maximum'])}"]
    if "maxLength" in schema:
        bounds.append(f"of at most {schema['maxLength']} characters")
    if "pattern" in schema:
        bounds.append(f"that matches {schema['pattern']}")
    return f"{NAMES[schema['type']]}{many} {' and '.join(bounds)}".strip()


def _number(value: float) -> str:
    if isinstance(value, int) or abs(value) < 1e15:
        return f"{value:,}".removesuffix(".0")
    return f"{value:g}".replace("e+", "e")


def as_text(found: list[Entry]) -> str:
    """Return entries as lines for a terminal."""
    return "\n".join(itertools.chain.from_iterable(map(_lines, found)))


def _lines(entry: Entry) -> Iterator[str]:
    yield entry.key
    only = f"; only with {entry.only}" if entry.only else ""
    for text in (entry.meaning, f"{entry.value}; default {entry.default}{only}"):
        yield from textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    for name, text in entry.choices.items():
        yield from textwrap.wrap(
            f"{name}: {text}", WIDTH, initial_indent="      ", subsequent_indent="        "
        )


def as_markdown() -> str:
    """Return the reference of all keys, with a heading and a table for each section."""
    parts = []
    for section, group in itertools.groupby(entries(), lambda entry: entry.section):
        found = list(group)
        parts.append(f"### {section}\n")
        if section not in CHOOSERS:
            parts.append(f"{_first_line(*sections_of(section))}\n")
        for name, text in found[0].choices.items():
            parts.append(f"* `{found[0].key.partition('.')[2]}: {name}`: {text}")
        if found[0].choices:
            parts.append("")
        parts += ["| key | value | default | meaning |", "|---|---|---|---|"]
        parts += [_row(entry) for entry in found]
        parts.append("")
    return "\n".join(parts)


def _row(entry: Entry) -> str:
    only = f" Only with {entry.only}." if entry.only else ""
    cells = (f"`{entry.key}`", entry.value, f"`{entry.default}`", entry.meaning + only)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def with_reference(text: str, where: str) -> str:
    """Return a Markdown text with the reference between its marker lines.

    Raises ConfigError, which names the text by `where`, unless both lines are there once, in order.
    """
    if text.count(FIRST) != 1 or text.count(LAST) != 1 or text.index(FIRST) > text.index(LAST):
        raise ConfigError(f"{where}: expected the line {FIRST} once and, after it, the line {LAST}")
    before, _, rest = text.partition(FIRST)
    return f"{before}{FIRST}\n\n{as_markdown()}{LAST}{rest.partition(LAST)[2]}"


def write_markdown(file: Path) -> None:
    """Write the reference into a Markdown file, between its marker lines.

    Raises:
        ConfigError: The file is not there, is no text, or has no marker lines.
        WriteError: The file cannot be written.
    """
    try:
        text = read_bytes(file).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--markdown {file}: the file cannot be read: {error}") from None
    write_text(file, with_reference(text, f"--markdown {file}"))
