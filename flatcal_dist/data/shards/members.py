"""The walk through the members of a tar, from its first byte to its last; all readers share it.

Python's tarfile parses each header block. Its walk is replaced: tarfile takes a damaged header for
the end of the archive, reads extended headers of any size into memory, follows chains of them by
recursion, and raises raw errors for sizes below zero and bad sparse maps. Here each of these is a
`TarDamage`. A tar can make a reader use only a bounded amount of memory and a bounded number of
steps.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

BLOCK = 512  # of a tar: one header, and the unit of padding
LARGEST_HEADER = 1 << 20  # bytes of a long name, of a pax header or of a sparse map
LONGEST_CHAIN = 8  # extended headers before one member; three is the most that tar writes
LONGEST_NAME = 4096  # bytes: PATH_MAX of Linux
LARGEST_PADDING = 2 << 20  # bytes of zeros at the end; tar fills its last record, at most 1 MiB
CHUNK = 1 << 18  # bytes that are asked for at once

FILE, DIRECTORY = "file", "directory"
KINDS = {
    tarfile.REGTYPE: FILE,
    tarfile.AREGTYPE: FILE,
    tarfile.CONTTYPE: FILE,
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "FIFO",
    tarfile.DIRTYPE: DIRECTORY,
    tarfile.GNUTYPE_SPARSE: "sparse file",
    b"V": "volume label",
    b"M": "part of a file that began in another volume",
    b"D": "directory dump of an incremental backup",
}
WITHOUT_DATA = ("hard link", "symbolic link", "character device", "block device", "FIFO", DIRECTORY)
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7-Zip",
}


class TarDamage(Exception):
    """A file is not a whole tar. `kind` is "unreadable", "damaged" (at a header) or "joined"."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Member(NamedTuple):
    """One member. A hard link to an earlier file counts as that file under another name."""

    name: str  # bytes that are not UTF-8 are kept as surrogates
    kind: str  # a value of KINDS, or "member of type ..."
    target: str  # where a link leads, else ""
    start: int  # first byte of its data
    size: int  # bytes of its data


@runtime_checkable
class Rereadable(Protocol):
    """A stream that is read forward, and can give bytes a second time."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, and none only at the end."""

    def part(self, start: int, size: int) -> bytes:
        """Return bytes that have been passed already. The place in the stream does not change."""

    def close(self) -> None:
        """Close the stream."""


Source = BinaryIO | Rereadable


