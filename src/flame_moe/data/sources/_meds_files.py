"""Files of a MEDS data set: shards of events, labels, splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from flame_moe.data.slices import Each, Watch, read_slices
from flame_moe.data.sources._meds_mapping import ColumnNames
from flame_moe.data.tables import collect, column_names, scan_table
from flame_moe.data.work import Work
from flame_moe.errors import DataError, nearest

VALUES = ("boolean_value", "categorical_value", "float_value", "integer_value")
SPLITS = {"train": "train", "tuning": "val", "held_out": "test"}
TIME = pl.Datetime("us")


class Labels(NamedTuple):
    """The label files of one task; `column` is the one that holds values, None if none does."""

    task: str
    files: list[Path]
    column: str | None
    classes: tuple[str, ...]


def shards(raw: Path) -> list[Path]:
    """The event files: those below `data`, or beside each other in the folder itself.

    Raises:
        DataError: if there are none.
    """
    folder = raw / "data"
    found = sorted(folder.rglob("*.parquet")) if folder.is_dir() else sorted(raw.glob("*.parquet"))
    if not found:
        raise DataError("there are no event files", where=str(raw), mend="MEDS keeps them as data/**/*.parquet.")
    return found


def events(path: Path, columns: ColumnNames, *, numbers: bool) -> pl.LazyFrame:
    """subject (text), time, code and number of every event of a shard.

    Args:
        path: of the shard.
        columns: how they are called in the file.
        numbers: whether the numeric value is needed; if not, it may be missing.

    Raises:
        DataError: if a column is missing.
    """
    return _named(scan_table(path, _wanted(path, columns, numbers), optional=[columns.numeric_value]), columns)


def event_slices(
    path: Path, columns: ColumnNames, each: Each, watch: Watch, *, numbers: bool
) -> Iterator[pl.DataFrame]:
    """`events` slice by slice through `each`; see `flame_moe.data.slices`."""
    wanted, optional = _wanted(path, columns, numbers), [columns.numeric_value]
    return read_slices(path, wanted, lambda rows: each(_named(rows, columns)), watch, optional=optional)


def _wanted(path: Path, columns: ColumnNames, numbers: bool) -> dict[str, Any]:
    """The columns to read, with their types."""
    wanted: dict[str, Any] = {columns.subject_id: pl.String, columns.time: TIME, columns.code: pl.String}
    names = {name.lower() for name in column_names(path)}
    for name in (*wanted, *((columns.numeric_value,) if numbers else ())):
        if name.lower() not in names:
            mend = f"{nearest(name, names)} A mapping file names other columns under [columns]."
            raise DataError(f"the column '{name}' is missing", where=str(path), mend=mend)
    return {**wanted, columns.numeric_value: pl.Float64}


def _named(rows: pl.LazyFrame, columns: ColumnNames) -> pl.LazyFrame:
    return rows.select(
        subject=pl.col(columns.subject_id),
        time=pl.col(columns.time),
        code=pl.col(columns.code),
        number=pl.col(columns.numeric_value),
    )


def find_labels(folder: Path, tasks: Sequence[str] | None) -> list[Labels]:
    """Label files by task, in alphabetical order: folders `TASK/**/*.parquet` or files `TASK.parquet`.

    Raises:
        DataError: if a task that is asked for is not there, or two become the same name.
    """
    found: dict[str, list[Path]] = {}
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    for place in places:
        files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place] if place.suffix == ".parquet" else []
        if files:
            name = re.sub(r"[^a-z0-9_]+", "_", place.stem.lower() if place.is_file() else place.name.lower())
            name = name if name[0].isalpha() else f"t{name}"
            if name in found:
                raise DataError(f"two label folders are the task '{name}'", where=str(folder), mend="Rename one.")
            found[name] = files
    for name in tasks or ():
        if name not in found:
            raise DataError(f"there are no labels of the task '{name}'", where=str(folder), mend=nearest(name, found))
    return [_labels(name, files) for name, files in found.items() if tasks is None or name in tasks]


def _labels(task: str, files: list[Path]) -> Labels:
    frame = read_labels(files)
    column = next((name for name in VALUES if frame[name].null_count() < len(frame)), None)
    classes: tuple[str, ...] = ()
    if column == "categorical_value":
        classes = tuple(sorted(frame[column].drop_nulls().unique().to_list()))
    return Labels(task, files, column, classes)


def read_labels(files: Sequence[Path]) -> pl.DataFrame:
    """subject, time and the value columns of label files.

    Raises:
        DataError: if subject_id or prediction_time is missing or empty.
    """
    kinds: dict[str, Any] = {"subject_id": pl.String, "prediction_time": TIME, "boolean_value": pl.Boolean}
    more: dict[str, Any] = {"categorical_value": pl.String, "float_value": pl.Float64, "integer_value": pl.Float64}
    frames = [collect(scan_table(file, {**kinds, **more}, optional=VALUES), file) for file in files]
    for file, frame in zip(files, frames, strict=True):
        for name in ("subject_id", "prediction_time"):
            if frame[name].null_count():
                raise DataError(f"a label has no {name}", where=str(file), mend="Fill it, or remove the row.")
    return pl.concat(frames).rename({"subject_id": "subject", "prediction_time": "time"})


def read_splits(raw: Path, work: Work) -> dict[str, str] | None:
    """Subject -> train, val or test as the data set says; None if it does not.

    Raises:
        DataError: if a split has an unknown name, or a subject two.
    """
    path = raw / "metadata" / "subject_splits.parquet"
    if not path.is_file():
        return None
    frame = collect(scan_table(work.note(path), {"subject_id": pl.String, "split": pl.String}), path)
    found: dict[str, str] = {}
    for subject, name in frame.iter_rows():
        if name not in SPLITS:
            raise DataError(f"unknown split '{name}'", where=str(path), mend=nearest(str(name), SPLITS))
        if found.setdefault(subject, SPLITS[name]) != SPLITS[name]:
            raise DataError(f"subject {subject} is in two splits", where=str(path), mend="Give it one.")
    return found
