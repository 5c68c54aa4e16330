"""Raw array files: appended to while a store is written, memory-mapped when it is read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_moe.errors import StoreError


class FileRecord(NamedTuple):
    """What the manifest says about one file; `dtype` and `shape` are empty for files that are no array."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    def plain(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "shape": list(self.shape), "bytes": self.bytes, "sha256": self.sha256}

    @classmethod
    def parse(cls, data: Any) -> FileRecord:
        return cls(str(data["dtype"]), tuple(int(n) for n in data["shape"]), int(data["bytes"]), str(data["sha256"]))


class ColumnFile:
    """An array file that grows row by row, hashed on the way.

    Args:
        path: file to create.
        dtype: little-endian numpy type, for example "<f4".
        row: shape of one row; () for a plain vector.
    """

    def __init__(self, path: Path, dtype: str, row: tuple[int, ...] = ()) -> None:
        self.path, self.dtype, self.row, self.rows = path, np.dtype(dtype), row, 0
        self._hash = hashlib.sha256()
        self._bytes = 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb", buffering=1 << 18)

    def append(self, rows: NDArray[Any]) -> None:
        """Write rows of shape (k, *row)."""
        data = np.ascontiguousarray(rows, dtype=self.dtype).tobytes()
        with writing(self.path):
            self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)
        self.rows += len(rows)

    def abandon(self) -> None:
        """Release the file; what was buffered may be lost, and a full disk no longer matters."""
        with suppress(OSError):
            self._file.close()

    def finish(self) -> FileRecord:
        """Bring everything to the disk and describe the file."""
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return FileRecord(self.dtype.str, (self.rows, *self.row), self._bytes, self._hash.hexdigest())


def map_array(path: Path, record: FileRecord) -> NDArray[Any]:
    """The array of a file, read-only and read from the disk only where it is touched."""
    if record.bytes == 0:
        return np.empty(record.shape, dtype=record.dtype)
    mapped = np.memmap(path, dtype=record.dtype, mode="r", shape=record.shape)
    return mapped.view(np.ndarray)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        StoreError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"a file cannot be read: {error.strerror}", where=str(path)) from None


def write_synced(path: Path, data: bytes) -> FileRecord:
    """Write a whole file and bring it to the disk."""
    with writing(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord("", (), len(data), hashlib.sha256(data).hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a full disk or a missing permission in one sentence.

    Raises:
        StoreError: instead of the OSError.
    """
    try:
        yield
    except OSError as error:
        mend = "Free some space, or write to another place."
        raise StoreError(f"it cannot be written: {error.strerror}", where=str(path), mend=mend) from None
