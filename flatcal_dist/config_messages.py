"""What is wrong with a configuration, in words that name the key, its origin and the remedy."""

import difflib
import re
import reprlib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from flatcal_dist.config_files import Layers

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = SHOWN.maxlong = 80

ONE_OF_TWO = ("bool_type", "bool_parsing")
NUMBERS = ("int_type", "int_parsing", "int_from_float", "float_type", "float_parsing")


def explain(error: ValidationError, layers: Layers, known: Sequence[str]) -> str:
    """One line for each problem. known: all keys that there are, dotted."""
    lines = []
    for problem in error.errors():
        names = [str(part) for part in problem["loc"]]
        # A union (str or list) adds the tried type to the path: keep what is a key or an index.
        key = ".".join(
            part for part in names if part.isidentifier() and part not in ("str", "list", "int")
        )
        origin = layers.origin_of(key)
        place = f" ({origin})" if origin else ""
        shown, kind = SHOWN.repr(problem["input"]), problem["type"]
        if kind == "extra_forbidden":
            near = nearest(key, known)
            line = f"{key[:100]}: no such key{place}" + (f"; did you mean {near}?" if near else "")
        elif kind == "value_error":
            line = f"{key + ': ' if key else ''}{problem['ctx']['error']}{place}"
        elif kind == "model_type":
            line = f"{key} = {shown}{place}: this is a section; set one of its keys"
        else:
            line = f"{key} = {shown}{place}: {problem['msg'].lower()}"
            line += _spelling(kind, problem["input"])
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key most like `key`: by its last part first (a forgotten section), then whole."""
    key = key[:100]
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [other for other in known if other.rsplit(".", 1)[-1] == leaf]
    match = difflib.get_close_matches(
        key, same_leaf or known, n=1, cutoff=0.0 if same_leaf else 0.5
    )
    return match[0] if match else None


def _spelling(kind: str, value: Any) -> str:
    """How to write what other readers of YAML, or of numbers, take for a value of this kind."""
    if isinstance(value, str) and kind in ONE_OF_TWO:
        if value.lower() in ("yes", "no", "on", "off", "y", "n"):
            return f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'}"
        return "; write true or false"
    if kind not in NUMBERS:
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"; write {int(value)}"
    if isinstance(value, str):
        if re.fullmatch(r"[-+]?[0-9][0-9_,]*(\.[0-9_]*)?", value):
            return f"; write {re.sub('[_,]', '', value)}"
        return "; write a number in decimal digits"
    return ""
