"""Which names of shards may be opened, and how patient a reader is.

An allow-list of schemes decides what may be opened: http and https, and s3, gs and hf through the
file systems that fsspec has for them. `pipe:COMMAND` runs a shell, so the configuration has to
allow it. Names are never changed by environment variables.
"""

import re
from dataclasses import dataclass

from braceexpand import braceexpand

from flatcal_dist.data.errors import DataError
from flatcal_dist.patterns import too_many_names
from flatcal_dist.urls import hide, shown

SCHEMES = ("http", "https", "s3", "gs", "hf")


@dataclass(frozen=True)
class Access:
    """How patient a reader is, and what it may open."""

    stall_timeout: float = 30.0  # seconds without a byte, or with next to none
    retries: int = 5  # for a shard
    backoff: float = 0.5  # seconds before the first of them; doubles with each
    allow_pipe: bool = False


def is_remote(name: str) -> bool:
    """Tell whether the name or pattern of a shard is a URL or a command, and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", name) is not None


def expand_urls(pattern: str, access: Access) -> list[str]:
    """Return the URLs that a brace pattern stands for.

    Raises DataError for a pattern with unbalanced braces and for a scheme that is not allowed.
    """
    if problem := too_many_names(pattern):
        raise DataError(f"The shard pattern {problem}.")
    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"The shard pattern {shown(pattern)!r} has unbalanced braces: "
            f"{hide(str(error), pattern)}."
        ) from None
    for url in urls:
        check_allowed(url, access)
    return urls


def check_allowed(url: str, access: Access) -> None:
    """Raise DataError if a URL or command may not be opened."""
    if url.startswith("pipe:"):
        if not access.allow_pipe:
            raise DataError(
                f"{shown(url)!r} would run a command in a shell. If you trust where this name "
                "comes from, set data.allow_pipe=true."
            )
    elif (scheme := url.partition("://")[0]).lower() not in SCHEMES:
        raise DataError(
            f"{shown(url)}: {scheme}:// is no scheme that shards are read from; expected one of "
            f"{', '.join(SCHEMES)}, `pipe:COMMAND`, or a path."
        )
