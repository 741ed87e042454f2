"""The sample that a member of a shard belongs to, or the reason why it belongs to none."""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

from webdataset.tariterators import base_plus_ext

from flatcal_dist.data.shards.members import DIRECTORY, FILE, Member

IMAGES = ("jpg", "jpeg", "png", "webp")
LARGEST_MEMBER = 256 << 20  # bytes; more is no image, and would have to fit into memory
LARGEST_LABEL = 64  # bytes of a cls member

# Files that macOS, Windows, file browsers and network disks leave in folders.
_SYSTEM = re.compile(
    r"\._.*|\.DS_Store|\.AppleDouble|\.Spotlight-V100|\.Trashes|\.fseventsd|__MACOSX|Icon\r|"
    r"Thumbs\.db|ehthumbs\.db|desktop\.ini|\$RECYCLE\.BIN|@eaDir|\.directory|\.nfs[0-9a-f]+",
    re.IGNORECASE,
)


class Part(NamedTuple):
    """A member that belongs to a sample."""

    key: str  # of the sample: the name up to its first dot, folders included
    suffix: str  # the rest, in lower case


class Unusable(NamedTuple):
    """The reason why a member is no part of a sample."""

    kind: str  # see `Problem`
    text: str


def is_system_file(name: str) -> bool:
    """Tell whether an operating system has added a file or a folder of this path (Thumbs.db)."""
    return any(_SYSTEM.fullmatch(part) for part in name.split("/"))


def is_text(name: str) -> bool:
    """Tell whether a name is UTF-8. Bytes that are not UTF-8 are kept as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def part_of(member: Member) -> Part | Unusable | None:
    """Return the place of a member in its sample, or None for a directory, which holds no data."""
    name = member.name
    again = "Write the shard again with plain names."
    if not is_text(name) or re.search(r"[\x00-\x1f\x7f]", name.removesuffix("Icon\r")):
        text = f"the name of member {name!a} is not UTF-8, or has control characters. {again}"
        return Unusable("unsafe name", text)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        text = (
            f"member {name!r} has an absolute name or one with '..', which no honest shard holds. "
            f"{again}"
        )
        return Unusable("unsafe name", text)
    if member.kind == DIRECTORY:
        return None
    if is_system_file(name):
        return Unusable("system files", "")
    if member.kind != FILE:
        return Unusable("not a regular file", _irregular(member))
    key, suffix = base_plus_ext(name)
    if key is None or path.name.startswith(".") or re.match(r"__[^/]*__($|/)", name):
        return Unusable("members not used", "")
    return Part(key, suffix.lower())


def _irregular(member: Member) -> str:
    what = f"member {member.name!r} is no file but a {member.kind}"
    if member.kind == "hard link":
        return (
            f"{what} to {member.target!r}, which is no file that comes before it in this shard, so "
            "its bytes are not here. Write the shard again, with --hard-dereference of GNU tar."
        )
    if member.kind == "symbolic link":
        return (
            f"{what} to {member.target!r}, so its bytes are not here. Write the shard again, with "
            "--dereference of tar (-h), which packs the files that links lead to."
        )
    if member.kind == "sparse file":
        return f"{what}, which readers disagree on. Write the shard again, without --sparse of tar."
    return f"{what}. Write the shard again with regular files only."
