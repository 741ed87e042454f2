"""Shards that lie elsewhere, as byte streams that end whole or in an error, never in between.

A connection that breaks, stalls or ends early is opened again at the byte where it failed, a
bounded number of times. What may be opened is an allow-list of schemes: http(s); s3, gs and hf
through fsspec's file systems for them; `pipe:COMMAND` runs a shell, so it has to be allowed by
name. Names are never rewritten from the environment, and nothing that was read is unpickled.
"""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import requests
import urllib3
from braceexpand import UnbalancedBracesError, braceexpand

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.regular import open_regular
from flatcal_dist.patterns import too_many_names
from flatcal_dist.urls import hide, shown

SCHEMES = ("http", "https", "s3", "gs", "hf")
CHUNK = 1 << 20  # bytes that a read asks for
SLOWEST = 1024  # bytes/s; a connection that gives less counts as one that stalls
LONGEST_WAIT = 30  # seconds between two attempts
SMALL_FILE_STALLS = 10  # times `stall_timeout`, in which a small file has to come
BUSY = (408, 425, 429, 500, 502, 503, 504)  # worth another attempt


class NotThere(DataError):
    """The other side says that there is no such thing, or that we may not have it."""


class _Broken(Exception):
    """A connection that failed in a way that another attempt may mend."""

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait  # seconds that the server asks for


@dataclass(frozen=True)
class Access:
    """How patient to be, and what is allowed."""

    stall_timeout: float = 30.0  # seconds without a byte, or with next to none
    retries: int = 5  # for a shard
    backoff: float = 0.5  # seconds before the first of them; doubles with each
    allow_pipe: bool = False


def is_remote(name: str) -> bool:
    """Whether a shard's name or pattern is a URL or a command, not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|pipe:", name) is not None


def expand_urls(pattern: str, access: Access) -> list[str]:
    """The URLs that a brace pattern stands for. Raises DataError for a scheme not allowed."""
    if problem := too_many_names(pattern):
        raise DataError(f"The shard pattern {problem}.")
    try:
        urls = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise DataError(
            f"The shard pattern {shown(pattern)!r} has unbalanced braces: "
            f"{hide(str(error), pattern)}."
        ) from None
    for url in urls:
        _check_allowed(url, access)
    return urls


def _check_allowed(url: str, access: Access) -> None:
    if url.startswith("pipe:"):
        if not access.allow_pipe:
            raise DataError(
                f"{shown(url)!r} would run a command in a shell. If you trust where this name "
                "comes from, set data.allow_pipe=true."
            )
    elif (scheme := url.partition("://")[0]).lower() not in SCHEMES:
        raise DataError(
            f"{shown(url)}: {scheme}:// is no scheme that shards are read from; expected one of "
            f"{', '.join(SCHEMES)}, `pipe:COMMAND`, or a path."
        )


@dataclass
class _Source:
    """An open connection."""

    read: Callable[[int], bytes]
    close: Callable[[], None]
    start: int = 0  # the byte of the shard that comes first
    size: int | None = None  # bytes of the whole shard, where known
    tag: str | None = None  # changes when the shard does, where known


class RemoteFile:
    """The bytes of one shard from first to last, whatever happens to the connection.

    `read` gives b"" only at the end, and then everything the other side promised has come. It
    raises NotThere for what does not exist or is forbidden, and DataError when `access.retries`
    attempts were in vain or the shard changed meanwhile. Paths are read too.
    """

    def __init__(self, url: str, access: Access):
        if is_remote(url):
            _check_allowed(url, access)
        self.name = shown(url)
        self.position = 0
        self.size: int | None = None
        self._url, self._access = url, access
        self._source: _Source | None = None
        self._tag: str | None = None
        self._failures = 0
        self._waited, self._came = 0.0, 0  # seconds inside of reads, and what they gave

    def read(self, size: int = CHUNK) -> bytes:
        while True:
            try:
                if self._source is None:
                    self._connect()
                if self.size is not None:  # a server may send more than it announced
                    size = min(size, self.size - self.position)
                if size <= 0:
                    return b""
                began = time.monotonic()
                data = self._source.read(size)
                self._waited += time.monotonic() - began
                self._came += len(data)
                if not data and self.size is not None and self.position < self.size:
                    raise _Broken("the connection was closed too early")
                self.position += len(data)
                if data and self.position != self.size:
                    self._check_pace()
                return data
            except (_Broken, requests.RequestException, urllib3.exceptions.HTTPError, OSError) as e:
                self._wait_after(e)

    def part(self, start: int, size: int) -> bytes:
        """Bytes from anywhere in the shard, over a connection of their own."""
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

    def _connect(self) -> None:
        try:
            source = _open(self._url, self.position, self._tag, self._access)
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
        # What a server says once holds, though it may not say it again.
        self.size = source.size if source.size is not None else self.size
        self._tag = source.tag or self._tag
        behind = self.position - source.start
        while behind:  # the other side cannot begin in the middle
            if not (data := source.read(min(behind, CHUNK))):
                raise _Broken("the connection was closed too early")
            behind -= len(data)

    def _check_pace(self) -> None:
        """Open the connection again, which may help, if it gave next to nothing."""
        waited, came = self._waited, self._came
        if waited <= self._access.stall_timeout:
            return
        self._waited, self._came = 0.0, 0
        if came < SLOWEST * waited:
            self._wait_after(_Broken(f"only {came:,} bytes came in {waited:.0f} s"))

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
            ) from None  # other libraries' messages hold the URL
        print(f"{self.name}: {cause}, {at}; attempt {self._failures} failed", file=sys.stderr)
        wait = min(self._access.backoff * 2 ** (self._failures - 1), LONGEST_WAIT)
        # So that readers that failed together do not come back together.
        wait *= 1 + zlib.crc32(f"{self._url}{os.getpid()}{self._failures}".encode()) / 2**32
        time.sleep(max(wait, getattr(error, "wait", 0.0)))


def _differ(now: object, before: object) -> bool:
    return None not in (now, before) and now != before


def _in_words(error: Exception) -> str:
    if isinstance(error, _Broken):
        return str(error)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError | TimeoutError):
        return "no byte came for too long"
    return f"{type(error).__name__}: {error}"


def read_small(url: str, access: Access, limit: int = 64 << 20) -> bytes:
    """All of a small file that lies beside shards. Raises as RemoteFile does.

    Raises DataError as well for more than `limit` bytes, and where these take so long that the
    other side must be trickling.
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


