"""The kinds of values in a configuration, and what each of them refuses."""

import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from flatcal_dist.patterns import too_many_names

MANY = 10**12  # beyond any number of images or steps


class Section(BaseModel):
    """Immutable and strict: no unknown keys, no silent conversion of types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; is a variable of the shell unset? Write null for none")
    if value == "None":
        raise ValueError("'None' is written in Python: write null for none")
    if len(value) > 4096:
        raise ValueError(f"has {len(value):,} characters; at most 4,096 are read")
    if odd := [c for c in value if unicodedata.category(c) in ("Cc", "Cs")]:
        raise ValueError(f"{value[:80]!r} contains {odd[0]!r}, which no name may contain")
    return value


def _path(value: str) -> str:
    try:
        Path(value).expanduser()
    except RuntimeError:
        user = value.split("/", 1)[0]
        raise ValueError(f"{value[:80]!r}: there is no user {user[1:]!r} here") from None
    if variable := re.search(r"(?:^|/)(\$\{[^/}]*\}|\$\w+)(?=/|$)", value):
        raise ValueError(
            f"{value[:80]!r}: {variable[1]} is not replaced by its value here. Write it out, or "
            "give the path on the command line, where the shell replaces it"
        )
    if any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError(
            f"{value[:80]!r}... has a part of more than 255 bytes: choose a shorter one"
        )
    return value


def _shards(value: str) -> str:
    if problem := too_many_names(value):
        raise ValueError(problem)
    return value if value.startswith("pipe:") else _path(value)


def _options(value: dict[str, Any]) -> dict[str, Any]:
    for inner in _leaves(value):
        if isinstance(inner, float) and not math.isfinite(inner):
            raise ValueError(f"{value!r} has a number that is not finite")
        if inner is not None and not isinstance(inner, bool | int | float | str):
            raise ValueError(f"{value!r} may hold numbers, text, lists and keys, not {inner!r}")
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def _score_keys(value: list[str]) -> list[str]:
    if value:  # the list of scores takes long to import
        from flatcal_dist.calibration.confidence.sources import requested

        requested(value)
    return value


Text = Annotated[str, AfterValidator(_text)]
PathText = Annotated[Text, AfterValidator(_path)]
Shards = Annotated[Text, AfterValidator(_shards)]
Label = Annotated[Text, Field(max_length=128)]  # W&B's limit
Options = Annotated[dict[str, Any], AfterValidator(_options)]
ScoreKeys = Annotated[list[Text], Field(max_length=1000), AfterValidator(_score_keys)]
Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(gt=0, le=100)]
