"""One pass over a WebDataset tar finds its images, their checksums, and what is wrong with it.

Members are grouped into samples as webdataset groups them, at the first dot of the name. webdataset
skips or mends some faults without a message: a tar that is cut short, a sample without an image,
two samples with one key, a link. Here they are errors, while there is still time to write the shard
again. Members that are no part of a sample are left out, counted and named.
"""

import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.members import BLOCK, Bytes, Member, Seekable, TarDamage, members
from flatcal_dist.data.shards.regular import NotRegular, open_regular
from flatcal_dist.data.shards.samples import (
    IMAGES,
    LARGEST_LABEL,
    LARGEST_MEMBER,
    Unusable,
    part_of,
)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in the order of the tar."""

    tar_size: int  # bytes of the whole shard
    offset: np.ndarray  # [n] u8: first byte of the image
    size: np.ndarray  # [n] u4: bytes of the image
    header: np.ndarray  # [n] u4: CRC-32 of the image's tar header
    content: np.ndarray  # [n] u4: `checksum` of the image's bytes
    label: np.ndarray  # [n] i4
    key: np.ndarray  # [n] S: the sample's name, UTF-8

    def __len__(self) -> int:
        return len(self.offset)


def checksum(data: bytes | memoryview) -> int:
    """Return 32 bits of XXH3, which is fast enough (some 50 GB/s) to check every read."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a shard."""

    kind: str
    key: str  # of the sample or the member; may be empty
    text: str
    count: int = 1  # members or images that it concerns


Report = Callable[[Problem], None]

# These kinds of problems are warnings. All other kinds are errors.
WARNINGS = {
    "system files",
    "members not used",
    "index missing",
    "image not JPEG",
    "image CMYK",
    "image gray",
    "image rotated by EXIF",
    "image huge",
    "image twice",
    "image twice, other label",
    "class without images",
    "not ImageNet's counts",
}


def walk_shard(shard: Path, report: Report) -> ShardIndex:
    """Read one tar once and return the index of its samples.

    The tar may be anything: every fault is reported, and the samples without faults are returned.
    Members that are left out are reported as well.

    Args:
        shard: The tar.
        report: It is called for each problem. `WARNINGS` tells which kinds are no errors.

    Raises:
        DataError: `report` has raised it.
    """
    samples: dict[str, _Sample] = {}
    tar_size = 0
    left_out: dict[str, list[str]] = {}
    try:
        with open_regular(shard) as file:
            tar_size = os.fstat(file.fileno()).st_size
            _group(shard, Seekable(file), samples, left_out, report)
    except NotRegular as error:
        report(Problem("shard unreadable", "", str(error)))
    except DataError:  # of `report`
        raise
    except FileNotFoundError:
        text = f"{shard}: no such shard. Check the pattern or the directory."
        report(Problem("shard missing", "", text))
    except TarDamage as damage:
        report(_damage(shard, damage))
        if samples and damage.kind == "unreadable":
            samples.popitem()  # the one it was reading
    except Exception as error:  # one shard's trouble must not hide what the others have
        text = f"{shard} cannot be read ({_told(error)}). Check the disk and the file's rights."
        report(Problem("shard unreadable", "", text))
        if samples:
            samples.popitem()
    else:
        if not samples:
            text = (
                f"{shard} holds no samples: expected members KEY.jpg and KEY.cls. Write it again, "
                "or leave it out."
            )
            report(Problem("shard empty", "", text))
    for kind, names in left_out.items():
        report(Problem(kind, names[0], f"{shard}: {left_out_text(kind, names)}", len(names)))
    whole = [found for s in samples.values() if (found := s.whole(shard, report)) is not None]
    return ShardIndex(
        tar_size=tar_size,
        offset=np.array([found.image.start for found in whole], np.uint64),
        size=np.array([found.image.size for found in whole], np.uint32),
        header=np.array([found.header for found in whole], np.uint32),
        content=np.array([found.content for found in whole], np.uint32),
        label=np.array([found.label for found in whole], np.int32),
        key=np.array([found.key.encode() for found in whole], np.bytes_),
    )


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def left_out_text(kind: str, names: list[str]) -> str:
    """Say how many members of a kind were left out, which ones, and why that does no harm."""
    shown = ", ".join(ascii(name) for name in names[:3]) + ", ..." * (len(names) > 3)
    if kind == "system files":
        return (
            f"{len(names)} files that macOS or Windows adds to folders were left out ({shown}). "
            "They are no data; COPYFILE_DISABLE=1 keeps them out of a tar on macOS."
        )
    return (
        f"{len(names)} members were left out ({shown}), because hidden files, names without a dot "
        "and __NAME__ are no part of a WebDataset sample."
    )


def _damage(shard: Path, damage: TarDamage) -> Problem:
    if damage.kind == "joined":
        text = f"{shard}: {damage}; readers would miss it. Keep the tars apart or write them anew."
    elif damage.kind == "damaged":
        text = (
            f"{shard} is cut short or damaged: {damage}. Write or download it again, then index it."
        )
    else:
        text = (
            f"{shard} cannot be read as an uncompressed tar ({damage}): it is damaged, cut short "
            "or of another format. Write or download it again, then index it."
        )
    return Problem(f"shard {damage.kind}", "", text)


