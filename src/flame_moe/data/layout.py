"""Which files a sample store is made of; the writer creates them and the reader checks them by the same table.

    manifest.json                    what is inside: descriptions, funnel, splits, labels, statistics, files and hashes
    samples.arrow                    id, subject, split of every sample
    modalities/<name>/offsets.bin    (n + 1,) int64; sample i owns steps offsets[i]:offsets[i + 1], none = absent
    modalities/<name>/values.bin     (steps, features) float32; int32 for codes, uint8 for images
    modalities/<name>/times.bin      (steps,) float32, if the modality has times
    modalities/<name>/observed.bin   (steps, features) bool, if the modality has flags
    tasks/<name>/target.bin          (n, target_width) float32, NaN = no label

Arrays are raw little-endian numbers in C order; their shape and SHA-256 are in the manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flame_moe.data.columns import FileRecord
from flame_moe.errors import StoreError
from flame_moe.schema import Modality, Task

FORMAT = "flame-moe-store"
VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.arrow"


class Column(NamedTuple):
    """An array file.

    Attributes:
        dtype: little-endian numpy type.
        row: shape of one row.
        extra: rows beyond one per sample; None if rows are steps.
    """

    dtype: str
    row: tuple[int, ...]
    extra: int | None

    def fits(self, record: FileRecord, samples: int) -> bool:
        """Whether a file so described can be this column of a store of so many samples."""
        if record.dtype != self.dtype or record.shape[1:] != self.row:
            return False
        if self.extra is not None and record.shape[0] != samples + self.extra:
            return False
        return record.bytes == math.prod(record.shape) * np.dtype(self.dtype).itemsize


def layout(modalities: Iterable[Modality], tasks: Iterable[Task]) -> dict[str, Column]:
    """File name -> column, of a store with these descriptions."""
    files: dict[str, Column] = {}
    for m in modalities:
        folder = f"modalities/{m.name}"
        files[f"{folder}/offsets.bin"] = Column("<i8", (), 1)
        files[f"{folder}/values.bin"] = Column(m.storage, (m.features,), None)
        if m.has_times:
            files[f"{folder}/times.bin"] = Column("<f4", (), None)
        if m.has_observed:
            files[f"{folder}/observed.bin"] = Column("|b1", (m.features,), None)
    for t in tasks:
        files[f"tasks/{t.name}/target.bin"] = Column("<f4", (t.target_width,), 0)
    return files


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`.

    Raises:
        StoreError: if there is no store, or it is of another format or version.
    """
    file = path / MANIFEST
    mend = "Prepare one with `flame prepare`."
    if not file.is_file():
        raise StoreError("there is no sample store", where=str(path), mend=mend)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise StoreError("the manifest is not valid JSON", where=str(file), mend="Prepare the store again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError("this is not a sample store", where=str(path), mend=mend)
    if manifest.get("version") != VERSION:
        what = f"the store has version {manifest.get('version')}, this program reads version {VERSION}"
        raise StoreError(what, where=str(path), mend="Prepare the store again.")
    return manifest
