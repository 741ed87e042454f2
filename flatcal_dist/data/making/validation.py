"""Checks that find all problems of shards before training spends the time of a cluster on them.

Each shard is read whole, by one process. Its SHA-256 is compared if it was recorded. Its members
and its index are checked. Each image is hashed, and its header is examined (format, colours, size,
orientation). Some or all images are decoded as in training.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.images.decode import MAX_PIXELS, decode
from flatcal_dist.data.making.findings import Validation
from flatcal_dist.data.making.parallel import in_parallel
from flatcal_dist.data.order import shuffled
from flatcal_dist.data.shards.index import load_index
from flatcal_dist.data.shards.info import LARGEST_INFO, read_info
from flatcal_dist.data.shards.regular import open_regular, read_regular
from flatcal_dist.data.shards.sidecars import sidecar
from flatcal_dist.data.shards.walk import Problem, Report, ShardIndex, walk_shard

ORIENTATION = 0x0112  # EXIF tag
TURNED = range(2, 9)  # orientations that turn or mirror; 1 does not, other values mean nothing
IMAGENET_TRAIN, IMAGENET_VALIDATION = 1_281_167, 50_000  # images (Russakovsky et al. 2015, table 2)


@dataclass
class _Shard:
    """The findings of a worker about one shard."""

    problems: list[Problem]
    index: ShardIndex
    hashes: np.ndarray  # [n] S16, hashes of the images
    decoded: int
    compared: bool  # with a recorded checksum


def validate_shards(
    shards: Sequence[Path],
    *,
    classes: int | None = None,
    decode_images: int | None = 1000,
    workers: int = 1,
    progress: bool = False,
) -> Validation:
    """Examine shards, which need no index.

    Args:
        shards: The shards.
        classes: Labels must lie in [0, classes). None allows all that are not negative.
        decode_images: About how many images are decoded, spread over the shards. None decodes all.
            Images whose end mark is missing are decoded in any case.
        workers: The number of processes.
        progress: Whether a progress bar is shown.
    """
    found = Validation(shards=len(shards))
    quota = None if decode_images is None else -(-decode_images // max(1, len(shards)))
    recorded = _recorded_checksums(found, shards)
    tasks = [
        (shard, number, quota, recorded.get(shard), classes) for number, shard in enumerate(shards)
    ]
    done = in_parallel(_look_at, tasks, workers)
    bar = track(done, "validating", len(tasks), console=Console(stderr=True), disable=not progress)
    parts = dict(bar)
    for number, shard in enumerate(shards):
        part = parts[number]
        for problem in part.problems:
            found.add(shard, problem)
        found.images += len(part.index)
        found.bytes += int(part.index.size.sum())
        found.decoded += part.decoded
        found.checksums += part.compared
        found.labels.update(part.index.label.tolist())
    _add_duplicates(found, shards, [parts[number] for number in range(len(shards))])
    _add_classes(found, classes)
    indexes = [parts[number].index for number in range(len(shards))]
    _add_counts_of_info(found, shards, [len(index) for index in indexes])
    _note_imagenet(found, indexes)
    return found


def _look_at(
    shard: Path, number: int, quota: int | None, checksum: str | None, classes: int | None
) -> _Shard:
    problems: list[Problem] = []
    index = walk_shard(shard, problems.append)
    found = _Shard(problems, index, np.zeros(len(index), "S16"), 0, False)
    if not shard.is_file():
        return found
    try:
        _check_index(shard, index, problems.append)
        found.compared = _check_sum(shard, checksum, problems.append)
        _look_at_images(shard, number, quota, classes, found)
    except Exception as error:  # one shard's trouble must not hide what the others have
        text = f"looking at it failed ({type(error).__name__}: {error}): check the disk"
        problems.append(Problem("shard unreadable", "", text))
    return found


def _check_sum(shard: Path, recorded: str | None, report: Report) -> bool:
    """Compare a shard with its recorded checksum. Return whether there was one."""
    if recorded is None:
        return False
    with open_regular(shard) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != recorded:
        text = f"its SHA-256 is {digest[:12]}..., recorded is {recorded[:12]}..."
        report(Problem("shard not as written", "", text))
    return True


def _look_at_images(
    shard: Path, number: int, quota: int | None, classes: int | None, found: _Shard
) -> None:
    order = shuffled(len(found.index), np.random.Philox(key=number))
    chosen = set(order[:quota].tolist())
    upper = np.inf if classes is None else classes
    for i, (key, image) in enumerate(_images(shard, found.index)):
        report = partial(_add, found.problems, key)
        label = found.index.label[i]
        if not 0 <= label < upper:
            report("label out of range", f"label {label}, expected 0 to {upper - 1}")
        found.hashes[i] = hashlib.blake2b(image, digest_size=16).digest()
        if _check_header(image, report) and (i in chosen or not _has_end(image)):
            found.decoded += 1
            try:
                decode(image, 3, f"{shard}: image {key!r}")
            except DataError as error:
                report("image undecodable", _told(error))


def _add(problems: list[Problem], key: str, kind: str, text: str) -> None:
    problems.append(Problem(kind, key, text))


def _images(shard: Path, index: ShardIndex) -> Iterator[tuple[str, bytes]]:
    if not len(index):
        return
    with open_regular(shard) as file:
        for key, offset, size in zip(index.key, index.offset, index.size, strict=True):
            file.seek(int(offset))
            yield key.decode("utf-8", "replace"), file.read(int(size))


def _check_index(shard: Path, found: ShardIndex, report: Report) -> None:
    """Compare the sidecar, if there is one, with the tar."""
    if not sidecar(shard).exists():
        text = f"run `flatcal index {shard}` before training"
        report(Problem("index missing", "", text))
        return
    try:
        stored = load_index([shard])
    except DataError as error:
        report(Problem("index stale", "", str(error)))
        return
    keys = [key.decode("utf-8", "replace") for key in found.key.tolist()]
    if stored.keys() != keys or not all(
        np.array_equal(getattr(stored, name), getattr(found, name))
        for name in ("offset", "size", "header", "label")
    ):
        text = f"it describes another shard: run `flatcal index {shard}` if the shard is right"
        report(Problem("index stale", "", text))
        return
    for i in np.flatnonzero(stored.content != found.content).tolist():
        text = "its bytes are not those that were indexed: they were damaged since"
        report(Problem("image not as indexed", keys[i], text))


def _check_header(image: bytes, report: partial) -> bool:
    """Report what is unusual about an image. Return False if Pillow cannot open it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a huge image is a finding of its own
            with Image.open(io.BytesIO(image)) as header:
                form, mode, (width, height) = header.format, header.mode, header.size
                orientation = header.getexif().get(ORIENTATION, 1)
    except Exception as error:  # a damaged file raises nearly anything in Pillow
        report("image undecodable", _told(error))
        return False
    if form != "JPEG":
        report("image not JPEG", f"it is {form}")
    if mode == "CMYK":
        report("image CMYK", "decoded with Pillow's conversion to RGB")
    if mode in ("L", "1", "LA") or mode.startswith("I"):
        report("image gray", f"mode {mode}")
    if orientation in TURNED:
        report("image rotated by EXIF", f"orientation {orientation}, which decoding leaves alone")
    if width * height > MAX_PIXELS:
        report("image huge", f"{width} x {height} pixels: slow, and {width * height * 3e-9:.1f} GB")
    return True


