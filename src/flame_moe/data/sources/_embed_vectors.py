"""Vectors that a vision model made of the pictures of EMBED before."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.tables import collect
from flame_moe.errors import DataError, nearest


class Vectors:
    """Vectors that some model made of the pictures, held in memory.

    Args:
        path: `.npz` with arrays `keys` (n,) and `vectors` (n, width) or (n, steps, width), or `.parquet` with columns
            `key` and `vector`, a list of `width` numbers. A key is the path of the table, its last part, or that
            without its suffix (of EMBED's DICOM files: the SOP instance UID).
        width: of a vector.

    Raises:
        DataError: if the file cannot be read, names a key twice, or the width is another.
    """

    def __init__(self, path: Path, width: int) -> None:
        keys, vectors = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
        if vectors.ndim not in (2, 3) or vectors.dtype.kind != "f" or len(vectors) != len(keys):
            what = f"vectors are {vectors.dtype} of shape {vectors.shape} for {len(keys)} keys"
            raise DataError(what, where=str(path), mend="Give one vector of floating-point numbers per key.")
        if vectors.shape[-1] != width:
            what = f"vectors have {vectors.shape[-1]} numbers, not {width}"
            raise DataError(what, where=str(path), mend=f"Set embedding_width = {vectors.shape[-1]}, or mend the file.")
        self.rows = {str(key): i for i, key in enumerate(keys)}
        if len(self.rows) != len(keys):
            raise DataError("a key is there twice", where=str(path), mend="Give one vector per picture.")
        self.vectors = vectors

    def first(self, names: Iterable[str], side: str, tally: Counter[str]) -> Observation | None:
        """The vectors of the first of these pictures that has any, or None; `tally` counts those that have none."""
        for name in names:
            last = PurePosixPath(name.replace("\\", "/"))
            row = next((self.rows[key] for key in (name, last.name, last.stem) if key in self.rows), None)
            if row is not None:
                return Observation(np.asarray(self.vectors[row], dtype=np.float32).reshape(-1, self.vectors.shape[-1]))
            tally["picture without a vector, view left out"] += 1
        return None


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with np.load(path) as arrays:
            lacking = [name for name in ("keys", "vectors") if name not in arrays]
            if lacking:
                raise DataError(
                    f"the array '{lacking[0]}' is missing", where=str(path), mend=nearest(lacking[0], arrays)
                )
            return arrays["keys"], arrays["vectors"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = f"the vectors cannot be read ({type(error).__name__})"
        raise DataError(what, where=str(path), mend="Give .npz with arrays keys and vectors, or .parquet.") from None


def _read_parquet(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    if not path.is_file() or path.suffix != ".parquet":
        raise DataError("there are no such vectors", where=str(path), mend="Give a file .npz or .parquet.")
    frame = collect(pl.scan_parquet(path).select("key", "vector"), path)
    widths = frame["vector"].list.len().unique().to_list() if frame["vector"].dtype == pl.List else []
    if len(widths) > 1:
        raise DataError(f"vectors have different widths: {sorted(widths)}", where=str(path), mend="Mend the file.")
    return frame["key"].to_numpy(), np.array(frame["vector"].to_list(), dtype=np.float32)
