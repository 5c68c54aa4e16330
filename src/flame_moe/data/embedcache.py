"""Vectors that were computed once: kept on the disk under the hash of what they were made from.

One folder per maker (the digest of its settings and of the model's files), in it shards of keys and vectors. A shard
is written under a temporary name and renamed, so what a crash leaves behind is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from flame_moe.errors import DataError
from flame_moe.files import write_bytes

Floats = NDArray[np.float32]
Make = Callable[[Sequence[int]], Floats]

SHARD = 512
KEY_BYTES = 16


def digest(*parts: bytes) -> bytes:
    """16 bytes that stand for the parts and their boundaries."""
    total = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()


def maker_name(settings: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """Name of the folder for what one model makes with these settings.

    Args:
        settings: JSON-ready, the version of the code that makes the vectors included.
        files: of the model, name -> SHA-256.
    """
    return digest(json.dumps([settings, files], sort_keys=True).encode()).hex()


def cached_rows(keys: Sequence[bytes], make: Make, width: int, folder: Path | None) -> Floats:
    """One vector per key; a key that occurs again, now or in the cache, is not computed again.

    Args:
        keys: n digests of 16 bytes.
        make: positions of keys -> their vectors (k, width); at most 512 at a time.
        width: of a vector.
        folder: of this maker; None keeps nothing.

    Raises:
        DataError: if a shard is damaged.
    """
    known: dict[bytes, Floats] = {}
    if folder is not None:
        for path in sorted(folder.glob("*.safetensors")):
            known.update(_read(path, width))
    first = {key: i for i, key in reversed(list(enumerate(keys))) if key not in known}
    for wanted in _slices(sorted(first.values())):
        rows = make(wanted)
        named = [keys[i] for i in wanted]
        known.update(zip(named, rows, strict=True))
        if folder is not None:
            packed = np.frombuffer(b"".join(named), dtype=np.uint8).reshape(len(named), KEY_BYTES)
            name = f"{digest(packed.tobytes()).hex()}.safetensors"
            write_bytes(folder / name, save({"keys": packed, "rows": np.ascontiguousarray(rows)}))
    return np.stack([known[key] for key in keys]) if keys else np.empty((0, width), dtype=np.float32)


def _slices(positions: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(positions), SHARD):
        yield positions[start : start + SHARD]


def _read(path: Path, width: int) -> Iterator[tuple[bytes, Floats]]:
    try:
        shard = load_file(path)
        keys, rows = shard["keys"], shard["rows"]
    except (SafetensorError, KeyError, OSError):
        keys, rows = np.empty((0, 0)), np.empty((1, 0))
    if keys.shape != (len(rows), KEY_BYTES) or rows.shape[1:] != (width,):
        mend = "Remove the file: its vectors are computed again."
        raise DataError("a file of cached vectors is damaged", where=str(path), mend=mend)
    return zip((key.tobytes() for key in keys), rows, strict=True)