class Bytes(Protocol):
    """The bytes of a tar."""

    position: int  # of the next byte that `read` gives

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, and fewer only at the end."""

    def skip_to(self, position: int) -> None:
        """Go forward. Raises TarDamage if the tar ends before this position."""

    def read_at(self, start: int, size: int) -> bytes:
        """Return bytes from a place that has been passed, or from the present one.

        Raises TarDamage if the tar ends before `size` bytes.
        """


class Seekable:
    """The bytes of a file, or of the part of it between two bytes."""

    def __init__(self, file: BinaryIO, start: int = 0, stop: int | None = None) -> None:
        self._file, self.position = file, start
        self._stop = os.fstat(file.fileno()).st_size if stop is None else stop

    def read(self, size: int) -> bytes:
        self._file.seek(self.position)
        data = self._file.read(max(0, min(size, self._stop - self.position)))
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        if position > self._stop:
            raise _cut_short()
        self.position = position

    def read_at(self, start: int, size: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(max(0, min(size, self._stop - start)))
        if len(data) < size:
            raise _cut_short()
        return data


class Forward:
    """The bytes of a stream that is read once. Bytes that were passed are fetched again."""

    def __init__(self, file: Source) -> None:
        self._file, self._left, self.position = file, memoryview(b""), 0

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            if not self._left:
                self._left = memoryview(self._file.read(CHUNK))
                if not self._left:
                    break
            parts.append(self._left[:size])
            self._left = self._left[size:]
            size -= len(parts[-1])
        data = b"".join(parts)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        while self.position < position:
            if not self.read(min(position - self.position, CHUNK)):
                raise _cut_short()

    def read_at(self, start: int, size: int) -> bytes:
        here = start == self.position
        data = self.read(size) if here else part(self._file, start, size)
        if len(data) < size:
            raise _cut_short()
        return data


def part(file: Source, start: int, size: int) -> bytes:
    """Return bytes that have been passed already. The place in the file does not change."""
    if isinstance(file, Rereadable):
        return file.part(start, size)
    here = file.tell()
    file.seek(start)
    data = file.read(size)
    file.seek(here)
    return data


def members(tar: Bytes) -> Iterator[Member]:
    """Yield every member of a tar, in the order of the tar, up to the very end.

    After each member, the caller may read its data by `tar.read_at`. Raises TarDamage for a tar
    that is cut short, damaged, compressed or joined to another one, or has headers that no honest
    tar has.
    """
    begin = tar.position
    files: dict[str, tuple[int, int]] = {}  # where the data of each name lie
    common: dict[str, str] = {}  # records of global headers
    while (header := _header(tar, begin, common)) is not None:
        kind, name, target, size = header
        start = tar.position
        end = start if kind in WITHOUT_DATA else start - -size // BLOCK * BLOCK
        if kind == FILE:
            files[_plain(name)] = (start, size)
        elif kind == "hard link" and _plain(target) in files:
            kind = FILE
            start, size = files[_plain(name)] = files[_plain(target)]
        yield Member(name, kind, target, start, size)
        tar.skip_to(end)
    _check_end(tar)


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _header(tar: Bytes, begin: int, common: dict[str, str]) -> tuple[str, str, str, int] | None:
    """Return kind, name, target and bytes of the next member, or None at the end mark."""
    own: dict[str, str] = {}
    for _ in range(LONGEST_CHAIN + 1):
        at = tar.position
        block = tar.read(BLOCK)
        if not own and len(block) == BLOCK and not block.strip(b"\0"):
            return None
        info = _parse(block, at, begin)
        if info.type in EXTENDED:
            records = _pax_records(_extension(tar, info, at), at)
            if info.type == tarfile.XGLTYPE:
                _refuse_names_for_all(records, at)
                common.update(records)
            else:
                own |= records
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            own.setdefault("path", _text(_extension(tar, info, at).partition(b"\0")[0]))
        elif info.type == tarfile.GNUTYPE_LONGLINK:
            own.setdefault("linkpath", _text(_extension(tar, info, at).partition(b"\0")[0]))
        else:
            return _member(tar, info, own, block, at)
    raise TarDamage("unreadable", f"more than {LONGEST_CHAIN} extended headers at byte {at:,}")


def _parse(block: bytes, at: int, begin: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if at > begin:
            text = f"expected another member or the end-of-archive mark at byte {at}"
            raise TarDamage("damaged", f"{text}, found {error}") from None
        packed = [name for magic, name in COMPRESSED.items() if block.startswith(magic)]
        found = f"it is compressed by {packed[0]}: decompress it" if packed else str(error)
        raise TarDamage("unreadable", found) from None
    if info.size < 0:
        raise TarDamage("unreadable", f"a size of {info.size:,} bytes at byte {at:,}")
    return info


def _extension(tar: Bytes, info: tarfile.TarInfo, at: int) -> bytes:
    if info.size > LARGEST_HEADER:
        raise TarDamage("unreadable", f"a header of {info.size:,} bytes at byte {at:,}")
    start = tar.position
    data = tar.read(info.size)
    tar.skip_to(start - -info.size // BLOCK * BLOCK)
    if len(data) < info.size:
        raise _cut_short()
    return data


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """Parse records "LENGTH KEY=VALUE\\n" (POSIX.1-2001, pax interchange format)."""
    records, place = {}, 0
    while place < len(data) and data[place:].strip(b"\0"):
        found = re.compile(rb"(\d{1,7}) ([^=\0]{1,512})=").match(data, place)
        end = place + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarDamage("unreadable", f"a pax header that is none at byte {at:,}")
        records[_text(found[2])] = _text(data[found.end() : end - 1])
        place = end
    return records


def _refuse_names_for_all(records: dict[str, str], at: int) -> None:
    bad = [key for key in records if key in ("path", "linkpath", "size") or "sparse" in key]
    if bad:
        text = f"a global header that gives {bad[0]!r} to all members, at byte {at:,}"
        raise TarDamage("unreadable", text)


def _member(
    tar: Bytes, info: tarfile.TarInfo, own: dict[str, str], block: bytes, at: int
) -> tuple[str, str, str, int]:
    raw = block[156:157]  # tarfile makes a directory of a shortened name that ends in a slash
    name, target = own.get("path", info.name), own.get("linkpath", info.linkname)
    size = info.size
    if "size" in own:
        if not re.fullmatch(r"\d{1,18}", own["size"], re.ASCII):
            raise TarDamage("unreadable", f"a size of {own['size'][:20]!r} at byte {at:,}")
        size = int(own["size"])
    for text in (name, target):
        if len(text.encode("utf-8", "surrogateescape")) > LONGEST_NAME:
            raise TarDamage("unreadable", f"a name of {len(text):,} letters at byte {at:,}")
    kind = KINDS.get(raw, f"member of type {raw.decode('latin-1')!r}")
    if raw == tarfile.AREGTYPE and name.endswith("/"):  # as the tar of 1979 wrote directories
        kind = DIRECTORY
    elif kind == FILE and any(key.startswith("GNU.sparse") for key in own):
        name, kind = own.get("GNU.sparse.name", name), "sparse file"
    elif raw == tarfile.GNUTYPE_SPARSE:
        _skip_sparse_map(tar, block, at)
    return kind, name, target if "link" in kind else "", size


def _skip_sparse_map(tar: Bytes, block: bytes, at: int) -> None:
    """Skip the blocks of the old GNU format that continue a sparse map.

    Each block says whether another one follows.
    """
    more = block[482]
    for _ in range(LARGEST_HEADER // BLOCK):
        if not more:
            return
        block = tar.read(BLOCK)
        if len(block) < BLOCK:
            raise _cut_short()
        more = block[504]
    raise TarDamage("unreadable", f"a sparse map without end at byte {at:,}")


def _check_end(tar: Bytes) -> None:
    """Raise TarDamage unless only zeros follow the first block of zeros, and not too many."""
    mark = tar.position
    while chunk := tar.read(CHUNK):
        if chunk.strip(b"\0"):
            text = f"data follows the end-of-archive mark at byte {mark - BLOCK}"
            raise TarDamage("joined", f"{text}, as in tars joined with cat")
        if tar.position - mark > LARGEST_PADDING:
            text = f"more than {LARGEST_PADDING:,} bytes of zeros follow the end-of-archive mark"
            raise TarDamage("joined", text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _cut_short() -> TarDamage:
    return TarDamage("unreadable", "unexpected end of data")
