"""The file `_info.json`, in which timm keeps the shards of each split and counts their samples."""

import json
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.regular import read_regular

LARGEST_INFO = 64 << 20  # bytes; ImageNet's has 40 kB
MOST_SAMPLES = 10**8  # in a shard; each takes 2 kB of a tar, so these would be 200 GB


class Split(NamedTuple):
    """The shards of one split."""

    names: list[str]  # relative to the directory of `_info.json`
    lengths: list[int] | None  # samples of each; None where the file does not say


def read_info(path: Path, mend: str) -> dict[str, Split]:
    """Return the splits of a local `_info.json`. Raises DataError, which ends with `mend`."""
    try:
        content = read_regular(path, LARGEST_INFO)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}). {mend}") from error
    return parse_info(content, str(path), mend)


def parse_info(content: bytes, name: str, mend: str) -> dict[str, Split]:
    """Return the splits of an `_info.json`.

    Args:
        content: The bytes of the file.
        name: What messages call the file.
        mend: How to mend the file; messages end with it.

    Raises:
        DataError: The file has another form, a file name leaves the directory, or no shard could
            hold so many samples.
    """
    try:
        splits = json.loads(content)["splits"].items()
        return {split: _split(about) for split, about in splits}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else repr(error)
        raise DataError(
            f"{name} does not have the form splits -> name -> filenames, shard_lengths ({reason}). "
            f"{mend}"
        ) from error


def _split(about: Any) -> Split:
    names, lengths = about["filenames"], about.get("shard_lengths")
    if not isinstance(names, list) or not isinstance(lengths, list | None):
        raise ValueError("filenames and shard_lengths have to be lists")
    if bad := [name for name in names if not _is_name(name)]:
        raise ValueError(f"{bad[0]!r:.80} is no name of a shard in that directory")
    if lengths is None:
        return Split(names, None)
    wrong = [n for n in lengths if type(n) is not int or not 0 <= n <= MOST_SAMPLES]
    if wrong:
        raise ValueError(f"a shard of {wrong[0]!r:.80} samples")
    if len(lengths) != len(names):
        raise ValueError(f"{len(names)} filenames, but {len(lengths)} shard_lengths")
    return Split(names, lengths)


def _is_name(name: Any) -> bool:
    if not isinstance(name, str) or not name or not name.isprintable() or "://" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
