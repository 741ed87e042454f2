"""The samples of a tar that is read from front to back, up to its very end.

webdataset groups the members into samples. Its walk through a tar is replaced (members.py), because
it takes a damaged header, or an end that comes too early, for the end of the shard. The rest would
be lost without a message.
"""

import re
import sys
from collections.abc import Generator, Iterator

from webdataset.tariterators import group_by_keys

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.members import Forward, Source, TarDamage, members
from flatcal_dist.data.shards.samples import (
    IMAGES,
    LARGEST_LABEL,
    LARGEST_MEMBER,
    Unusable,
    part_of,
)
from flatcal_dist.data.shards.walk import WARNINGS, left_out_text

TOLD = 5  # shards for which a process lists the members that were left out


def read_samples(
    file: Source, name: str, classes: int
) -> Generator[tuple[str, bytes, int], None, None]:
    """Yield key, encoded image and label of every sample of a shard, in the order of the tar.

    Args:
        file: The tar.
        name: What messages call it.
        classes: The number of classes; labels must lie in [0, classes).

    Raises:
        DataError: The tar is damaged or cut short. Or a sample lacks its image or its label, has a
            label that is out of range, or its members are not adjacent.
    """
    seen: set[str] = set()
    try:
        for sample in group_by_keys(_parts(file, name)):
            key = sample["__key__"]
            if key in seen:
                raise DataError(
                    f"{name}: the members of sample {key!r} are not adjacent, or two samples have "
                    "this key. Write the shard again in the order of names, with unique keys."
                )
            seen.add(key)
            yield key, *_image_and_label(sample, f"{name}: sample {key!r}", classes)
    except TarDamage as damage:
        raise DataError(
            f"{name} cannot be read as an uncompressed tar ({damage}): it is damaged, cut short or "
            "of another format. Write or upload it again."
        ) from None
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


def _parts(file: Source, name: str) -> Iterator[dict]:
    """Yield images and labels of a tar in the form that webdataset groups, up to its very end."""
    tar = Forward(file)
    left_out: dict[str, list[str]] = {}
    for member in members(tar):
        if member.size > LARGEST_MEMBER:
            raise TarDamage("unreadable", f"{member.name!a} has {member.size:,} bytes")
        part = part_of(member)
        if isinstance(part, Unusable):
            if part.kind not in WARNINGS:
                raise DataError(f"{name}: {part.text}")
            left_out.setdefault(part.kind, []).append(member.name)
        elif part is not None:
            size = {"cls": min(member.size, LARGEST_LABEL + 1)}.get(part.suffix, member.size)
            wanted = part.suffix in (*IMAGES, "cls")
            data = tar.read_at(member.start, size) if wanted else b""
            yield {"fname": member.name, "data": data, "__url__": name}
    _tell(name, left_out)


_told: set[str] = set()  # names of shards, in this process


def _tell(name: str, left_out: dict[str, list[str]]) -> None:
    """Warn about members that were left out, once for a shard, and for the first shards only."""
    if not left_out or name in _told or len(_told) >= TOLD:
        return
    _told.add(name)
    for kind, names in left_out.items():
        print(f"{name}: {left_out_text(kind, names)}", file=sys.stderr)
    if len(_told) == TOLD:
        print(
            "members that other shards leave out are not listed here: see `flatcal validate`",
            file=sys.stderr,
        )
