"""Shards from elsewhere on a local disk. Each is downloaded once, whole, and checked.

The directory holds each shard as HASH-NAME.tar. HASH is the hash of the URL without the parts that
are renewed, such as a signature. HASH-NAME.json beside it says where the shard came from, its size
and its SHA-256. A shard appears by rename when all of it has come. Until then its downloader holds
a lock that ends with the process, however the process ends. So any number of ranks, workers and
jobs may share a directory. The contents of a URL must not change: a shard that changes needs
another name.
"""

import hashlib
import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.access import Access
from flatcal_dist.data.shards.members import BLOCK
from flatcal_dist.data.shards.regular import open_regular
from flatcal_dist.data.shards.remote import RemoteFile
from flatcal_dist.data.shards.sidecars import sidecar
from flatcal_dist.data.shards.writing import locked
from flatcal_dist.files import read_json, sync_directory, write_json
from flatcal_dist.urls import base_name, identity


@dataclass(frozen=True)
class ShardCache:
    """A directory of downloaded shards.

    Beyond the limit, the shards that were not used for the longest time are deleted. Indexed shards
    are neither deleted nor counted.
    """

    directory: Path
    access: Access
    limit: int | None = None  # bytes; None for no limit

    def path(self, url: str) -> Path:
        """Return the path at which the shard lies once it is downloaded."""
        name = re.sub(r"[^A-Za-z0-9._-]", "_", base_name(url)).removesuffix(".tar")[-80:]
        digest = hashlib.sha256(identity(url).encode()).hexdigest()
        return self.directory / f"{digest[:32]}-{name}.tar"

    def open(self, url: str, sha256: str | None = None) -> BinaryIO:
        """Return the open shard, which is downloaded first unless it is there.

        It is open so that it cannot vanish again. Raises DataError if it cannot be downloaded
        whole, has another SHA-256 than `sha256` (hexadecimal), or does not fit on the disk.
        """
        path = self.path(url)
        if (file := self._whole(path)) is not None:
            return file
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = path.with_name(f".{path.name}.lock")
            lock.touch()
            with locked(lock):
                if (file := self._whole(path)) is not None:
                    return file  # another process was quicker
                self._download(url, path, sha256)
                self._make_room(path)
                return path.open("rb")
        except OSError as error:
            raise DataError(
                f"data.cache: {self.directory} cannot take {base_name(url)}: {error}. Make room, "
                "set data.cache_limit, or name another directory."
            ) from error

    def recorded(self, url: str) -> str | None:
        """Return the SHA-256 that a shard had when it came, or None if it is not there."""
        try:
            return str(read_json(self.path(url).with_suffix(".json"))["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _whole(self, path: Path) -> BinaryIO | None:
        try:
            size = read_json(path.with_suffix(".json"))["size"]
            file = open_regular(path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        with suppress(OSError):
            os.utime(path)  # used now: the last to be deleted
        return file

    def _download(self, url: str, path: Path, sha256: str | None) -> None:
        for left in path.parent.glob(f".{path.name}.*.part"):
            left.unlink()  # a process that was killed has left it: the lock is ours
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            for attempt in range(2):  # a shard that came whole but wrong may come right again
                with RemoteFile(url, self.access) as source:
                    found, end = self._copy(source, temporary)
                problem = _problem(temporary.stat().st_size, end, found, sha256)
                if problem is None:
                    break
                if attempt:
                    raise DataError(
                        f"{source.name} came twice as something else: {problem}. Put the right "
                        "shard there, or correct its recorded SHA-256."
                    )
            about = {"url": source.name, "size": temporary.stat().st_size, "sha256": found}
            sidecar(path).unlink(missing_ok=True)  # it would describe another shard
            write_json(path.with_suffix(".json"), about)
            temporary.replace(path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _copy(self, source: RemoteFile, path: Path) -> tuple[str, bytes]:
        """Write all of `source` to the disk, and return its SHA-256 and its last block."""
        digest, end = hashlib.sha256(), b""
        with path.open("wb") as file:
            while data := source.read():
                free = shutil.disk_usage(self.directory).free if not end else None
                if free is not None and (source.size or 0) > free:
                    raise DataError(
                        f"data.cache: {source.name} has {source.size:,} bytes, but "
                        f"{self.directory} has {free:,} free. Make room, set data.cache_limit, or "
                        "name another directory."
                    )
                file.write(data)
                digest.update(data)
                end = (end + data[-BLOCK:])[-BLOCK:]
            file.flush()
            os.fsync(file.fileno())
        return digest.hexdigest(), end

    def _make_room(self, newest: Path) -> None:
        if self.limit is None:
            return
        held = []
        for path in self.directory.glob("*-*.tar"):
            if sidecar(path).exists():  # the indexed reader needs all of its shards
                continue
            with suppress(FileNotFoundError):  # deleted by another process just now
                held.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total > self.limit and path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _problem(size: int, end: bytes, found: str, sha256: str | None) -> str | None:
    if sha256 is not None and found != sha256.lower():
        return f"its SHA-256 is {found}, expected {sha256}"
    if size % BLOCK or len(end) < BLOCK or end.strip(b"\0"):
        return f"its {size:,} bytes do not end like a tar"
    return None
