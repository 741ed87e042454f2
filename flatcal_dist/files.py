"""Files that appear whole or not at all, JSON for any reader, and reading of bounded length."""

import csv
import errno
import io
import json
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

ROOM = "Make room on its file system, or mend the permissions, and give the same command again"
REFUSALS = (
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE,
)  # fmt: skip
LARGEST = 64 << 20  # bytes; files of this package that are read as a whole have far fewer


class WriteError(OSError):
    """A file cannot be written. The message names the file, the cause and the remedy."""

    def __init__(self, path: Path, cause: OSError | str, remedy: str = ROOM) -> None:
        words = cause if isinstance(cause, str) else cause.strerror or str(cause)
        super().__init__(f"{path} cannot be written ({words}). {remedy}")
        self.strerror = words


def expanded(path: str | Path) -> Path:
    """Return a path with `~` replaced. Raises ValueError for a user that is not known here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path}: {Path(path).parts[0]} is no user's home directory here"
        ) from None


def refuse_no_directory(path: Path) -> None:
    """Raise WriteError unless `path` is a directory to write into, or can become one.

    Nothing is created. This is for the time before long work.
    """
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
        if not there.is_dir():
            raise WriteError(path, f"{there} is there, and no directory", "Name another one")
    except OSError as error:
        raise error if isinstance(error, WriteError) else WriteError(path, error) from None
    if not os.access(there, os.W_OK | os.X_OK):
        raise WriteError(path, f"{there} is read-only here", "Name another one")


@contextmanager
def write_atomically(path: Path, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path. If the block ends without error, the file is renamed to `path`.

    With `private` only the owner may read the file, from its first byte on. Raises WriteError if
    the file system refuses.
    """
    special = path.is_symlink() and str(path.readlink()).startswith("/proc/")  # /dev/stdout
    if special or (path.exists() and not path.is_file()):  # a device would be replaced
        raise WriteError(path, "it is there, and no regular file", "Name another one")
    # The suffix stays last, because writers choose a format by it.
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if private:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        # An error of a file that the block reads has another name, or is of another kind.
        ours = error.filename in (None, str(temporary), str(path.parent))
        if error.errno not in REFUSALS or not ours:
            raise
        raise WriteError(path, error) from None
    finally:
        with suppress(OSError):  # it must not hide what happened
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Write a text file, whole or not at all.

    Args:
        path: The file.
        text: What it will hold.
        private: Whether only its owner may read it.

    Raises:
        WriteError: The file system refuses.
    """
    with write_atomically(path, private) as temporary:
        # A message may hold a name that is no UTF-8. In JSON this becomes an escape.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all. Raises WriteError, and ValueError for NaN or infinity."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def open_to_append(path: Path) -> TextIO:
    """Open a text file to append to it, and to read it. Raises WriteError, also for a device.

    A symbolic link is not followed, because it may point to a file of somebody else.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise WriteError(path, "it is a symbolic link", "Remove the link") from None
        raise WriteError(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise WriteError(path, "it is no regular file", "Remove it")
    return os.fdopen(descriptor, "a+", encoding="utf-8")


def read_bytes(path: Path, limit: int | None = LARGEST) -> bytes:
    """Return the contents of a regular file of at most `limit` bytes.

    Raises OSError. Raises ValueError for more bytes, and for devices and pipes, which may not end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes")
    return content


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. Raises OSError, and ValueError for what is no JSON."""
    try:
        return json.loads(read_bytes(path).decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return CSV in which a spreadsheet takes no cell for a formula.

    A text that begins like a formula (`=`, `+`, `-`, `@`, tab, line break) and is no number gets an
    apostrophe in front, which marks text in spreadsheets (OWASP, CSV Injection).
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.replace("\r", "\n")  # the writer does not quote \r, and readers end a row there
    if not value.startswith(("=", "+", "-", "@", "\t", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, after a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
