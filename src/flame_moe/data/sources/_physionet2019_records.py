"""Finding and reading the stays of the PhysioNet 2019 set: a text file per stay, or a Parquet table per hospital."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.data.sources._physionet2019_tables import COLUMNS, HOUR, LABEL
from flame_moe.data.tables import collect, column_names, scan_table
from flame_moe.errors import DataError, nearest

SETS: tuple[str, ...] = ("a", "b")
PATIENT = "patient"
_WANTED = "Give the folder that holds training_setA or training_setB (folders of .psv files, or .parquet)."


class Record(NamedTuple):
    """One stay as published.

    Attributes:
        id: of the patient.
        where: file, for messages.
        values: (hours, columns) in the order of `COLUMNS`; NaN: not given.
        septic: (hours,) the published label, or None where the files have none.
    """

    id: str
    where: str
    values: NDArray[np.float64]
    septic: NDArray[np.bool_] | None


def locate(raw: Path, sets: Sequence[str] | None) -> list[Path]:
    """Folders of .psv files and Parquet tables to read.

    Raises:
        DataError: if there is none, or a set that is asked for by name is not there.
    """
    if raw.is_file() and raw.suffix == ".parquet":
        return [raw]
    if any(raw.glob("*.psv")):
        return [raw]
    found = []
    for name in sets or SETS:
        stem = f"training_set{name.upper()}"
        candidates = [raw / stem, raw / "training" / stem, raw / f"{stem}.parquet"]
        there = [path for path in candidates if path.exists()]
        if len(there) > 1:
            what = f"the set {name} is there twice: {there[0].name} and {there[1].name}"
            raise DataError(what, where=str(raw), mend="Remove one.")
        if not there and sets:
            raise DataError(f"the set {name} is missing", where=str(raw), mend=_WANTED)
        found += there
    if not found:
        raise DataError("there are no records of the PhysioNet 2019 set", where=str(raw), mend=_WANTED)
    return found


def read_records(place: Path) -> Iterator[Record]:
    """The stays of one hospital, hours in order.

    Raises:
        DataError: with file and line, if a column is missing, a cell is no number, or hours repeat.
    """
    stays = _from_table(place) if place.is_file() else _from_files(place)
    for record in stays:
        hours = record.values[:, COLUMNS.index(HOUR)]
        if np.isnan(hours).any() or (hours < 1).any():
            raise DataError(f"{HOUR} is empty or below 1", where=record.where, mend="Mend the row.")
        if (np.diff(hours) <= 0).any():
            at = hours[1:][np.diff(hours) <= 0][0]
            raise DataError(f"{HOUR} {at:g} does not go on from the hour before", where=record.where)
        yield record


def _from_files(folder: Path) -> Iterator[Record]:
    files = sorted(folder.glob("*.psv"))
    if not files:
        raise DataError("the folder holds no .psv file", where=str(folder), mend=_WANTED)
    for file in files:
        yield _parse(file)


def _parse(file: Path) -> Record:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError("the file is not UTF-8 text", where=str(file), mend="Fetch it again.") from None
    if len(lines) < 2:
        raise DataError("the file holds no hour", where=str(file), mend="Fetch it again, or remove it.")
    head = [name.strip() for name in lines[0].split("|")]
    known = {name.lower(): i for i, name in enumerate(head)}
    _refuse_lacking(head, str(file))
    rows = [line.split("|") for line in lines[1:]]
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            what = f"{len(row)} cells where the header has {len(head)}"
            raise DataError(what, where=f"{file}: line {number}", mend="Fetch the file again.")
    try:
        cells = np.array(rows, dtype=np.float64)
    except ValueError:
        raise _no_number(rows, head, file) from None
    at = known.get(LABEL.lower())
    septic = None if at is None else _flags(cells[:, at], str(file))
    return Record(file.stem, str(file), cells[:, [known[name.lower()] for name in COLUMNS]], septic)


def _no_number(rows: list[list[str]], head: list[str], file: Path) -> DataError:
    for number, row in enumerate(rows, 2):
        for name, cell in zip(head, row, strict=True):
            try:
                float(cell)
            except ValueError:
                what = f"'{cell}' in column '{name}' is no number"
                return DataError(what, where=f"{file}: line {number}", mend="Write NaN for what is missing.")
    return DataError("a cell is no number", where=str(file))


def _from_table(path: Path) -> Iterator[Record]:
    head = column_names(path)
    _refuse_lacking(head, str(path), PATIENT)
    labelled = LABEL.lower() in {name.lower() for name in head}
    types = {PATIENT: pl.String, **dict.fromkeys((*COLUMNS, *((LABEL,) if labelled else ())), pl.Float64)}
    frame = collect(scan_table(path, types).sort(PATIENT, HOUR, maintain_order=True), path)
    names = frame[PATIENT]
    if names.null_count():
        raise DataError("a row has no patient", where=str(path), mend="Fill the column 'patient', or remove the row.")
    ends = [*np.flatnonzero((names != names.shift(1)).fill_null(True).to_numpy()).tolist(), len(frame)]
    for start, end in pairwise(ends):
        part = frame.slice(start, end - start)
        where = f"{path}: patient {names[start]}"
        septic = _flags(part[LABEL].to_numpy(), where) if labelled else None
        # What is null in the table is NaN as an array, like the NaN of the text files.
        yield Record(str(names[start]), where, part.select(COLUMNS).to_numpy(), septic)


def _refuse_lacking(head: Sequence[str], where: str, *more: str) -> None:
    known = {name.strip().lower() for name in head}
    for name in (*COLUMNS, *more):
        if name.lower() not in known:
            raise DataError(f"the column '{name}' is missing", where=where, mend=nearest(name, head))


def _flags(values: NDArray[np.float64], where: str) -> NDArray[np.bool_]:
    if not np.isin(values, (0.0, 1.0)).all():
        raise DataError(f"{LABEL} is neither 0 nor 1", where=where, mend="Mend the row, or leave the column out.")
    return values == 1.0
