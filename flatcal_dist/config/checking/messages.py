"""Messages about a wrong configuration, which name the key, its origin and the remedy."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flatcal_dist.config.checking.choosing import Chooser
from flatcal_dist.config.files import Layers, shown

ONE_OF_TWO = ("bool_type", "bool_parsing")
STUDYS = ("base", "axes", "grid", "set", "exclude")
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
                _name_choices(problem, choosers[names[0]])
                names.append(choosers[names[0]].by)
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
        value = shown(problem["input"])
        if kind == "extra_forbidden":
            advice = _advice(key, names[-1], known, choosers)
            line = f"{as_written(key)}: no such key{place}{advice}"
        elif kind == "value_error":
            line = f"{key + ': ' if key else ''}{problem['ctx']['error']}{place}"
        elif kind in ("model_type", "model_attributes_type"):
            line = f"{key} = {value}{place}: this is a section; set one of its keys"
            word = problem["input"]
            if key in choosers and isinstance(word, str) and word in choosers[key].sections:
                line += f": {choosers[key].key}={word}"
            elif word is None:
                line += ", or write {} to clear what was inherited"
        else:
            line = f"{key} = {value}{place}: {problem['msg'].lower()}"
            line += _spelling(kind, problem["input"])
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _name_choices(problem: ErrorDetails, chooser: Chooser) -> None:
    """Say in a problem what can be chosen, and show what was written instead."""
    given = problem["input"].get(chooser.by)
    choices = list(chooser.sections)
    problem["input"] = given
    problem["msg"] = f"expected one of {', '.join(choices)}"
    word = "none" if given is None else str(given).lower()
    if near := difflib.get_close_matches(word, choices, n=1, cutoff=0.6):
        problem["msg"] += f"; did you mean {near[0]}?"


def as_written(key: str) -> str:
    """Return a key as it is, or in quotes if letters in it could not be seen."""
    return key[:100] if re.fullmatch(r"[\w.+-]*", key, re.ASCII) else repr(key[:100])


def _advice(key: str, last: str, known: Sequence[str], choosers: Mapping[str, Chooser]) -> str:
    """Return what to write instead of a key that does not exist."""
    if "." in last:  # `a.b: 1` in a file, where sections are nested
        section, _, rest = last.rpartition(".")
        return f"; in a file a dot is no separator: write {rest} into the section {section}"
    if key in STUDYS:
        return (
            "; this is a key of a study, which `recipes/study.py` reads. A file names others by "
            "`inherits`"
        )
    if difflib.get_close_matches(key.lower(), ["inherits"], cutoff=0.8):
        return "; did you mean inherits?"
    section, _, leaf = key.partition(".")
    if section in choosers and leaf in ("name", "rule", "type", "kind"):
        return f"; did you mean {choosers[section].key}?"
    for chooser in choosers.values():
        if key in chooser.sections:
            return f"; {key} is a choice of {chooser.section}: write {chooser.key}={key}"
    if near := nearest(key, known):
        return f"; did you mean {near}?"
    there = any(other.startswith(f"{section}.") for other in known)
    return f"; `flatcal config{f' {section}' if there else ''}` lists the keys"


def nearest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key or section most like `key`, or None.

    The last part is compared first, because the section may be forgotten. Initials count as well:
    lr is learning_rate. In a section that exists the keys of this section follow, then the keys of
    others. Without a section the names of sections follow, then whole keys.
    """
    key = key[:100].replace("-", "_").strip("_")
    section, _, leaf = key.lower().rpartition(".")
    sections = list(dict.fromkeys(other.partition(".")[0] for other in known))
    if key != leaf and leaf in sections and not section:  # in capitals
        return leaf
    leaves = {other: other.rsplit(".", 1)[-1] for other in known}
    same_leaf = [other for other in known if leaves[other] == leaf]
    if not same_leaf and len(leaf) > 1:
        same_leaf = [other for other in known if _initials(leaves[other]) == leaf]
    if same_leaf:
        return difflib.get_close_matches(key, same_leaf, n=1, cutoff=0.0)[0]
    if not section and (match := difflib.get_close_matches(leaf, sections, n=1, cutoff=0.7)):
        return match[0]
    if section in sections:
        near = [leaves[other] for other in known if other.startswith(f"{section}.")]
        if match := difflib.get_close_matches(leaf, near, n=1, cutoff=0.5):
            return f"{section}.{match[0]}"
        near = [*leaves.values()]
        if match := difflib.get_close_matches(leaf, near, n=1, cutoff=0.7):
            return next(other for other in known if leaves[other] == match[0])
        return None
    match = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.5)
    return match[0] if match else None


def _initials(leaf: str) -> str:
    return "".join(word[:1] for word in leaf.split("_"))


def _spelling(kind: str, value: Any) -> str:
    """Say how to write what other readers of YAML or of numbers take for a value of this kind."""
    if kind == "list_type" and re.fullmatch(r"[\w .,+-]{1,80}", str(value)):
        return f"; write [{value}]"
    if kind == "dict_type":
        return "; write keys and values: {key: value}"
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
