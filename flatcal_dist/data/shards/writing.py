"""Writing WebDataset shards, and finding them.

A shard is a plain tar of `KEY.jpg|png`, `KEY.cls` (the label, ASCII) and `KEY.json`, named
`PREFIX-0000.tar` and so on. Its bytes depend on the samples alone, because no times and users are
stored. Each shard appears whole by rename, with its index beside it. `_info.json` tells the reader
of timm what the directory holds, so
`timm.data.create_dataset("wds/NAME", root=DIRECTORY, split=SPLIT)` works.
"""

import fcntl
import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO

import webdataset
from braceexpand import braceexpand

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.info import LARGEST_INFO, read_info
from flatcal_dist.data.shards.regular import read_regular
from flatcal_dist.data.shards.samples import IMAGES
from flatcal_dist.data.shards.sidecars import index_shard
from flatcal_dist.files import expanded, write_atomically, write_json, write_text
from flatcal_dist.patterns import too_many_names

_NO_LETTERS = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are no text, line ends
BY_PATTERN = "Mend it, or name the shards by pattern instead of by directory."


@dataclass(frozen=True)
class Sample:
    """One encoded image that is to be written."""

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
    """Write samples in their order as the shards of a split, and index the shards.

    Memory holds one sample at a time. Other splits in the directory do not change.

    Args:
        samples: The samples.
        directory: Where the shards will lie. It is made if it does not exist.
        prefix: How the names of the shards begin.
        split: The name of the split in `_info.json`.
        samples_per_shard: The number of samples in each shard but the last.

    Returns:
        The paths of the shards.

    Raises:
        DataError: A key is no plain name or occurs twice, the extension of an image is unknown,
            there are no samples, or the directory already holds shards with this prefix.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if old := sorted(directory.glob(f"{prefix}-[0-9]*.tar*")):
        raise DataError(
            f"{directory} already holds {len(old)} files of {prefix!r} shards ({old[0].name}, ...)"
            ": old and new ones would mix. Delete them or choose another directory."
        )
    shards: list[Path] = []
    lengths: list[int] = []
    seen: set[str] = set()
    digests: dict[str, str] = {}
    remaining = iter(samples)
    while head := list(itertools.islice(remaining, 1)):
        rest = itertools.islice(remaining, samples_per_shard - 1)
        shard = directory / f"{prefix}-{len(shards):04d}.tar"
        digests[shard.name] = write_shard(itertools.chain(head, rest), shard, seen)
        lengths.append(index_shard(shard))
        shards.append(shard)
    if not shards:
        raise DataError(f"There were no samples to write as {prefix!r} shards into {directory}.")
    write_checksums(directory / f"{prefix}.sha256", digests)
    add_to_info(directory, split, shards, lengths)
    return shards


def write_shard(samples: Iterable[Sample], shard: Path, seen: set[str]) -> str:
    """Write one shard, whole or not at all, and return its SHA-256.

    Args:
        samples: The samples of the shard.
        shard: The path of the shard.
        seen: The keys that must not come again. The keys of the samples are added.

    Raises:
        DataError: A sample cannot be written, see `write_shards`.
    """
    digest = hashlib.sha256()
    with (
        write_atomically(shard) as temporary,
        temporary.open("wb") as file,
        webdataset.TarWriter(
            _Hashing(file, digest), encoder=False, mtime=0, user="", group=""
        ) as writer,
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
    return digest.hexdigest()


class _Hashing:
    """A file that feeds a digest with all that is written to it."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self.file, self.digest = file, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _check_sample(sample: Sample, seen: set[str]) -> None:
    check_key(sample.key)
    if sample.key in seen:
        raise DataError(f"The key {sample.key!r} occurs twice. Give every sample its own key.")
    if sample.extension not in IMAGES:
        raise DataError(
            f"Sample {sample.key!r} has the image extension {sample.extension!r}, expected one of "
            f"{', '.join(IMAGES)}. Convert the image to one of these formats first."
        )


def check_key(key: str, where: str = "") -> None:
    """Raise DataError, which begins with `where`, if a sample in a tar cannot have this key."""
    if not key or any(c in ".\\/" or unicodedata.category(c) in _NO_LETTERS for c in key):
        raise DataError(
            f"{where}{key!a} cannot be a key: it must be a plain name of UTF-8 without dots "
            "(WebDataset cuts names at the first one), slashes, and control characters. Use "
            "letters, digits, - and _."
        )
    if len(key.encode()) > 90:  # with its extension, a tar header has room for 100 bytes
        raise DataError(f"{where}the key {key!r} is too long for a tar: use 90 bytes or fewer.")


def write_checksums(path: Path, digests: dict[str, str]) -> None:
    """Write the SHA-256 of each file, by its name, in the form that `sha256sum -c` checks."""
    write_text(path, "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())))


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on a file or directory. Yields False where the file system has no locks.

    Raises BlockingIOError if another process holds the lock and `wait` is off.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would wait for a writer
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)


def refuse_other_shards(directory: Path, split: str, shards: Sequence[Path]) -> None:
    """Raise DataError if `_info.json` lists other shards of `split` that are there."""
    info = directory / "_info.json"
    if not info.exists():
        return
    splits = read_info(info, "Mend it or take it away.")
    names = splits[split].names if split in splits else []
    ours = {shard.name for shard in shards}
    if others := [name for name in names if name not in ours and (directory / name).exists()]:
        raise DataError(
            f"{directory} already holds {len(others)} other shards of split {split!r} "
            f"({others[0]}, ...), which would drop out of _info.json and be lost to its readers. "
            "Delete them, or choose another directory."
        )


