"""One writer at a time: a lock beside a folder, held by the operating system for as long as the process lives."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from flame_moe.errors import BusyError

logger = logging.getLogger(__name__)


@contextmanager
def writing(folder: str | Path, what: str) -> Iterator[None]:
    """Let nobody else write `folder` until the block ends; another who tries is told who does, and does not wait.

    The lock is `.NAME.lock` beside the folder, which is itself replaced now and then. It is held by `flock`, so a
    process that dies, however it does, holds it no longer; the file that it leaves behind is taken over, which the log
    says. Half-written folders that it left beside the folder are removed.

    Args:
        folder: what is written; need not exist, the folder around it must.
        what: what is done with it, for the others.

    Raises:
        BusyError: if another process, or another thread of this one, holds the lock.
    """
    folder = Path(folder)
    lock = folder.with_name(f".{folder.name}.lock")
    handle = _acquire(lock, folder)
    try:
        left = _holder(handle)
        if left:
            logger.warning("%s was left behind by %s, which has ended; it is taken over", lock, left)
        _say(handle, what)
        _clear(folder)
        yield
    finally:
        # Removed while it is still held: who opened it meanwhile sees that it is gone, and opens the new one.
        lock.unlink(missing_ok=True)
        os.close(handle)


def _acquire(lock: Path, folder: Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle) or "another process"
            os.close(handle)
            mend = "Wait until it is done. If it hangs, end it: the lock goes with it."
            raise BusyError(f"{holder} is at work on it", where=str(folder), mend=mend) from None
        try:
            if os.fstat(handle).st_ino == lock.stat().st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)


def _say(handle: int, what: str) -> None:
    who = {"process": os.getpid(), "host": socket.gethostname(), "what": what}
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({**who, "since": datetime.now(UTC).isoformat(timespec="seconds")}).encode(), 0)


def _holder(handle: int) -> str:
    """Who wrote the lock, in words; empty if nobody did yet."""
    try:
        said = json.loads(os.pread(handle, 4096, 0))
        return f"process {said['process']} on {said['host']} ({said['what']}, since {said['since']})"
    except (ValueError, KeyError, TypeError):
        return ""


def _clear(folder: Path) -> None:
    """Remove the unfinished siblings (`flame_moe.files.replacing_folder`) of a process that was killed."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{12}}")
    for entry in folder.parent.iterdir():
        if pattern.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