class _Whole(NamedTuple):
    """A sample without faults."""

    key: str
    image: Member
    header: int
    content: int
    label: int


@dataclass
class _Sample:
    """A sample whose members are being read."""

    key: str
    image: Member | None = None
    header: int = 0
    content: int = 0
    label: str | None = None
    suffixes: set[str] = field(default_factory=set)
    refused: bool = False  # a problem has been reported

    def whole(self, shard: Path, report: Report) -> _Whole | None:
        """Return the sample, or report what it lacks and return None."""
        if self.refused:
            return None
        if self.image is None:
            kind = "image missing"
            text = (
                f"{shard}: sample {self.key!r} has no image: expected one member "
                f"{self.key}.{{{','.join(IMAGES)}}}, found only {sorted(self.suffixes)}. Keys end "
                "at the first dot of a name. Write the shard again."
            )
        elif self.label is None:
            kind = "label missing"
            text = (
                f"{shard}: sample {self.key!r} has no label: expected a member {self.key}.cls "
                f"with an integer, found only {sorted(self.suffixes)}. Write the shard again."
            )
        elif not re.fullmatch(r"-?\d{1,9}", self.label, re.ASCII):
            kind = "label not a number"
            text = (
                f"{shard}: the label of sample {self.key!r} is {self.label!r}, but {self.key}.cls "
                "must hold one decimal integer. Write the shard again with class numbers."
            )
        else:
            return _Whole(self.key, self.image, self.header, self.content, int(self.label))
        report(Problem(kind, self.key, text))
        return None


def _group(
    shard: Path,
    tar: Bytes,
    samples: dict[str, _Sample],
    left_out: dict[str, list[str]],
    report: Report,
) -> None:
    """Gather the samples of a tar by key, as webdataset does (up to the first dot of a name).

    Args:
        shard: The path of the tar, for messages.
        tar: Its bytes.
        samples: It gets the samples by key, in the order of the tar.
        left_out: It gets the names of members that are no part of a sample, by kind.
        report: It is called for each problem.
    """
    current: _Sample | None = None
    for member in members(tar):
        part = part_of(member)
        if isinstance(part, Unusable):
            if part.kind in WARNINGS:
                left_out.setdefault(part.kind, []).append(member.name)
            else:
                report(Problem(part.kind, ascii(member.name)[1:-1], f"{shard}: {part.text}"))
            continue
        if part is None:
            continue
        key, suffix = part
        if current is None or key != current.key:
            if key in samples:
                _report_return(shard, samples[key], suffix, report)
            current = samples.setdefault(key, _Sample(key))
        elif suffix in current.suffixes:
            _report_return(shard, current, suffix, report)
        current.suffixes.add(suffix)
        if suffix in IMAGES:
            _add_image(shard, current, member, tar, report)
        elif suffix == "cls":
            text = tar.read_at(member.start, min(member.size, LARGEST_LABEL + 1))
            current.label = text.decode("ascii", "replace").strip()


def _add_image(shard: Path, sample: _Sample, member: Member, tar: Bytes, report: Report) -> None:
    if sample.image is not None and not sample.refused:
        sample.refused = True
        text = (
            f"{shard}: sample {sample.key!r} has several images "
            f"({sample.image.name!r} and {member.name!r}), expected one. Keys end at the "
            "first dot of a name: write the shard again with keys that have no dot."
        )
        report(Problem("several images", sample.key, text))
    if member.size == 0:
        sample.refused = True
        text = f"{shard}: image {member.name!r} is empty. Mend it."
        report(Problem("image empty", sample.key, text))
    if member.size > LARGEST_MEMBER:
        sample.refused = True
        text = (
            f"{shard}: image {member.name!r} has {member.size:,} bytes, more than "
            f"{LARGEST_MEMBER:,}: it is none, or the tar is damaged. Write the shard again."
        )
        report(Problem("image too large", sample.key, text))
        return
    sample.image = member
    data = tar.read_at(member.start - BLOCK, BLOCK + member.size)
    sample.header = zlib.crc32(data[:BLOCK])
    sample.content = checksum(memoryview(data)[BLOCK:])


def _report_return(shard: Path, sample: _Sample, suffix: str, report: Report) -> None:
    if sample.refused:
        return
    sample.refused = True
    if suffix in sample.suffixes:
        kind = "key twice in a shard"
        text = (
            f"{shard}: member {sample.key}.{suffix} occurs twice: two samples have the key "
            f"{sample.key!r} (keys end at the first dot). Write the shard again with unique keys."
        )
    else:
        kind = "members not adjacent"
        text = (
            f"{shard}: the members of sample {sample.key!r} are not adjacent ({sample.key}."
            f"{suffix} comes after members of other samples). Write the shard again in the order "
            "of names, for example with tar --sort=name."
        )
    report(Problem(kind, sample.key, text))
