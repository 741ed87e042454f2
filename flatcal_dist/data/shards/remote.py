"""Shards that lie elsewhere, as byte streams that end whole or in an error, never in between.

A connection that breaks, stalls or ends early is opened again at the byte where it failed, a
bounded number of times.
"""

import os
import sys
import time
import zlib
from contextlib import suppress

import requests
import urllib3

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.access import Access, check_allowed, is_remote
from flatcal_dist.data.shards.connections import (
    CHUNK,
    LONGEST_WAIT,
    Broken,
    Connection,
    NotThere,
    connect,
)
from flatcal_dist.urls import hide, shown

SLOWEST = 1024  # bytes/s; a connection that gives less counts as one that stalls
SMALL_FILE_STALLS = 10  # times `stall_timeout`, in which a small file has to come


class RemoteFile:
    """The bytes of one shard from first to last, also where connections break.

    `read` returns b"" only at the end, when everything that the other side promised has come. It
    raises NotThere for a shard that does not exist or is forbidden. It raises DataError if
    `access.retries` more attempts failed, or if the shard changed meanwhile. The name of the shard
    may also be a path.
    """

    def __init__(self, url: str, access: Access) -> None:
        if is_remote(url):
            check_allowed(url, access)
        self.name = shown(url)
        self.position = 0
        self.size: int | None = None
        self._url, self._access = url, access
        self._source: Connection | None = None
        self._tag: str | None = None
        self._failures = 0
        self._waited, self._came = 0.0, 0  # seconds inside of reads, and bytes that they gave

    def read(self, size: int = CHUNK) -> bytes:
        while True:
            try:
                source = self._source or self._connect()
                if self.size is not None:  # a server may send more than it announced
                    size = min(size, self.size - self.position)
                if size <= 0:
                    return b""
                began = time.monotonic()
                data = source.read(size)
                self._waited += time.monotonic() - began
                self._came += len(data)
                if not data and self.size is not None and self.position < self.size:
                    raise Broken("the connection was closed too early")
                self.position += len(data)
                if data and self.position != self.size:
                    self._check_pace()
                return data
            except (Broken, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
                self._wait_after(e)

    def part(self, start: int, size: int) -> bytes:
        """Return bytes from anywhere in the shard, over a second connection."""
        parts = []
        with RemoteFile(self._url, self._access) as again:
            again.position, again._tag = start, self._tag
            again.size = self.size
            while size and (data := again.read(size)):
                parts.append(data)
                size -= len(data)
        return b"".join(parts)

    def close(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with suppress(OSError, urllib3.exceptions.HTTPError):
                source.close()

    def __enter__(self) -> "RemoteFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _connect(self) -> Connection:
        try:
            timeout = self._access.stall_timeout
            source = connect(self._url, self.position, self._tag, timeout)
        except FileNotFoundError as error:
            said = hide(str(error), self._url)
            raise NotThere(f"{self.name}: no such shard ({said}). Check the name.") from None
        except PermissionError as error:
            said = hide(str(error), self._url)
            raise NotThere(f"{self.name} may not be read ({said}).") from None
        self._source = source
        if self.position and (_differ(source.size, self.size) or _differ(source.tag, self._tag)):
            raise DataError(
                f"{self.name} changed while it was read: it had {self.size} bytes, now "
                f"{source.size}, or other contents. Shards have to stay as they are during a run."
            )
        # What a server has said once still holds where it does not say it again.
        self.size = source.size if source.size is not None else self.size
        self._tag = source.tag or self._tag
        behind = self.position - source.start
        while behind:  # the other side cannot begin in the middle
            if not (data := source.read(min(behind, CHUNK))):
                raise Broken("the connection was closed too early")
            behind -= len(data)
        return source

    def _check_pace(self) -> None:
        """Close a connection that gave next to nothing: a new one may be faster."""
        waited, came = self._waited, self._came
        if waited <= self._access.stall_timeout:
            return
        self._waited, self._came = 0.0, 0
        if came < SLOWEST * waited:
            self._wait_after(Broken(f"only {came:,} bytes came in {waited:.0f} s"))

    def _wait_after(self, error: Exception) -> None:
        self.close()
        self._failures += 1
        at = f"at byte {self.position:,}" + (f" of {self.size:,}" if self.size is not None else "")
        attempts, cause = self._access.retries + 1, hide(_in_words(error), self._url)
        if self._failures == attempts:
            raise DataError(
                f"{self.name}: gave up {at} after {attempts} attempts; the last one failed because "
                f"{cause}. Check the server and the shard; data.retries and data.stall_timeout say "
                "how long to try."
            ) from None  # messages of other libraries hold the URL
        print(f"{self.name}: {cause}, {at}; attempt {self._failures} failed", file=sys.stderr)
        wait = min(self._access.backoff * 2 ** (self._failures - 1), LONGEST_WAIT)
        # So that readers that failed together do not come back together.
        wait *= 1 + zlib.crc32(f"{self._url}{os.getpid()}{self._failures}".encode()) / 2**32
        time.sleep(max(wait, getattr(error, "wait", 0.0)))


def _differ(now: object, before: object) -> bool:
    return None not in (now, before) and now != before


def _in_words(error: Exception) -> str:
    if isinstance(error, Broken):
        return str(error)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "no byte came for too long"
    return f"{type(error).__name__}: {error}"


def read_small(url: str, access: Access, limit: int = 64 << 20) -> bytes:
    """Return all bytes of a small file that lies beside shards.

    Args:
        url: Where the file lies.
        access: How patient to be, and what may be opened.
        limit: The most bytes that the file may have.

    Raises:
        NotThere: The file does not exist or is forbidden.
        DataError: The file cannot be read, is larger than `limit`, or comes too slowly.
    """
    parts, size = [], 0
    until = time.monotonic() + SMALL_FILE_STALLS * access.stall_timeout
    with RemoteFile(url, access) as file:
        while data := file.read():
            parts.append(data)
            size += len(data)
            if size > limit:
                raise DataError(f"{file.name} has more than {limit:,} bytes: not what it should be")
            if time.monotonic() > until:
                raise DataError(
                    f"{file.name}: only {size:,} bytes came in "
                    f"{SMALL_FILE_STALLS * access.stall_timeout:.0f} s. Check the server, or raise "
                    "data.stall_timeout."
                )
    return b"".join(parts)
