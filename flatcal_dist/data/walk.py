"""One pass over a WebDataset tar: where its images lie, their checksums, and what is wrong with it.

Members are grouped into samples as webdataset groups them, at the first dot of the name. What
webdataset would skip or mend in silence (a tar cut short, a sample without its image, two samples
of one key) is an error here, while there is still time to write the shard again.
"""

import os
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import xxhash
from webdataset.tariterators import base_plus_ext

from flatcal_dist.data.errors import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # of a tar: one header, and the unit of padding


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


def walk_shard(shard: Path) -> ShardIndex:
    """Read the headers, labels and, for their checksums, images of one tar.

    Raises DataError for a tar that cannot be read or is cut short, members of a sample that are
    not adjacent, a missing or second image, a missing label or one that is no integer, keys that
    occur twice, and absolute or `..` names.
    """
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples = _group(shard, tar)
            _check_end(shard, tar)
            tar_size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError(f"{shard}: no such shard. Check the pattern or the directory.") from None
    except (OSError, EOFError, tarfile.TarError) as error:
        raise DataError(
            f"{shard} cannot be read as an uncompressed tar ({error}): it is damaged, cut short "
            "or of another format. Write or download it again, then index it."
        ) from error
    if not samples:
        raise DataError(f"{shard} holds no samples. Delete it or write it again.")
    offset, size, header, content, label, key = zip(
        *(s.row(shard) for s in samples.values()), strict=True
    )
    return ShardIndex(
        tar_size=tar_size,
        offset=np.array(offset, np.uint64),
        size=np.array(size, np.uint32),
        header=np.array(header, np.uint32),
        content=np.array(content, np.uint32),
        label=np.array(label, np.int32),
        key=np.array([k.encode() for k in key]),
    )


@dataclass
class _Sample:
    key: str
    image: tarfile.TarInfo | None = None
    header: int = 0
    content: int = 0
    label: str | None = None
    suffixes: set[str] = field(default_factory=set)

    def row(self, shard: Path) -> tuple[int, int, int, int, int, str]:
        if self.image is None:
            raise DataError(
                f"{shard}: sample {self.key!r} has no image: expected one member "
                f"{self.key}.{{{','.join(IMAGES)}}}, found only {sorted(self.suffixes)}. "
                "Write the shard again."
            )
        if self.label is None:
            raise DataError(
                f"{shard}: sample {self.key!r} has no label: expected a member {self.key}.cls "
                f"with an integer, found only {sorted(self.suffixes)}. Write the shard again."
            )
        if not re.fullmatch(r"-?\d{1,9}", self.label):
            raise DataError(
                f"{shard}: the label of sample {self.key!r} is {self.label!r}, but {self.key}.cls "
                "must hold one decimal integer. Write the shard again with class numbers."
            )
        image = self.image
        return (
            image.offset_data, image.size, self.header, self.content, int(self.label), self.key,
        )  # fmt: skip


def _group(shard: Path, tar: tarfile.TarFile) -> dict[str, _Sample]:
    """The samples of a tar by key, members grouped as webdataset does (at the first dot)."""
    samples: dict[str, _Sample] = {}
    current: _Sample | None = None
    for member in tar:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(
                f"{shard}: member {member.name!r} has an absolute name or one with '..', which "
                "no honest shard holds. Write the shard again with plain names."
            )
        key, suffix = base_plus_ext(member.name)
        if not member.isreg() or key is None or re.match(r"__[^/]*__($|/)", member.name):
            continue  # directories, dotless files, shard metadata: webdataset skips them too
        suffix = suffix.lower()
        if current is None or key != current.key:
            if key in samples:
                _refuse_return(shard, samples[key], suffix)
            current = samples[key] = _Sample(key)
        if suffix in current.suffixes:
            _refuse_return(shard, current, suffix)
        current.suffixes.add(suffix)
        if suffix in IMAGES:
            if current.image is not None:
                raise DataError(
                    f"{shard}: sample {key!r} has several images "
                    f"({current.image.name!r} and {member.name!r}), expected one. Keys end at the "
                    "first dot of a name: write the shard again with keys that have no dot."
                )
            if member.issparse() or member.size == 0:
                raise DataError(f"{shard}: image {member.name!r} is empty or sparse. Mend it.")
            current.image = member
            tar.fileobj.seek(member.offset_data - BLOCK)
            current.header = zlib.crc32(tar.fileobj.read(BLOCK))
            current.content = checksum(tar.fileobj.read(member.size))
        elif suffix == "cls":
            current.label = tar.extractfile(member).read(64).decode("ascii", "replace").strip()
    return samples


def _refuse_return(shard: Path, sample: _Sample, suffix: str) -> None:
    if suffix in sample.suffixes:
        raise DataError(
            f"{shard}: member {sample.key}.{suffix} occurs twice: two samples have the key "
            f"{sample.key!r} (keys end at the first dot). Write the shard again with unique keys."
        )
    raise DataError(
        f"{shard}: the members of sample {sample.key!r} are not adjacent ({sample.key}.{suffix} "
        "comes after members of other samples). Write the shard again in the order of names, "
        "for example with tar --sort=name."
    )


def _check_end(shard: Path, tar: tarfile.TarFile) -> None:
    """A whole tar ends in zero blocks; tarfile itself is silent about one that does not."""
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(BLOCK)
    if len(end) < BLOCK or end.strip(b"\0"):
        raise DataError(
            f"{shard} is cut short or damaged: expected the end-of-archive mark at byte "
            f"{tar.offset}. Write or download it again, then index it."
        )
    while chunk := tar.fileobj.read(1 << 20):
        if chunk.strip(b"\0"):
            raise DataError(
                f"{shard}: data follows the end-of-archive mark at byte {tar.offset}, as in tars "
                "joined with cat; readers would miss it. Keep the tars apart or write them anew."
            )
