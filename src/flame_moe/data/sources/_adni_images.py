"""MRI and PET volumes: found by an index or by the folders in which ADNI delivers them, cut into blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.data.sources._adni_files import Row, day_of, roster
from flame_moe.data.tables import collect, scan_table
from flame_moe.data.work import Work
from flame_moe.errors import DataError

Size = tuple[int, int, int]
MODALITIES: dict[str, str] = {"mri": "mri", "mr": "mri", "t1": "mri", "pet": "pet", "pt": "pet"}
_DELIVERED = re.compile(r".*_(MR|PT)_.*\.nii(\.gz)?", re.I)
_DATED = re.compile(r"(\d{4}-\d{2}-\d{2})_")


def volumes(raw: Path, index: Path | None) -> dict[str, list[tuple[str, str, Path]]]:
    """Modality (mri, pet) -> (person, date, file) of every volume, whether or not the file is there.

    With an index the table's columns subject, date, modality and path say it, paths from the index's folder. Without,
    the folders do: ADNI/PERSON/DESCRIPTION/DATE_TIME/IMAGE/*.nii, `_MR_` or `_PT_` in the name of the file.

    Raises:
        DataError: if the index lacks a column or a cell, or names an unknown modality.
    """
    found: dict[str, list[tuple[str, str, Path]]] = {}
    if index is not None:
        columns = dict.fromkeys(("subject", "date", "modality", "path"), pl.String)
        for line, cells in enumerate(collect(scan_table(index, columns), index).iter_rows(), start=2):
            where = f"{index}, line {line}"
            if None in cells:
                raise DataError("a cell of the index is empty", where=where, mend="Fill it, or remove the line.")
            subject, day, kind, path = cells
            if kind.lower() not in MODALITIES:
                raise DataError(f"unknown modality '{kind}'", where=where, mend="Say MRI or PET.")
            found.setdefault(MODALITIES[kind.lower()], []).append((subject, day, index.parent / path))
        return found
    for path in sorted((raw / "ADNI").glob("*/*/*/*/*.nii*")):
        named, dated = _DELIVERED.fullmatch(path.name), _DATED.match(path.parts[-3])
        if named and dated:
            found.setdefault(MODALITIES[named[1].lower()], []).append((path.parts[-5], dated[1], path))
    return found


def volume_rows(
    listed: Mapping[str, list[tuple[str, str, Path]]], tally: Counter[str]
) -> dict[str, dict[int, list[Row]]]:
    """Modality -> person -> rows whose cell "path" is a file that is there.

    Raises:
        DataError: if volumes are listed and not one of the files is there, or a person or date cannot be read.
    """
    rows: dict[str, dict[int, list[Row]]] = {}
    for modality, entries in listed.items():
        of_person = rows.setdefault(modality, {})
        for subject, day, path in entries:
            if not path.is_file():
                tally[f"{modality}: volume listed but its file is not there, left out"] += 1
                continue
            rid = roster({"PTID": subject}, str(path))
            of_person.setdefault(rid, []).append(Row(rid, day_of(day, str(path)), "", {"path": str(path)}))
        if entries and not of_person:
            what = f"none of the {len(entries)} {modality} volumes listed is there"
            raise DataError(what, where=str(entries[0][2]), mend="Check the paths of the index.")
    return rows


def blocks(path: Path, size: Size, block: int, work: Work) -> NDArray[np.float32]:
    """A volume as its cubes, (number of cubes, block^3), along right, anterior, superior."""
    from flame_moe.data.imaging import read_volume

    return cut(read_volume(work.note(path), size), block)


def cut(volume: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Cubes of a volume whose sides are multiples of `block`.

    Example:
        >>> cut(np.arange(64, dtype=np.float32).reshape(4, 4, 4), 2).shape
        (8, 8)
    """
    x, y, z = (side // block for side in volume.shape)
    split = volume.reshape(x, block, y, block, z, block).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(split.reshape(x * y * z, block**3))