def _open(url: str, offset: int, tag: str | None, access: Access) -> _Source:
    if url.startswith("pipe:"):
        return _open_pipe(url.removeprefix("pipe:"), access.stall_timeout)
    if re.match(r"(?i)https?://", url):
        return _open_http(url, offset, tag, access.stall_timeout)
    if is_remote(url):
        return _open_object(url, offset, access.stall_timeout)
    file = open_regular(Path(url))
    file.seek(offset)
    return _Source(file.read, file.close, offset, os.fstat(file.fileno()).st_size)


def _open_http(url: str, offset: int, tag: str | None, timeout: float) -> _Source:
    headers = {"Accept-Encoding": "identity"}  # else Content-Length would not be the shard's
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if tag:
            headers["If-Range"] = tag
    # requests' own limit is for every byte of a header; a server could send them one by one.
    get = partial(requests.get, url, headers=headers, stream=True, timeout=timeout)
    try:
        response = _within(timeout, get)
    except (ValueError, requests.TooManyRedirects) as error:  # no other attempt would mend it
        raise DataError(
            f"{shown(url)}: this address, or one that the server redirects to, cannot be opened "
            f"({hide(str(error), url)}). Check the name."
        ) from None
    status = response.status_code
    if status not in (200, 206) or (status == 206 and not offset):
        response.close()
        said = hide(f"the server answered {status} {response.reason}", url)
        if status in BUSY:
            raise _Broken(said, _asked_wait(response))
        if status in (401, 403, 404, 410):
            raise NotThere(f"{shown(url)}: {said}. Check the name, and that it may be read.")
        raise DataError(f"{shown(url)}: {said}. Check the name.")
    start, size = 0, response.headers.get("Content-Length")
    if status == 206:
        text = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d{1,18}|\*)", text, re.ASCII)
        if not found or found[1] != str(offset):
            response.close()
            raise DataError(f"{shown(url)}: the server sent another range than was asked for.")
        start, size = offset, found[2]
    tag = response.headers.get("ETag", "")
    return _Source(
        # What is there; and a server could send the length of a chunk byte by byte.
        read=lambda n: _within(timeout, lambda: response.raw.read1(n, decode_content=False)),
        close=partial(_close, response),
        start=start,
        size=int(size) if size and _is_number(size) else None,
        tag=tag if tag.startswith('"') else None,  # weak ones do not promise the same bytes
    )


def _close(response: requests.Response) -> None:
    # A read that was given up still waits in its thread, and closing waits for it: end it first.
    with suppress(ValueError, RuntimeError, OSError):
        response.raw.shutdown()
    response.close()


def _asked_wait(response: requests.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return float(min(int(asked), LONGEST_WAIT)) if _is_number(asked) else 0.0


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,18}", text, re.ASCII) is not None


def _open_object(url: str, offset: int, timeout: float) -> _Source:
    scheme, _, path = url.partition("://")
    scheme = scheme.lower()

    def opened() -> Any:
        # By name, and not fsspec.open: a URL could chain any other file system to it.
        file = fsspec.filesystem(scheme).open(path, "rb", block_size=8 * CHUNK)
        file.seek(offset)
        return file

    def within(work: Callable[[], Any]) -> Any:
        try:
            return _within(timeout, work)
        except ImportError as error:
            raise DataError(f"{shown(url)}: {scheme}:// needs another package: {error}.") from None
        except OSError:
            raise
        except Exception as error:  # of the store's own client
            raise _Broken(f"{type(error).__name__}: {error}") from error

    file = within(opened)
    return _Source(lambda n: within(lambda: file.read(n)), file.close, offset, file.size)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, or TimeoutError: whatever the other side does, it may last for ever."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError
    return outcome["result"]


def _open_pipe(command: str, timeout: float) -> _Source:
    process = subprocess.Popen(
        command,
        shell=True,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )

    def read(size: int) -> bytes:
        if not select.select([process.stdout], [], [], timeout)[0]:
            raise TimeoutError
        data = process.stdout.read(size)
        if not data:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            if code:
                raise _Broken(f"the command ended with code {code}")
        return data

    def close() -> None:
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever the shell started
            process.wait()

    return _Source(read, close)
