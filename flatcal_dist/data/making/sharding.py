"""Making the shards of a split from a source: shuffled once, in parallel, and resumable.

The source and the seed alone decide which images go into which shard, and in which order. A plan
(PREFIX-SPLIT.plan.json) says so beforehand. A shard appears whole by rename. The split appears in
`_info.json` when all of its shards are there. Until then readers refuse it, and the same command
writes the missing shards. PREFIX-SPLIT.sha256 is for `sha256sum -c` and `flatcal validate`.
"""

import hashlib
import io
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.making.parallel import in_parallel
from flatcal_dist.data.making.plans import Plan, planned, refuse_other_plan
from flatcal_dist.data.making.sources import Source
from flatcal_dist.data.order import shuffled
from flatcal_dist.data.shards.index import load_index
from flatcal_dist.data.shards.sidecars import index_shard, sidecar
from flatcal_dist.data.shards.writing import (
    Sample,
    add_to_info,
    refuse_other_shards,
    write_checksums,
    write_shard,
)
from flatcal_dist.files import WriteError

QUALITY = 90  # for JPEGs that are encoded again, unless another quality is asked for
SHARD_BYTES = 150_000_000  # bytes of images; files of this size are read at full speed
FEWEST_SHARDS, FEWEST_IMAGES = 32, 64
OVERHEAD = 4096  # bytes that a sample takes beside its image: headers, label, json, padding


