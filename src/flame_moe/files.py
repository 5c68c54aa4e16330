"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically (temporary sibling, flush, fsync, rename)."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically (temporary sibling, flush, fsync, rename)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = _sibling(path)
    try:
        with sibling.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return path


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Fill a hidden sibling folder that takes the name `path` only when the block ends well.

    What was there before is removed only after that; a crash leaves the old folder or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work, old = _sibling(path), _sibling(path)
    work.mkdir()
    try:
        yield work
        for file in sorted(work.rglob("*")):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        work.rename(path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path: str | Path, watch: Callable[[int], None] | None = None) -> str:
    """Hex digest of a file, read in pieces; `watch` is told how many bytes have been read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if watch is not None:
                watch(file.tell())
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Bring a rename in this folder itself to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
