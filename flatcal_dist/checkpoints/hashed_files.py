"""Files of a checkpoint, written durably and hashed on the way."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typing_extensions import Buffer


class HashedFile:
    """A new file written by plain system calls. Its bytes are counted and hashed."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        length = len(view)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:
            self.error = error
            raise
        self.size += length
        return length

    def flush(self) -> None:
        """Do nothing: nothing is held back. torch.save calls it."""


def write_hashed(path: Path, fill: Callable[[HashedFile], Any]) -> dict[str, Any]:
    """Write a file durably. Return its size and SHA-256."""
    file = HashedFile(path)
    try:
        fill(file)
        os.fsync(file.descriptor)
    except RuntimeError:
        if file.error:  # torch.save says of it only that a position is unexpected
            raise file.error from None
        raise
    finally:
        os.close(file.descriptor)
    return {"size": file.size, "sha256": file.sha256.hexdigest()}


def write_json_hashed(path: Path, value: Any) -> dict[str, Any]:
    """Write JSON durably. Return its size and SHA-256."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    return write_hashed(path, lambda file: file.write(text.encode()))
