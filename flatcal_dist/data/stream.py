"""Shards without random access, and how many of their samples make an epoch.

A stream has no index. Counts come from the `_info.json` beside the shards (see shards.py: splits ->
name -> filenames, shard_lengths, and sha256 if you like), or from `data.epoch_samples`.
"""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

from flatcal_dist.data.cache import ShardCache
from flatcal_dist.data.errors import DataError
from flatcal_dist.data.remote import (
    Access,
    NotThere,
    base_name,
    expand_urls,
    is_remote,
    read_small,
    shown,
)
from flatcal_dist.data.shards import expand


@dataclass(frozen=True)
class Stream:
    """Shards without random access, and how many of their samples make an epoch."""

    shards: tuple[str, ...]  # URLs, commands or paths
    lengths: tuple[int, ...] | None  # samples of each shard, where `_info.json` tells
    sha256: tuple[str | None, ...]  # of each shard, where `_info.json` tells
    samples: int
    classes: int
    access: Access
    cache: ShardCache | None = None

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.samples

    @property
    def identity(self) -> str:
        """SHA-256 over the shards' names and lengths: what is known without reading them."""
        text = json.dumps([[shown(shard) for shard in self.shards], self.lengths, self.samples])
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
    """The shards that URLs, commands and paths name, with the counts of their `_info.json`.

    Nothing else is read, and that need not exist if `epoch_samples` is given. Raises DataError.
    """
    shards = list_shards(pattern, split, access)
    known = describe(shards, access)
    lengths = [known[s][0] for s in shards] if all(s in known for s in shards) else None
    _check_counts(lengths, epoch_samples)
    return Stream(
        shards=tuple(shards),
        lengths=tuple(lengths) if lengths else None,
        sha256=tuple(known[s][1] if s in known else None for s in shards),
        samples=epoch_samples or sum(lengths),
        classes=classes,
        access=access,
        cache=cache,
    )


def list_shards(pattern: str | Sequence[str], split: str, access: Access) -> list[str]:
    """The shards that patterns stand for, each once, in the order given.

    URLs and commands may have braces; a URL that ends in a slash stands for the split's shards in
    the `_info.json` there; for paths see `shards.expand`. Raises DataError.
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
            shards += [directory + name for name, _, _ in splits[split]]
        else:
            shards += expand_urls(one, access)
    return list(dict.fromkeys(shards))


def _check_counts(lengths: list[int] | None, epoch_samples: int | None) -> None:
    if lengths is None and epoch_samples is None:
        raise DataError(
            "A stream has no index, and no _info.json beside these shards counts all of them: say "
            "how many images make an epoch, data.epoch_samples=N (1281167 for ImageNet-1K)."
        )
    if lengths is not None and (epoch_samples or 1) > sum(lengths):
        raise DataError(
            f"data.epoch_samples={epoch_samples}, but by their _info.json the shards hold "
            f"{sum(lengths)} samples. Lower it, or leave it out."
        )


Description = tuple[str, int, str | None]  # a shard's file name, samples and SHA-256


def describe(shards: Sequence[str], access: Access) -> dict[str, tuple[int, str | None]]:
    """Samples and SHA-256 of the shards that an `_info.json` in their own directory lists."""
    places = {s: "".join(s.partition("?")[0].rpartition("/")[:2]) for s in shards}
    places = {s: place for s, place in places.items() if not s.startswith("pipe:")}
    listed: dict[tuple[str, str], tuple[int, str | None]] = {}
    for place in dict.fromkeys(places.values()):
        try:
            splits = _read_info(place, access)
        except NotThere:
            continue
        listed |= {(place, name): rest for rows in splits.values() for name, *rest in rows}
    found = {s: listed.get((place, base_name(s))) for s, place in places.items()}
    return {s: tuple(rest) for s, rest in found.items() if rest is not None}


def _read_info(directory: str, access: Access) -> dict[str, list[Description]]:
    """Splits of the `_info.json` of a directory (a URL or path with its slash)."""
    content = read_small(f"{directory}_info.json", access)
    try:
        return {
            str(split): [
                (str(name), int(length), sha256)
                for name, length, sha256 in zip(
                    about["filenames"],
                    about["shard_lengths"],
                    about.get("sha256") or itertools.repeat(None, len(about["filenames"])),
                    strict=True,
                )
            ]
            for split, about in json.loads(content)["splits"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{shown(directory)}_info.json does not have the form splits -> name -> filenames, "
            f"shard_lengths ({error!r}). Mend it, or take it away and set data.epoch_samples."
        ) from error
