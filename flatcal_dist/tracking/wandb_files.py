"""W&B's transaction logs, which it writes offline and online: `RUN/wandb/*run-*/run-*.wandb`.

A log is a header of 7 bytes and then LevelDB's log format. Blocks of 32 KiB hold records of a
checksum (4 bytes), a length (2), a type (1: whole; 2, 3, 4: first, middle and last part) and data.
The data is a protobuf `Record` of W&B.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatcal_dist.files import read_bytes

HEADER, BLOCK = struct.pack("<4sHB", b":W&B", 0xBEE1, 0), 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def segments(run: Path) -> list[Path]:
    """Return the logs of a run directory, oldest first. There is one for each start of the run."""
    found = (run / "wandb").glob("*run-*/run-*.wandb")
    return sorted(found, key=lambda file: file.parent.name.split("run-", 1)[1])


def read_records(file: Path) -> Iterator[Any]:
    """Yield the records of a log, up to where it was cut off or is damaged."""
    from google.protobuf.message import DecodeError

    # Protobuf makes its classes at import.
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for payload in _payloads(read_bytes(file, limit=None)):
        record = Record()
        try:
            record.ParseFromString(payload)
        except DecodeError:
            return
        yield record


def history(file: Path) -> list[dict[str, Any]]:
    """Return the rows that were logged. Each has a key `_step`."""
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json)
         for item in record.history.item}
        for record in read_records(file)
        if record.HasField("history")
    ]  # fmt: skip


def _payloads(log: bytes) -> Iterator[bytes]:
    if log[: len(HEADER)] != HEADER:
        return
    position, parts = len(HEADER), b""
    while position + 7 <= len(log):
        if BLOCK - position % BLOCK < 7:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", log, position)
        data = log[position + 7 : position + 7 + length]
        if len(data) < length or zlib.crc32(log[position + 6 : position + 7] + data) != checksum:
            return
        position += 7 + length
        parts = data if kind in (WHOLE, FIRST) else parts + data
        if kind in (WHOLE, LAST):
            yield parts