def add_to_info(directory: Path, split: str, shards: list[Path], lengths: list[int]) -> None:
    """Add one split to `_info.json`, whose other splits do not change.

    Args:
        directory: Where `_info.json` lies.
        split: The name of the split.
        shards: Its shards.
        lengths: The number of samples of each shard.

    Raises:
        DataError: `_info.json` lists other shards of the split that are there.
    """
    with locked(directory):  # splits are often written at the same time
        refuse_other_shards(directory, split, shards)
        path = directory / "_info.json"
        info = json.loads(read_regular(path, LARGEST_INFO)) if path.exists() else {}
        splits = info.setdefault("splits", {})
        splits[split] = {
            "name": split,
            "num_samples": sum(lengths),
            "filenames": [shard.name for shard in shards],
            "shard_lengths": lengths,
        }
        info["splits"] = dict(sorted(splits.items()))
        write_json(path, info)


def expand(
    pattern: str | Path | Sequence[str | Path], split: str | None = None, *, missing: bool = False
) -> list[Path]:
    """Return the shards that a directory, a glob, a brace pattern or a list of these names.

    The order is stable: lists and braces are kept as written, directories and globs are sorted by
    name. A shard that is named twice comes once, at its first place.

    Args:
        pattern: One name or several.
        split: The split that a directory stands for: the shards that its `_info.json` lists, or
            without this file the shards named `*-SPLIT-*.tar`, if there are any. In all other cases
            a directory stands for all of its shards.
        missing: Whether shards that are not there are returned, too, if they are named without a
            glob.

    Raises:
        DataError: A pattern matches nothing, the `_info.json` of a directory has no such split,
            `flatcal shard` has not finished there, or a shard is not there.
    """
    if isinstance(pattern, str | Path):
        pattern = [pattern]
    found: dict[Path, None] = {}
    for one in pattern:
        found.update(dict.fromkeys(_expand(str(one), split, missing)))
    if not found:
        raise DataError("No shards were named. Give a directory, a pattern or a list of them.")
    return list(found)


def _expand(pattern: str, split: str | None, missing: bool) -> list[Path]:
    if expanded(pattern).exists():  # also a name that happens to hold * or {
        return _tars(expanded(pattern), split, missing)
    if problem := too_many_names(pattern):
        raise DataError(f"The shard pattern {problem}.")
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"The shard pattern {pattern!r} has unbalanced braces: {error}.") from None
    found = []
    for name in names:
        path = expanded(name)
        if path.exists():
            found += _tars(path, split, missing)
        elif has_magic(name):
            # A glob means shards, and not the indexes that lie beside them.
            paths = map(Path, glob(str(path)))  # noqa: PTH207 (Path.glob wants a fixed root)
            matches = sorted(p for p in paths if p.suffix == ".tar")
            if not matches:
                raise DataError(f"The shard pattern {name!r} matches no .tar file. Check the path.")
            found += matches
        elif missing and path.suffix == ".tar":
            found.append(path)
        else:
            raise DataError(
                f"{path}: no such shard or directory (from the pattern {pattern!r}). Check the "
                "path, or name fewer shards."
            )
    return found


def _tars(path: Path, split: str | None, missing: bool) -> list[Path]:
    if not path.is_dir():
        return [path]
    _refuse_unfinished(path, split)
    info = path / "_info.json"
    if split is not None and info.exists():
        return _split_of(path, split, info, missing)
    shards = sorted(p for p in path.glob("*.tar") if not p.name.startswith("."))
    if not shards:
        raise DataError(f"The directory {path} holds no .tar file. Check the path, or shard first.")
    return [p for p in shards if split and f"-{split}-" in p.name] or shards


def _refuse_unfinished(directory: Path, split: str | None) -> None:
    """Raise DataError if `flatcal shard` has not written all shards of a split.

    It writes a plan beforehand, and adds the split to `_info.json` when all shards are there.
    """
    info = directory / "_info.json"
    for path in sorted(directory.glob("*.plan.json")):
        try:
            plan = json.loads(read_regular(path, LARGEST_INFO))
            planned, count = str(plan["split"]), plan["shards"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} cannot be read ({error!r}). Run `flatcal shard` again, or name the shards "
                "by pattern instead of by directory."
            ) from error
        finished = read_info(info, BY_PATTERN) if info.exists() else {}
        unfinished = planned not in finished and split in (None, planned)
        if unfinished:
            raise DataError(
                f"{directory}: `flatcal shard` has not written all {count} shards of "
                f"split {planned!r} yet. Run the same command again: it goes on where it "
                "stopped."
            )


def _split_of(directory: Path, split: str, info: Path, missing: bool) -> list[Path]:
    splits = read_info(info, BY_PATTERN)
    if split not in splits:
        raise DataError(
            f"{info} lists no split {split!r}, only {', '.join(splits) or 'none'}. Write that "
            "split into the directory, or name its shards by pattern instead of by directory."
        )
    shards = [directory / name for name in splits[split].names]
    absent = [shard.name for shard in shards if not shard.exists()]
    if absent and not missing:
        raise DataError(
            f"{info} lists {absent[0]} ({len(absent)} such shards) in split {split!r}, but it is "
            "not there. Copy the shards again, or name those that are there by pattern."
        )
    return shards