@dataclass(frozen=True)
class Encoding:
    """How images are encoded again as JPEG. Without either number they are copied."""

    max_edge: int | None = None  # pixels: larger images are scaled down until they fit
    quality: int | None = None  # without max_edge, every image is encoded again

    def __post_init__(self) -> None:
        if self.max_edge is not None and self.max_edge < 1:
            raise DataError(f"max_edge is a number of pixels, 1 or more, not {self.max_edge}.")
        if self.quality is not None and not 1 <= self.quality <= 95:
            raise DataError(f"quality is one of JPEG's, 1 to 95, not {self.quality}.")

    @property
    def copies(self) -> bool:
        """Whether images are copied as they are."""
        return self.max_edge is None and self.quality is None

    def encode(self, data: bytes) -> bytes | None:
        """Return the new JPEG, or None if the image may stay as it is. Raises as Pillow does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images: they are about to become small
            with Image.open(io.BytesIO(data)) as image:
                if self.max_edge is not None:
                    if max(image.size) <= self.max_edge:
                        return None
                    image.thumbnail((self.max_edge, self.max_edge), Image.Resampling.BICUBIC)
                # As in decoding, an EXIF orientation is not applied. It is not kept either.
                pixels = image if image.mode in ("L", "RGB") else image.convert("RGB")
                output = io.BytesIO()
                pixels.save(output, "jpeg", quality=self.quality or QUALITY, exif=b"")
        return output.getvalue()


@dataclass(frozen=True)
class Written:
    """What `prepare_shards` has done."""

    shards: list[Path]  # all shards of the split, in order
    resumed: int  # how many of them were there already
    copied: list[str]  # images that could not be encoded again and were copied as they are


def prepare_shards(
    source: Source,
    destination: Path,
    split: str,
    *,
    prefix: str | None = None,
    shards: int | None = None,
    seed: int = 0,
    encoding: Encoding | None = None,
    workers: int = 1,
    progress: bool = False,
) -> Written:
    """Write the images of a source, shuffled, as DESTINATION/PREFIX-SPLIT-{0000...}.tar.

    Finished shards of an earlier run are kept.

    Args:
        source: The images.
        destination: The directory of the shards. It is made if it does not exist.
        split: The name of the split.
        prefix: How the names of the shards begin; by default as is usual for the source.
        shards: The number of shards, which is never larger than the number of images; by default
            `usual_count`.
        seed: The seed of the shuffling.
        encoding: How images are encoded again; by default they are copied.
        workers: The number of processes. The bytes of the shards do not depend on it.
        progress: Whether a progress bar is shown.

    Raises:
        DataError: The destination holds shards of another source, seed or encoding, its other split
            has other classes, another process writes there, the disk is full, or an image cannot be
            read.
    """
    encoding = encoding or Encoding()
    destination = Path(destination)
    name, count = _name_and_count(source, split, prefix, shards, seed)
    parts = np.array_split(shuffled(len(source), np.random.Philox(key=seed)), count)
    width = max(4, len(str(count - 1)))
    paths = [destination / f"{name}-{number:0{width}d}.tar" for number in range(count)]
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(destination, error) from None
    plan = _plan(source, split, count, seed, encoding)
    refuse_other_shards(destination, split, paths)
    refuse_other_plan(destination, name, split)
    with planned(destination, name, plan) as alone:
        if alone:  # what killed runs have left
            for path in destination.glob(f".{escape(name)}-*"):
                path.unlink(missing_ok=True)
        missing = [
            number for number in range(count) if not _is_done(paths[number], source, parts[number])
        ]
        _check_space(source, [parts[number] for number in missing], destination, encoding)
        tasks = ((source.take(parts[number]), paths[number], encoding) for number in missing)
        done = in_parallel(_write_part, tasks, max(1, min(workers, len(missing))))
        sizes = [len(parts[number]) for number in missing]
        copied = _finish(destination / f"{name}.sha256", paths, missing, sizes, done, progress)
        add_to_info(destination, split, paths, [len(part) for part in parts])
    return Written(paths, count - len(missing), sorted(copied))


def _name_and_count(
    source: Source, split: str, prefix: str | None, shards: int | None, seed: int
) -> tuple[str, int]:
    """Return PREFIX-SPLIT and the number of shards. Raises DataError for impossible options."""
    if prefix is not None and not re.fullmatch(r"[^./\\][^/\\]*", prefix):
        raise DataError(f"prefix begins the names of files, {prefix!r} cannot: use letters and -.")
    if seed < 0:
        raise DataError(f"seed is a number of 0 or more, not {seed}.")
    count = min(usual_count(source, split) if shards is None else shards, len(source))
    if count < 1:
        raise DataError(f"{count} shards cannot hold {len(source)} images: use 1 or more of each.")
    return f"{source.prefix if prefix is None else prefix}-{split}", count


def usual_count(source: Source, split: str) -> int:
    """Return the usual number of shards for a source.

    Published sets have their published numbers. Other sets get shards of some 150 MB, as ImageNet
    does. There are at least 32 of them, so that 4 ranks of 4 workers find two each, but no shard
    has less than 64 images. The number does not depend on the machine, so another machine can
    continue the work.
    """
    if source.shards is not None:
        return source.shards[split]
    by_bytes = round((source.bytes() or 0) / SHARD_BYTES)
    return max(1, min(max(by_bytes, FEWEST_SHARDS), len(source) // FEWEST_IMAGES))


def _plan(source: Source, split: str, count: int, seed: int, encoding: Encoding) -> Plan:
    return {
        "split": split,
        "shards": count,
        "seed": seed,
        "max_edge": encoding.max_edge,
        "quality": encoding.quality,
        "encoder": None if encoding.copies else f"Pillow {PIL.__version__}",
        "source": source.identity(),
        "classes": list(source.classes),
    }


def _is_done(shard: Path, source: Source, part: np.ndarray) -> bool:
    """Tell whether a shard is there. Raises DataError if it is not the planned one."""
    if not shard.exists():
        return False
    if not sidecar(shard).exists():  # killed in between
        index_shard(shard)
    index = load_index([shard])
    keys = [key.decode() for key in source.key[part].tolist()]
    if index.keys() != keys or not np.array_equal(index.label, source.label[part]):
        raise DataError(
            f"{shard} does not hold the samples that were planned for it. Delete it and run the "
            "same command again."
        )
    return True


def _check_space(
    source: Source, parts: list[np.ndarray], directory: Path, encoding: Encoding
) -> None:
    if not parts or not encoding.copies:
        return
    images = source.take(np.concatenate(parts))
    if (size := images.bytes()) is None:
        return
    needed, free = size + OVERHEAD * len(images), shutil.disk_usage(directory).free
    if needed > free:
        raise DataError(
            f"{directory} has {free / 1e9:.1f} GB free, but the shards to write need up to "
            f"{needed / 1e9:.1f} GB. Make room or choose another directory."
        )


def _write_part(part: Source, shard: Path, encoding: Encoding) -> tuple[str, list[str]]:
    """Write a shard and its index.

    Args:
        part: The images of the shard.
        shard: Its path.
        encoding: How images are encoded again.

    Returns:
        The SHA-256 of the shard, and the names of images that were copied because they could not be
        encoded again.
    """
    copied: list[str] = []
    try:
        digest = write_shard(_samples(part, encoding, copied), shard, set())
        index_shard(shard)
    except OSError as error:  # reading has errors of its own
        raise DataError(
            f"{shard} could not be written ({error.strerror or error}). The finished shards are "
            "kept: make room, then run the same command again."
        ) from error
    return digest, copied


def _samples(part: Source, encoding: Encoding, copied: list[str]) -> Iterator[Sample]:
    names, keys = map(os.fsdecode, part.name.tolist()), map(bytes.decode, part.key.tolist())
    images: Iterable[bytes] = part.images()
    clean = [None] * len(part) if part.clean is None else part.clean.tolist()
    rows = zip(images, names, keys, part.label.tolist(), clean, strict=True)
    for image, name, key, label, true in rows:
        extension = PurePosixPath(name).suffix[1:].lower().replace("jpeg", "jpg")
        if not encoding.copies:
            try:
                new = encoding.encode(image)
            except MemoryError:
                raise
            except Exception:  # a damaged file raises nearly anything in Pillow
                new = None
                copied.append(name)
            if new is not None:
                image, extension = new, "jpg"
        more = {"class": part.classes[label]} | ({} if true is None else {"clean_label": true})
        yield Sample(key, image, extension, label, name, more)


def _finish(
    checksums: Path,
    paths: list[Path],
    missing: list[int],
    sizes: list[int],
    done: Iterator[tuple[int, tuple[str, list[str]]]],
    progress: bool,
) -> list[str]:
    """Wait for the shards and record the checksum of each.

    Args:
        checksums: The file that records the SHA-256 of the shards.
        paths: All shards of the split.
        missing: The numbers of the shards that are being written.
        sizes: The number of images of each of these.
        done: What `_write_part` returned for each of these, with its place in `missing`.
        progress: Whether a progress bar is shown.

    Returns:
        The names of images that were copied because they could not be encoded again.
    """
    pattern = re.compile(r"^([0-9a-f]{64})  (.+\.tar)$", re.M)
    lines = checksums.read_text() if checksums.exists() else ""
    written = {paths[number].name for number in missing}
    digests = {name: digest for digest, name in pattern.findall(lines) if name not in written}
    copied: list[str] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("shards, {task.fields[images]:,} images"), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not progress,
    )  # fmt: skip
    with bar:
        images = 0
        task = bar.add_task(
            "sharding", total=len(paths), completed=len(paths) - len(missing), images=0
        )
        for number, (digest, names) in done:
            name = paths[missing[number]].name
            images += sizes[number]
            digests[name] = digest
            with checksums.open("a") as file:
                file.write(f"{digest}  {name}\n")
            copied += names
            bar.update(task, advance=1, images=images)
    for path in itertools.filterfalse(lambda path: path.name in digests, paths):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    write_checksums(checksums, {path.name: digests[path.name] for path in paths})
    return copied
