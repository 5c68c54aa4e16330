"""Files and folders that are whole or not there at all."""

from __future__ import annotations

import ctypes
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

    The names are exchanged in one step, and what was there before is removed only after that: whoever is killed, and
    whenever, leaves the old folder or the new one. Where a file system cannot exchange names (NFS), the old folder is
    `.NAME.aside` for a moment; `whole` finds it there, and the next replacement puts it back first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(path)
    work = _sibling(path)
    work.mkdir()
    try:
        yield work
        for file in sorted(work.rglob("*")):
            if file.is_file():
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        old = _put(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def whole(path: str | Path) -> Path:
    """Where the last whole version of a folder is: at its place, unless a replacement was killed half-way."""
    path = Path(path)
    aside = _aside(path)
    return aside if aside.exists() and not path.exists() else path


def restore_folder(path: str | Path) -> None:
    """Put a folder back to its place that a killed replacement has left aside; for its only writer."""
    aside = _aside(Path(path))
    if aside.exists():
        if Path(path).exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


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


def _put(work: Path, path: Path) -> Path:
    """Give `work` the name `path`; returns where what had that name is now."""
    if not path.exists():
        work.rename(path)
        return work
    if _exchange(work, path):
        return work
    path.rename(_aside(path))
    work.rename(path)
    return _aside(path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (renameat2 with RENAME_EXCHANGE); False where kernel or file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.aside")


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")