def _told(error: BaseException) -> str:
    """Return the reason alone. The report says elsewhere where it happened and how to mend it."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: " + re.sub(r" <_io.*>", "", str(error))


def _has_end(image: bytes) -> bool:
    """Tell whether a JPEG or PNG has its end mark near its end. Other formats count as whole."""
    tail = image[-1024:]
    if image.startswith(b"\xff\xd8"):
        return b"\xff\xd9" in tail
    return not image.startswith(b"\x89PNG") or b"IEND" in tail


def _recorded_checksums(found: Validation, shards: Sequence[Path]) -> dict[Path, str]:
    """Return the SHA-256 by shard that the files *.sha256 beside the shards record."""
    recorded = {}
    for directory in {shard.parent for shard in shards}:
        for file in sorted(directory.glob("*.sha256")):
            try:
                text = read_regular(file, LARGEST_INFO).decode("utf-8", "replace")
            except (OSError, DataError) as error:
                found.add(file, Problem("checksums unreadable", "", str(error)))
                continue
            for line in text.splitlines():
                if match := re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line):
                    recorded[directory / match[2]] = match[1]
    return recorded


def _add_duplicates(found: Validation, shards: Sequence[Path], parts: list[_Shard]) -> None:
    """Report keys and images that occur more than once, also in different shards."""
    lengths = [len(part.index) for part in parts]
    shard = np.repeat(np.arange(len(parts)), lengths)
    if not len(shard):
        return
    keys = np.concatenate([part.index.key for part in parts if len(part.index)])
    labels = np.concatenate([part.index.label for part in parts])
    hashes = np.concatenate([part.hashes for part in parts])

    def where(i: int) -> str:
        return f"{shards[shard[i]].name} {keys[i].decode('utf-8', 'replace')}"

    for first, second in _pairs(keys):
        key, text = keys[second].decode("utf-8", "replace"), f"also in {shards[shard[first]].name}"
        found.add(shards[shard[second]], Problem("key twice", key, text))
    for first, second in _pairs(hashes):
        same = labels[first] == labels[second]
        text = f"the bytes of {where(first)}"
        if not same:
            text += f", label {labels[first]} there, {labels[second]} here"
        kind = "image twice" if same else "image twice, other label"
        key = keys[second].decode("utf-8", "replace")
        found.add(shards[shard[second]], Problem(kind, key, text))


def _pairs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, later) places of values that occur more than once."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    for place in (np.flatnonzero(ordered[1:] == ordered[:-1]) + 1).tolist():
        first = np.searchsorted(ordered, ordered[place])
        yield int(order[first]), int(order[place])


def _add_classes(found: Validation, classes: int | None) -> None:
    count = classes or max(found.labels, default=-1) + 1
    empty = [label for label in range(count) if not found.labels[label]]
    if empty:
        text = f"no image has label {', '.join(map(str, empty[:20]))}"
        text += ", ..." if len(empty) > 20 else ""
        found.add("", Problem("class without images", "", text, len(empty)))


def _add_counts_of_info(found: Validation, shards: Sequence[Path], lengths: list[int]) -> None:
    """Report counts of `_info.json` that are wrong, because timm relies on them."""
    for info in sorted({shard.parent / "_info.json" for shard in shards}):
        if not info.exists():
            continue
        try:
            splits = read_info(info, "Mend it, or run `flatcal shard` again.")
        except DataError as error:
            found.add(info, Problem("_info.json unreadable", "", str(error)))
            continue
        told = {
            info.parent / name: length
            for split in splits.values()
            for name, length in zip(split.names, split.lengths or [], strict=False)
        }
        for shard, length in zip(shards, lengths, strict=True):
            if told.get(shard, length) != length and shard.exists():
                text = f"{info.name} says {told[shard]} samples, {length} are whole"
                found.add(shard, Problem("count not as in _info.json", "", text))


def _note_imagenet(found: Validation, indexes: list[ShardIndex]) -> None:
    """Check the counts of ImageNet-1K, which is recognised by its keys."""
    keys = [key.decode("utf-8", "replace") for index in indexes for key in index.key[:1].tolist()]
    if len(found.labels) < 1000 or not keys:
        return
    counts = sorted(found.labels.values())
    if all(re.fullmatch(r"(.*/)?n\d{8}_\d+", key) for key in keys):
        images, low, high = IMAGENET_TRAIN, 732, 1300
    elif all(re.search(r"ILSVRC2012_val_\d{8}", key) for key in keys):
        images, low, high = IMAGENET_VALIDATION, 50, 50
    else:
        return
    text = (
        f"{found.images:,} images, {counts[0]} to {counts[-1]} a class; ImageNet-1K has "
        f"{images:,}, {low} to {high} a class"
    )
    found.notes.append(text)
    if (found.images, counts[0], counts[-1], len(counts)) != (images, low, high, 1000):
        found.add("", Problem("not ImageNet's counts", "", text))
