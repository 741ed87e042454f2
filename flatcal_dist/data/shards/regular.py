"""Opening paths that may not be files.

A FIFO would make a reader wait for ever, and a device may never end.
"""

import os
import stat
from io import BufferedReader
from pathlib import Path

from flatcal_dist.data.errors import DataError

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


class NotRegular(DataError):
    """A path is not a regular file."""

    def __init__(self, path: Path, mode: int) -> None:
        what = KINDS.get(stat.S_IFMT(mode), "something else")
        super().__init__(
            f"{path} is {what}, expected a regular file. Take it away, or name another file."
        )


def check_regular(path: Path) -> os.stat_result:
    """Return what `stat` tells about a regular file.

    Raises NotRegular for anything else, and OSError where `stat` does.
    """
    about = os.stat(path)  # noqa: PTH116 (paths may be text)
    if not stat.S_ISREG(about.st_mode):
        raise NotRegular(path, about.st_mode)
    return about


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises NotRegular for anything else, and OSError where `open` does.
    """
    check_regular(path)  # opening some devices does something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):  # exchanged meanwhile
        file.close()
        raise NotRegular(path, mode)
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """Return all bytes of a regular file.

    Raises DataError for more than `limit` bytes, NotRegular for anything but a regular file, and
    OSError where `open` does.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise DataError(f"{path} has more than {limit:,} bytes: it is not what it should be.")
    return data
