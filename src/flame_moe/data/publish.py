"""A folder appears whole or not at all: built under a temporary sibling name, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from flame_moe.data.layout import FORMAT, MANIFEST
from flame_moe.errors import StoreError
from flame_moe.files import sync_folder


def sibling(path: Path) -> Path:
    """A hidden name beside `path` that nothing else uses."""
    return path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}"


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse to write where something is, unless it is a sample store (of any version) that may be replaced.

    Raises:
        StoreError: if something is there.
    """
    if not path.exists():
        return
    if not overwrite:
        raise StoreError("there is already something", where=str(path), mend="Give another place, or overwrite it.")
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        mend = "Only a sample store is overwritten: give another place, or remove it yourself."
        raise StoreError("what is there is not a sample store", where=str(path), mend=mend)


def publish(built: Path, path: Path) -> None:
    """Give the finished folder its name; what was there before is removed only after that."""
    old = sibling(path)
    if path.exists():
        os.rename(path, old)
    os.rename(built, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)
