"""Messages about a wrong configuration, which name the key, its origin and the remedy."""

import difflib
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flatcal_dist.config.choosing import Chooser
from flatcal_dist.config.files import Layers

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 80

ONE_OF_TWO = ("bool_type", "bool_parsing")
NUMBERS = ("int_type", "int_parsing", "int_from_float", "float_type", "float_parsing")


def explain(
    error: ValidationError,
    layers: Layers,
    known: Sequence[str],
    choosers: Mapping[str, Chooser],
) -> str:
    """Return one line for each problem.

    Args:
        error: What the validation of `layers.values` raised.
        layers: Where the values were written.
        known: All dotted keys.
        choosers: The sections with a choice, by their names.
    """
    lines = []
    for problem in error.errors():
        kind, names = problem["type"], [str(part) for part in problem["loc"]]
        if names and names[0] in choosers:
            if kind == "union_tag_invalid":
                names.append(choosers[names[0]].by)
                problem["input"] = problem["ctx"]["tag"]
                expected = problem["ctx"]["expected_tags"]
                problem["msg"] = f"expected one of {expected.replace(chr(39), '')}"
            else:
                del names[1:2]  # the name of the choice
        # A union (str or list) adds the tried type to the path. Keys and indexes are kept.
        key = ".".join(
            part
            for part in names
            if kind == "extra_forbidden"  # the last part may be anything
            or (part.isidentifier() and part not in ("str", "list", "int"))
        )
        origin = layers.origin_of(key)
        place = f" ({origin})" if origin else ""
        shown = SHOWN.repr(problem["input"])
        if kind == "extra_forbidden":
            line = f"{as_written(key)}: no such key{place}{_advice(key, names[-1], known)}"
        elif kind == "value_error":
            line = f"{key + ': ' if key else ''}{problem['ctx']['error']}{place}"
        elif kind in ("model_type", "model_attributes_type"):
            line = f"{key} = {shown}{place}: this is a section; set one of its keys"
            word = problem["input"]
            if key in choosers and isinstance(word, str) and word in choosers[key].sections:
                line += f": {choosers[key].key}={word}"
        else:
            line = f"{key} = {shown}{place}: {problem['msg'].lower()}"
            line += _spelling(kind, problem["input"])
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def as_written(key: str) -> str:
    """Return a key as it is, or in quotes if letters in it could not be seen."""
    return key[:100] if re.fullmatch(r"[\w.+-]*", key, re.ASCII) else repr(key[:100])


def _advice(key: str, last: str, known: Sequence[str]) -> str:
    if "." in last:  # `a.b: 1` in a file, where sections are nested
        section, _, rest = last.rpartition(".")
        return f"; in a file a dot is no separator: write {rest} into the section {section}"
    near = nearest(key, known)
    return f"; did you mean {near}?" if near else ""


def nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key or section most like `key`, or None.

    Its last part is compared first (the section may be forgotten), then sections, then whole keys.
    """
    key = key[:100].replace("-", "_")
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    if same_leaf:
        return difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)[0]
    if "." not in key:
        sections = list(dict.fromkeys(other.partition(".")[0] for other in known))
        if match := difflib.get_close_matches(key.lower(), sections, n=1, cutoff=0.7):
            return match[0]
    match = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return match[0] if match else None


def _spelling(kind: str, value: Any) -> str:
    """Say how to write what other readers of YAML or of numbers take for a value of this kind."""
    if isinstance(value, str) and kind in ONE_OF_TWO:
        if value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        return "; write true or false"
    if kind not in NUMBERS:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if isinstance(value, str):
        if value.lower() == "none":
            return "; write null for none"
        if re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?", value):
            return f"; write {value.replace('_', '')}"
        if kind.startswith("float") and re.fullmatch(r"[-+]?[0-9]+,[0-9]+", value):
            return f"; a decimal point is no comma: write {value.replace(',', '.')}"
        if re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?", value):
            return f"; write {value.replace(',', '')}"
        return "; write a number in decimal digits"
    return ""
