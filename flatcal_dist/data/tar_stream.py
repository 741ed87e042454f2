"""Samples of a tar that is read from front to back, up to its very end.

webdataset groups the members into samples. Its own walk through a tar is replaced: to it a
damaged header, or an end that comes too early, is the end of the shard, and the rest is lost in
silence.
"""

import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from webdataset.tariterators import base_plus_ext, group_by_keys

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.remote import RemoteFile
from flatcal_dist.data.walk import IMAGES, LARGEST_MEMBER, is_text

LARGEST_HEADER = 1 << 20  # bytes of a long name or of a pax header


def read_samples(
    file: BinaryIO | RemoteFile, name: str, classes: int
) -> Iterator[tuple[str, bytes, int]]:
    """Key, encoded image and label of every sample of a shard, in its order.

    Raises DataError if the tar is damaged or cut short, and for a sample whose members are not
    adjacent, that lacks its image or label, or has a label outside [0, classes).
    """
    seen: set[str] = set()
    try:
        for sample in group_by_keys(_members(file, name)):
            key = sample["__key__"]
            if key in seen:
                raise DataError(
                    f"{name}: the members of sample {key!r} are not adjacent, or two samples have "
                    "this key. Write the shard again in the order of names, with unique keys."
                )
            seen.add(key)
            yield key, *_image_and_label(sample, f"{name}: sample {key!r}", classes)
    except tarfile.TarError as error:
        raise DataError(
            f"{name} cannot be read as an uncompressed tar ({error}): it is damaged, cut short or "
            "of another format. Write or upload it again."
        ) from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: {error.args[0]}. Write the shard again.") from error


def _image_and_label(sample: dict, name: str, classes: int) -> tuple[bytes, int]:
    found = sorted(field for field in sample if not field.startswith("__"))
    images = [field for field in found if field in IMAGES]
    if len(images) != 1 or not sample[images[0]]:
        what = "several images" if len(images) > 1 else "an empty image" if images else "no image"
        raise DataError(
            f"{name} has {what}: expected one of {', '.join(IMAGES)} beside its cls, found only "
            f"{found}. Members of a sample have to be adjacent, and keys end at the first dot. "
            "Write the shard again."
        )
    text = sample.get("cls", b"").decode("ascii", "replace").strip()
    if not re.fullmatch(r"-?\d{1,9}", text):
        what = f"the label {text!r}" if "cls" in sample else "no label"
        raise DataError(
            f"{name} has {what}: expected a member cls with one decimal integer, found only "
            f"{found}. Members of a sample have to be adjacent. Write the shard again."
        )
    if not 0 <= int(text) < classes:
        raise DataError(
            f"{name} has the label {text}, outside 0..{classes - 1}. Set model.num_classes to the "
            "data's number of classes, or write the shard again with labels that count from 0."
        )
    return sample[images[0]], int(text)


def _members(file: BinaryIO | RemoteFile, name: str) -> Iterator[dict]:
    """Images and labels of a tar as webdataset's grouping wants them, up to its very end."""
    # tarfile copies what is left of its buffer for every header: a larger one is slower.
    with tarfile.open(fileobj=file, mode="r|", bufsize=1 << 15, tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile would keep them all
            if not is_text(member.name):
                raise DataError(
                    f"{name}: the name of member {member.name!a} is not UTF-8. Write the "
                    "shard again with plain names."
                )
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(
                    f"{name}: member {member.name!r} has an absolute name or one with '..', which "
                    "no honest shard holds. Write the shard again with plain names."
                )
            key, suffix = base_plus_ext(member.name)
            if not member.isreg() or key is None or re.match(r"__[^/]*__($|/)", member.name):
                continue  # directories, dotless files, shard metadata: as webdataset does
            if member.issparse() or member.size > LARGEST_MEMBER:
                raise tarfile.ReadError(f"{member.name} has {member.size:,} bytes, or is sparse")
            wanted = suffix.lower() in (*IMAGES, "cls")
            data = tar.extractfile(member).read() if wanted else b""
            yield {"fname": member.name, "data": data, "__url__": name}
        while data := tar.fileobj.read(1 << 18):
            if data.strip(b"\0"):
                raise tarfile.ReadError("data follows the end-of-archive mark")


class _Header(tarfile.TarInfo):
    """A header that cannot be read is an error: tarfile takes all but the first for the end."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
                raise  # the end-of-archive mark
            raise tarfile.ReadError(f"{error} instead of a member or the end mark") from None
        if not header.isreg() and header.size > LARGEST_HEADER:  # tarfile would read it whole
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header
