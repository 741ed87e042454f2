"""The number of names that a shard pattern stands for, before it is expanded."""

import math
import re

MAX_NAMES = 1_000_000


def too_many_names(pattern: str) -> str | None:
    """Return why a pattern with braces cannot be expanded, or None if it can.

    `{0000..1023}` counts its range and `{a,b}` its parts. Several of them multiply. Nested braces
    are counted as if they stood side by side, which is an upper bound.
    """
    if len(pattern) > 4096:
        return f"a pattern of {len(pattern):,} characters is too long"
    counts = [
        abs(int(last[:20]) - int(first[:20])) // max(abs(int(step[:20] or 1)), 1) + 1
        for first, last, step in re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}", pattern)
    ]
    counts += [part.count(",") + 1 for part in re.findall(r"\{([^{}]*,[^{}]*)", pattern)]
    if math.prod(counts) <= MAX_NAMES:
        return None
    return (
        f"{pattern[:100]!r} stands for {math.prod(counts):,} shards, and at most {MAX_NAMES:,} are "
        "read: check the numbers in the braces"
    )
