"""Shards without random access, and the number of samples that make an epoch.

A stream has no index. The number of samples comes from the `_info.json` beside the shards, which
`flatcal shard` writes, or from `data.epoch_samples`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.access import Access, expand_urls, is_remote
from flatcal_dist.data.shards.cache import ShardCache
from flatcal_dist.data.shards.connections import NotThere
from flatcal_dist.data.shards.info import parse_info
from flatcal_dist.data.shards.remote import read_small
from flatcal_dist.data.shards.writing import expand
from flatcal_dist.urls import base_name, identity, shown


@dataclass(frozen=True)
class Stream:
    """Shards without random access, and the number of samples that make an epoch."""

    shards: tuple[str, ...]  # URLs, commands or paths
    lengths: tuple[int, ...] | None  # samples of each shard, where `_info.json` tells
    sha256: tuple[str | None, ...]  # of each shard, where a file beside it tells
    samples: int
    classes: int
    access: Access
    cache: ShardCache | None = None

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return self.samples

    @property
    def identity(self) -> str:
        """The SHA-256 over names and lengths of the shards, which need no reading."""
        text = json.dumps([[identity(shard) for shard in self.shards], self.lengths, self.samples])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def promise(self) -> str:
        """What a run may rely on, in words."""
        text = f"streaming reader, {len(self.shards):,} shards, {self.samples:,} images an epoch"
        if self.lengths is not None:
            text += " (counts of _info.json): no image comes twice in an epoch. "
        else:
            text += (
                " (data.epoch_samples), and approximate epochs: a worker whose shards hold fewer "
                "images than its part of an epoch begins them again, which is counted; with more, "
                "it leaves the rest out. "
            )
        return text + (
            "Which images come, and together, depends on the numbers of ranks and workers. Resumed "
            "at the end of an epoch, a run goes on as if it had not stopped; inside of an epoch "
            "only with as many ranks and workers and the same micro-batches (what was done is read "
            "again, without decoding), and with others some of that epoch's images come twice, "
            "others not at all"
        )


def open_stream(
    pattern: str | Sequence[str],
    split: str,
    classes: int,
    access: Access,
    epoch_samples: int | None = None,
    cache: ShardCache | None = None,
) -> Stream:
    """Open the shards that URLs, commands and paths name, without reading them.

    Args:
        pattern: The names, see `list_shards`.
        split: The split that a directory stands for.
        classes: The number of classes; labels are checked as samples are read.
        access: How patient to be, and what may be opened.
        epoch_samples: The number of samples of an epoch. None counts the samples by the
            `_info.json` beside the shards, which then has to be there.
        cache: Where shards from URLs are kept; None keeps none.

    Raises:
        DataError: A name stands for no shards, or the number of samples is not known.
    """
    shards = list_shards(pattern, split, access)
    lengths = _lengths(shards, access)
    samples = _epoch_samples(lengths, epoch_samples)
    return Stream(
        shards=tuple(shards),
        lengths=tuple(lengths) if lengths else None,
        sha256=tuple(checksums(shards, access)),
        samples=samples,
        classes=classes,
        access=access,
        cache=cache,
    )


def list_shards(pattern: str | Sequence[str], split: str, access: Access) -> list[str]:
    """Return the shards that patterns stand for, each once, in the order given.

    URLs and commands may have braces. A URL that ends in a slash stands for the shards that the
    `_info.json` there lists for the split. For paths see `expand`.

    Args:
        pattern: One name or several.
        split: The split that a directory stands for.
        access: How patient to be, and what may be opened.

    Raises:
        DataError: A pattern stands for no shards, a scheme is not allowed, or two URLs differ in
            their credentials only. Credentials are renewed, so they are no part of the identity of
            a shard.
    """
    shards: list[str] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        if not is_remote(one):
            shards += map(str, expand(one, split))
        elif one.endswith("/"):
            (directory,) = expand_urls(one, access)
            splits = _read_info(directory, access)
            if split not in splits:
                raise DataError(
                    f"{shown(directory)}_info.json lists no split {split!r}, only "
                    f"{', '.join(splits) or 'none'}. Name the shards by pattern."
                )
            shards += [directory + name for name, _ in splits[split]]
        else:
            shards += expand_urls(one, access)
    shards = list(dict.fromkeys(shards))
    seen: dict[str, str] = {}
    for shard in shards:
        if seen.setdefault(identity(shard), shard) != shard:
            raise DataError(
                f"{shown(shard)} is named twice, with different user info, query or fragment, "
                "which are no part of its identity. Name each shard once, by a path of its own."
            )
    return shards


def _epoch_samples(lengths: list[int] | None, asked: int | None) -> int:
    """Return the number of samples of an epoch. Raises DataError if it is not known."""
    if lengths is not None:
        if (asked or 1) > sum(lengths):
            raise DataError(
                f"data.epoch_samples={asked}, but by their _info.json the shards hold "
                f"{sum(lengths)} samples. Lower it, or leave it out."
            )
        return asked or sum(lengths)
    if asked is None:
        raise DataError(
            "A stream has no index, and no _info.json beside these shards counts all of them: say "
            "how many images make an epoch, data.epoch_samples=N (1281167 for ImageNet-1K)."
        )
    return asked


def _lengths(shards: Sequence[str], access: Access) -> list[int] | None:
    """Return the numbers of samples that `_info.json` tells, or None unless it tells all."""
    listed: dict[str, int] = {}
    for place in dict.fromkeys(_place(shard) for shard in shards):
        try:
            splits = _read_info(place, access) if place else {}
        except NotThere:
            continue
        listed |= {place + name: length for rows in splits.values() for name, length in rows}
    names = [_place(shard) + base_name(shard) for shard in shards]
    return [listed[name] for name in names] if all(name in listed for name in names) else None


def checksums(shards: Sequence[str], access: Access) -> list[str | None]:
    """Return the SHA-256 of each shard, where a file beside it tells.

    The file is PREFIX.sha256 for PREFIX-0000.tar and so on.
    """
    files = [re.sub(r"-\d+\.tar$", ".sha256", base_name(shard)) for shard in shards]
    recorded: dict[str, str] = {}
    for place, file in dict.fromkeys(zip(map(_place, shards), files, strict=True)):
        if not place or not file.endswith(".sha256"):
            continue
        with suppress(NotThere):
            text = read_small(place + file, access).decode("utf-8", "replace")
            found = re.findall(r"^([0-9a-f]{64}) [ *](.+)$", text, re.MULTILINE)
            recorded |= {place + name: digest for digest, name in found}
    return [recorded.get(_place(shard) + base_name(shard)) for shard in shards]


def class_names(shards: Sequence[str], access: Access) -> dict[str, list[str]]:
    """Return the names of classes that the plans beside shards list, by the name of the plan.

    `flatcal shard` writes a plan, in which the names stand in the order of the labels. Shards
    without a plan are left out. Raises DataError for a plan that cannot be read.
    """
    plans = [
        _place(shard) + re.sub(r"-\d+\.tar$", ".plan.json", base_name(shard))
        for shard in shards
        if _place(shard) and re.search(r"-\d+\.tar$", base_name(shard))
    ]
    found: dict[str, list[str]] = {}
    for plan in dict.fromkeys(plans):
        try:
            found[shown(plan)] = list(map(str, json.loads(read_small(plan, access))["classes"]))
        except NotThere:
            continue
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{shown(plan)} is not as `flatcal shard` wrote it: {error!r}"
            ) from None
    return found


def _place(shard: str) -> str:
    """Return the directory of a shard with its slash, or "" for a command."""
    if shard.startswith("pipe:"):
        return ""
    return (shard.partition("?")[0].rpartition("/")[0] or ".") + "/"


def _read_info(directory: str, access: Access) -> dict[str, list[tuple[str, int]]]:
    """Return file names and numbers of samples by split, from the `_info.json` of a directory."""
    name = f"{shown(directory)}_info.json"
    mend = "Mend it, or take it away and set data.epoch_samples."
    found = {}
    splits = parse_info(read_small(f"{directory}_info.json", access), name, mend)
    for split, about in splits.items():
        if about.lengths is None:
            raise DataError(
                f"{name} does not have the form splits -> name -> filenames, shard_lengths (split "
                f"{split!r} has no shard_lengths). {mend}"
            )
        found[split] = list(zip(about.names, about.lengths, strict=True))
    return found
