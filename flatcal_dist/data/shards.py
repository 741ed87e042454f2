"""Writing WebDataset shards, and finding them.

A shard is a plain tar of `KEY.jpg|png`, `KEY.cls` (the label, ascii) and `KEY.json`, named
`PREFIX-0000.tar` and so on. The bytes depend on the samples alone (no times, no users), each
shard appears whole by rename, its index beside it, and `_info.json` tells timm's reader what the
directory holds: `timm.data.create_dataset("wds/NAME", root=DIRECTORY, split=SPLIT)` just works.
"""

import fcntl
import itertools
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import webdataset
from braceexpand import UnbalancedBracesError, braceexpand

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.index import index_shard
from flatcal_dist.data.walk import IMAGES


@dataclass(frozen=True)
class Sample:
    """One image to be written, still encoded."""

    key: str  # unique in its split and its directory; no dot, no slash
    image: bytes
    extension: str  # jpg, jpeg, png or webp
    label: int
    filename: str = ""  # where the image came from
    more: dict[str, Any] = field(default_factory=dict)  # further fields of the json member


def write_shards(
    samples: Iterable[Sample],
    directory: Path,
    prefix: str,
    *,
    split: str,
    samples_per_shard: int,
) -> list[Path]:
    """Write `samples`, in their order, as shards of a split; index them; return their paths.

    Memory holds one sample at a time. Other splits in the directory are left alone.

    Raises DataError for a key that is no plain name or occurs twice, an unknown image extension,
    no samples at all, or shards with this prefix that are there already.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if old := sorted(directory.glob(f"{prefix}-[0-9]*.tar*")):
        raise DataError(
            f"{directory} already holds {len(old)} files of {prefix!r} shards ({old[0].name}, ...)"
            ": old and new ones would mix. Delete them or choose another directory."
        )
    shards, lengths, seen = [], [], set()
    remaining = iter(samples)
    while head := list(itertools.islice(remaining, 1)):
        rest = itertools.islice(remaining, samples_per_shard - 1)
        shard = directory / f"{prefix}-{len(shards):04d}.tar"
        _write_shard(itertools.chain(head, rest), shard, seen)
        lengths.append(index_shard(shard))
        shards.append(shard)
    if not shards:
        raise DataError(f"There were no samples to write as {prefix!r} shards into {directory}.")
    _add_to_info(directory, split, shards, lengths)
    return shards


def _write_shard(samples: Iterable[Sample], shard: Path, seen: set[str]) -> None:
    with (
        _appearing_whole(shard) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for sample in samples:
            _check_sample(sample, seen)
            seen.add(sample.key)
            about = {"label": sample.label, "filename": sample.filename, **sample.more}
            writer.write(
                {
                    "__key__": sample.key,
                    sample.extension: sample.image,
                    "cls": str(sample.label).encode("ascii"),
                    "json": json.dumps(about, sort_keys=True).encode(),
                }
            )


def _check_sample(sample: Sample, seen: set[str]) -> None:
    key = sample.key
    if not key or any(c in ".\\/" or not c.isprintable() for c in key):
        raise DataError(
            f"{key!r} cannot be a key: it must be a plain name without dots (WebDataset cuts names "
            "at the first one) and slashes. Use letters, digits, - and _."
        )
    if len(key.encode()) > 90:  # with its extension, a tar header has room for 100 bytes
        raise DataError(f"The key {key!r} is too long for a tar: use 90 bytes or fewer.")
    if key in seen:
        raise DataError(f"The key {key!r} occurs twice. Give every sample its own key.")
    if sample.extension not in IMAGES:
        raise DataError(
            f"Sample {key!r} has the image extension {sample.extension!r}, expected one of "
            f"{', '.join(IMAGES)}. Convert the image to one of these formats first."
        )


@contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end and gone after an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _add_to_info(directory: Path, split: str, shards: list[Path], lengths: list[int]) -> None:
    """Merge one split into `_info.json`, whose other splits stay."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        # Splits are often written at the same time; not every file system can lock, though.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        path = directory / "_info.json"
        info = json.loads(path.read_text()) if path.exists() else {}
        splits = info.setdefault("splits", {})
        splits[split] = {
            "name": split,
            "num_samples": sum(lengths),
            "filenames": [shard.name for shard in shards],
            "shard_lengths": lengths,
        }
        info["splits"] = dict(sorted(splits.items()))
        with _appearing_whole(path) as temporary:
            temporary.write_text(json.dumps(info, indent=1) + "\n")
    finally:
        os.close(handle)


def expand(pattern: str | Path | Sequence[str | Path], split: str | None = None) -> list[Path]:
    """The shards that a directory, a glob, a brace pattern or a list of these names.

    The order is stable: lists and braces as written, directories and globs by name; a shard
    named twice comes once, at its first place. Splits may share a directory: with `split`, a
    directory stands for that split of its `_info.json`, or without one for the shards named
    `*-SPLIT-*.tar` if there are any; otherwise for all of its shards.

    Raises DataError if a pattern matches nothing, a shard named outright or by braces is
    missing, or a directory's `_info.json` has splits but not this one.
    """
    if isinstance(pattern, str | Path):
        pattern = [pattern]
    found: dict[Path, None] = {}
    for one in pattern:
        found.update(dict.fromkeys(_expand(str(one), split)))
    if not found:
        raise DataError("No shards were named. Give a directory, a pattern or a list of them.")
    return list(found)


def _expand(pattern: str, split: str | None) -> list[Path]:
    if Path(pattern).expanduser().exists():  # also a name that happens to hold * or {
        return _tars(Path(pattern).expanduser(), split)
    try:
        names = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise DataError(f"The shard pattern {pattern!r} has unbalanced braces: {error}.") from error
    found = []
    for name in names:
        path = Path(name).expanduser()
        if path.exists():
            found += _tars(path, split)
        elif has_magic(name):
            # A glob is meant for shards: what lies beside them (indexes) is not asked for.
            paths = map(Path, glob(str(path)))  # noqa: PTH207 (Path.glob wants a fixed root)
            matches = sorted(p for p in paths if p.suffix == ".tar")
            if not matches:
                raise DataError(f"The shard pattern {name!r} matches no .tar file. Check the path.")
            found += matches
        else:
            raise DataError(
                f"{path}: no such shard or directory (from the pattern {pattern!r}). Check the "
                "path, or name fewer shards."
            )
    return found


def _tars(path: Path, split: str | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    info = path / "_info.json"
    if split is not None and info.exists():
        return _split_of(path, split, info)
    shards = sorted(p for p in path.glob("*.tar") if not p.name.startswith("."))
    if not shards:
        raise DataError(f"The directory {path} holds no .tar file. Check the path, or shard first.")
    return [p for p in shards if split and f"-{split}-" in p.name] or shards


def _split_of(directory: Path, split: str, info: Path) -> list[Path]:
    try:
        splits = json.loads(info.read_text())["splits"]
        names = {name: list(about["filenames"]) for name, about in splits.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{info} does not have the form splits -> name -> filenames ({error!r}). Mend it, or "
            "name the shards by pattern instead of by directory."
        ) from error
    if split not in names:
        raise DataError(
            f"{info} lists no split {split!r}, only {', '.join(names) or 'none'}. Write that split "
            "into the directory, or name its shards by pattern instead of by directory."
        )
    shards = [directory / name for name in names[split]]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise DataError(
            f"{info} lists {missing[0]} ({len(missing)} such shards) in split {split!r}, but it is "
            "not there. Copy the shards again, or name those that are there by pattern."
        )
    return shards
