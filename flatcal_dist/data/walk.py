"""One pass over a WebDataset tar: where its images lie, their checksums, and what is wrong with it.

Members are grouped into samples as webdataset groups them, at the first dot of the name. What
webdataset would skip or mend in silence (a tar cut short, a sample without its image, two samples
of one key) is an error here, while there is still time to write the shard again.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import xxhash
from webdataset.tariterators import base_plus_ext

from flatcal_dist.data.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # of a tar: one header, and the unit of padding
LARGEST_MEMBER = 256 << 20  # bytes; more is no image, and would have to fit into memory


@dataclass(frozen=True)
class ShardIndex:
    """What there is to know of a shard with n samples, in the order of the tar."""

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
    """32 bits of XXH3: some 50 GB/s, so that every read can be checked."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


class Problem(NamedTuple):
    """Something wrong with a shard."""

    kind: str
    key: str  # of the sample or the member; may be empty
    text: str


Report = Callable[[Problem], None]


def _refuse(problem: Problem) -> None:
    raise DataError(problem.text)


def walk_shard(shard: Path, report: Report = _refuse) -> ShardIndex:
    """Read the headers, labels and, for their checksums, images of one tar.

    Raises DataError for a tar that cannot be read or is cut short, members of a sample that are
    not adjacent, a missing or second image, a missing label or one that is no integer, keys that
    occur twice, and absolute or `..` names. With another `report`, each of these is told to it
    instead, and the index holds the samples that are free of them.
    """
    samples: dict[str, _Sample] = {}
    tar_size = 0
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            tar_size = os.fstat(file.fileno()).st_size
            _group(shard, tar, samples, report)
            _check_end(shard, tar, report)
    except FileNotFoundError:
        text = f"{shard}: no such shard. Check the pattern or the directory."
        report(Problem("shard missing", "", text))
    except (OSError, EOFError, tarfile.TarError) as error:
        text = (
            f"{shard} cannot be read as an uncompressed tar ({error}): it is damaged, cut short "
            "or of another format. Write or download it again, then index it."
        )
        report(Problem("shard unreadable", "", text))
        if samples:
            samples.popitem()  # the one it was reading
    else:
        if not samples:
            text = f"{shard} holds no samples. Delete it or write it again."
            report(Problem("shard empty", "", text))
    whole = [sample for sample in samples.values() if sample.is_whole(shard, report)]
    return ShardIndex(
        tar_size=tar_size,
        offset=np.array([sample.image.offset_data for sample in whole], np.uint64),
        size=np.array([sample.image.size for sample in whole], np.uint32),
        header=np.array([sample.header for sample in whole], np.uint32),
        content=np.array([sample.content for sample in whole], np.uint32),
        label=np.array([int(sample.label) for sample in whole], np.int32),
        key=np.array([sample.key.encode() for sample in whole], np.bytes_),
    )


@dataclass
class _Sample:
    key: str
    image: tarfile.TarInfo | None = None
    header: int = 0
    content: int = 0
    label: str | None = None
    suffixes: set[str] = field(default_factory=set)
    refused: bool = False  # a problem has been reported

    def is_whole(self, shard: Path, report: Report) -> bool:
        if self.refused:
            return False
        if self.image is None:
            kind = "image missing"
            text = (
                f"{shard}: sample {self.key!r} has no image: expected one member "
                f"{self.key}.{{{','.join(IMAGES)}}}, found only {sorted(self.suffixes)}. "
                "Write the shard again."
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
            return True
        report(Problem(kind, self.key, text))
        return False


def _group(shard: Path, tar: tarfile.TarFile, samples: dict[str, _Sample], report: Report) -> None:
    """Gather the samples of a tar by key, members grouped as webdataset does (at the first dot)."""
    current: _Sample | None = None
    for member in tar:
        if not is_text(member.name):
            text = (
                f"{shard}: the name of member {member.name!a} is not UTF-8. Write the shard "
                "again with plain names."
            )
            report(Problem("unsafe name", ascii(member.name), text))
            continue
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            text = (
                f"{shard}: member {member.name!r} has an absolute name or one with '..', which "
                "no honest shard holds. Write the shard again with plain names."
            )
            report(Problem("unsafe name", member.name, text))
            continue
        key, suffix = base_plus_ext(member.name)
        if not member.isreg() or key is None or re.match(r"__[^/]*__($|/)", member.name):
            continue  # directories, dotless files, shard metadata: webdataset skips them too
        suffix = suffix.lower()
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
            current.label = tar.extractfile(member).read(64).decode("ascii", "replace").strip()


def is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # tarfile keeps bytes that are not UTF-8 as surrogates
        return False
    return True


def _add_image(
    shard: Path, sample: _Sample, member: tarfile.TarInfo, tar: tarfile.TarFile, report: Report
) -> None:
    if sample.image is not None and not sample.refused:
        sample.refused = True
        text = (
            f"{shard}: sample {sample.key!r} has several images "
            f"({sample.image.name!r} and {member.name!r}), expected one. Keys end at the "
            "first dot of a name: write the shard again with keys that have no dot."
        )
        report(Problem("several images", sample.key, text))
    if member.issparse() or member.size == 0:
        sample.refused = True
        text = f"{shard}: image {member.name!r} is empty or sparse. Mend it."
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
    tar.fileobj.seek(member.offset_data - BLOCK)
    sample.header = zlib.crc32(tar.fileobj.read(BLOCK))
    sample.content = checksum(tar.fileobj.read(member.size))


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


def _check_end(shard: Path, tar: tarfile.TarFile, report: Report) -> None:
    """A whole tar ends in zero blocks; tarfile itself is silent about one that does not."""
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(BLOCK)
    if len(end) < BLOCK or end.strip(b"\0"):
        text = (
            f"{shard} is cut short or damaged: expected the end-of-archive mark at byte "
            f"{tar.offset}. Write or download it again, then index it."
        )
        report(Problem("shard damaged", "", text))
        return
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.strip(b"\0"):
            text = (
                f"{shard}: data follows the end-of-archive mark at byte {tar.offset}, as in tars "
                "joined with cat; readers would miss it. Keep the tars apart or write them anew."
            )
            report(Problem("shard joined", "", text))
            return
