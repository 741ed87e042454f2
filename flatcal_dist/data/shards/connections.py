"""Connections to the places where shards lie: web servers, object stores, commands and paths.

Nothing that was read is unpickled.
"""

import os
import re
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import requests

from flatcal_dist.data.errors import DataError
from flatcal_dist.data.shards.access import is_remote
from flatcal_dist.data.shards.regular import open_regular
from flatcal_dist.urls import hide, shown

CHUNK = 1 << 20  # bytes that a read asks for
LONGEST_WAIT = 30  # seconds between two attempts
BUSY = (408, 425, 429, 500, 502, 503, 504)  # worth another attempt

_Result = TypeVar("_Result")


class NotThere(DataError):
    """The other side says that a shard does not exist, or that it may not be read."""


class Broken(Exception):
    """A connection failed in a way that another attempt may mend."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait  # seconds that the server asks for


@dataclass
class Connection:
    """An open connection."""

    read: Callable[[int], bytes]
    close: Callable[[], None]
    start: int = 0  # the byte of the shard that comes first
    size: int | None = None  # bytes of the whole shard, where known
    tag: str | None = None  # changes when the shard does, where known


def connect(url: str, offset: int, tag: str | None, timeout: float) -> Connection:
    """Open a shard at a byte, or before it where the other side cannot begin in the middle.

    Args:
        url: A URL, a command or a path, which has to be allowed (see `check_allowed`).
        offset: The byte of the shard to begin with.
        tag: The tag of the shard that was read before, if it is opened again.
        timeout: How long a read may wait, in seconds.

    Raises:
        NotThere: A web server says that the shard does not exist or is forbidden.
        DataError: No other attempt would mend what went wrong.
        Broken: Another attempt may mend it.
        OSError: The path or the object cannot be opened.
    """
    if url.startswith("pipe:"):
        return _open_pipe(url.removeprefix("pipe:"), timeout)
    if re.match(r"(?i)https?://", url):
        return _open_http(url, offset, tag, timeout)
    if is_remote(url):
        return _open_object(url, offset, timeout)
    file = open_regular(Path(url))
    file.seek(offset)
    return Connection(file.read, file.close, offset, os.fstat(file.fileno()).st_size)


def _open_http(url: str, offset: int, tag: str | None, timeout: float) -> Connection:
    headers = {"Accept-Encoding": "identity"}  # else Content-Length would not count the shard
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if tag:
            headers["If-Range"] = tag
    # The limit of requests holds for every byte of a header: a server could send them one by one.
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
            raise Broken(said, _asked_wait(response))
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
    return Connection(
        # `read1` gives what has come. A server could send the length of a chunk byte by byte.
        read=lambda n: _within(timeout, lambda: response.raw.read1(n, decode_content=False)),
        close=partial(_close, response),
        start=start,
        size=int(size) if size and _is_number(size) else None,
        tag=tag if tag.startswith('"') else None,  # weak ones do not promise the same bytes
    )


def _close(response: requests.Response) -> None:
    # A read that was given up still waits in its thread, and closing would wait for it.
    with suppress(ValueError, RuntimeError, OSError):
        response.raw.shutdown()
    response.close()


def _asked_wait(response: requests.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return float(min(int(asked), LONGEST_WAIT)) if _is_number(asked) else 0.0


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d{1,18}", text, re.ASCII) is not None


def _open_object(url: str, offset: int, timeout: float) -> Connection:
    scheme, _, path = url.partition("://")
    scheme = scheme.lower()

    def opened() -> Any:
        # Not by fsspec.open: a URL could chain any other file system to this one.
        file = fsspec.filesystem(scheme).open(path, "rb", block_size=8 * CHUNK)
        file.seek(offset)
        return file

    def within(work: Callable[[], _Result]) -> _Result:
        try:
            return _within(timeout, work)
        except ImportError as error:
            raise DataError(f"{shown(url)}: {scheme}:// needs another package: {error}.") from None
        except OSError:
            raise
        except Exception as error:  # raised by the client of the store
            raise Broken(f"{type(error).__name__}: {error}") from error

    file = within(opened)
    return Connection(lambda n: within(lambda: file.read(n)), file.close, offset, file.size)


def _within(seconds: float, work: Callable[[], _Result]) -> _Result:
    """Return the result of `work`, or raise TimeoutError if it takes longer than `seconds`."""
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def _open_pipe(command: str, timeout: float) -> Connection:
    process = subprocess.Popen(
        command,
        shell=True,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    output = process.stdout
    assert output is not None  # it is a pipe

    def read(size: int) -> bytes:
        if not select.select([output], [], [], timeout)[0]:
            raise TimeoutError
        data = output.read(size)
        if not data:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError from None
            if code:
                raise Broken(f"the command ended with code {code}")
        return data

    def close() -> None:
        output.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with whatever the shell started
            process.wait()

    return Connection(read, close)
