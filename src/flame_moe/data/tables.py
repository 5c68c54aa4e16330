"""Finding and reading tables of a release: CSV (plain or gzip) or Parquet, checked before a row is used.

Everything is lazy: a frame is scanned, narrowed to the columns that are asked for, and streamed.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from flame_moe.errors import DataError, nearest

SUFFIXES = (".csv.gz", ".csv", ".parquet")
TIME = "%Y-%m-%d %H:%M:%S"
_FAILED = re.compile(
    r"conversion from `(?P<from>\w+)` to `(?P<to>[^`]+)` failed in column '(?P<column>[^']*)'.*?: \[(?P<values>.*?)\]",
    re.S,
)
_DAMAGED = ("gzip", "deflate", "end of file", "decompress", "truncated", "corrupt")
_BOM = b"\xef\xbb\xbf"


def find_table(folder: Path, name: str) -> Path | None:
    """The file of a table, whatever its compression and the case of its name; None if it is not there.

    Args:
        folder: of the release.
        name: path below it without suffix, for example "hosp/patients".

    Raises:
        DataError: if the table is there more than once.
    """
    place = (folder / name).parent
    if not place.is_dir():
        return None
    wanted = {f"{Path(name).name.lower()}{suffix}" for suffix in SUFFIXES}
    found = sorted(path for path in place.iterdir() if path.name.lower() in wanted and path.is_file())
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"the table '{name}' is there twice: {names}", where=str(place), mend="Remove one.")
    return found[0] if found else None


def need_table(folder: Path, name: str, what: str) -> Path:
    """Like `find_table`, for a table without which nothing can be done.

    Args:
        folder: of the release.
        name: path below it without suffix.
        what: where to get it, for the message.

    Raises:
        DataError: if it is not there.
    """
    found = find_table(folder, name)
    if found is None:
        raise DataError(f"the table '{name}' is missing", where=str(folder), mend=f"It is part of {what}.")
    return found


def scan_table(
    path: Path,
    columns: Mapping[str, pl.DataType | type[pl.DataType]],
    *,
    optional: Sequence[str] = (),
    keep: Mapping[str, Collection[Any]] | None = None,
) -> pl.LazyFrame:
    """Columns of a table, by name and in this order, with their types.

    Text is stripped and empty text is null. Dates and times are asked for as `pl.Datetime` and written as
    `YYYY-MM-DD HH:MM:SS`. Column names are compared without case and surrounding blanks. A byte-order mark and Windows
    line ends are understood.

    Args:
        path: .csv, .csv.gz or .parquet.
        columns: name -> type of each column to read.
        optional: columns that may be missing; they are null then.
        keep: column -> values; rows with another value, or none, are left out before anything else is parsed, which is
            what makes a large table fast. Cells of rows that are left out are not checked.

    Raises:
        DataError: if the file is empty or damaged, no UTF-8, or lacks a column. Cells that are not of their type are
            found when the frame is collected: do it inside `explain`.
    """
    narrow = narrowing(path, columns, optional=optional, keep=keep)
    return narrow(pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema=False))


def narrowing(
    path: Path,
    columns: Mapping[str, pl.DataType | type[pl.DataType]],
    *,
    optional: Sequence[str] = (),
    keep: Mapping[str, Collection[Any]] | None = None,
) -> Callable[[pl.LazyFrame], pl.LazyFrame]:
    """From columns as the file has them, text if it is CSV, to what `scan_table` gives, which see.

    Raises:
        DataError: if the file is empty or damaged, no UTF-8, or lacks a column.
    """
    names = column_names(path)
    known = {name.strip().lower(): name for name in names}
    lacking = [name for name in columns if name.lower() not in known and name not in optional]
    if lacking:
        mend = nearest(lacking[0], (name.strip() for name in names))
        raise DataError(f"the column '{lacking[0]}' is missing", where=str(path), mend=mend)

    def narrow(frame: pl.LazyFrame) -> pl.LazyFrame:
        for name, values in (keep or {}).items():
            frame = frame.filter(_typed(pl.col(known[name.lower()]), columns[name], path).is_in(list(values)))
        picked = []
        for name, kind in columns.items():
            source = known.get(name.lower())
            column = pl.lit(None, dtype=pl.String).cast(kind) if source is None else _typed(pl.col(source), kind, path)
            picked.append(column.alias(name))
        return frame.select(picked)

    return narrow


@contextmanager
def explain(where: str) -> Iterator[None]:
    """Turn what the table reader says about broken files and cells into one sentence.

    Raises:
        DataError: with file, column and value where they are known.
    """
    try:
        yield
    except pl.exceptions.ColumnNotFoundError as error:
        raise DataError(f"a column is missing: {error}", where=where) from None
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError, EOFError, zlib.error) as error:
        text = str(error)
        failed = _FAILED.search(text)
        if failed:
            value, kind = failed["values"].split(",")[0].strip(' "'), _noun(failed["to"])
            what = f"'{value}' in column '{failed['column']}' is no {kind}"
            raise DataError(what, where=where, mend="Mend the cell, or leave it empty.") from None
        if any(word in text.lower() for word in _DAMAGED):
            raise DataError("the file is damaged or cut off", where=where, mend="Fetch it again.") from None
        if "utf-8" in text.lower() or "utf8" in text.lower():
            mend = "Convert it, for example with iconv -f WINDOWS-1252 -t UTF-8."
            raise DataError("the file is not UTF-8 text", where=where, mend=mend) from None
        raise DataError(f"the table cannot be read: {text.splitlines()[0]}", where=where) from None


def collect(frame: pl.LazyFrame, where: Path | str) -> pl.DataFrame:
    """Run a lazy frame by streaming; errors name `where`."""
    with explain(str(where)):
        return frame.collect(engine="streaming")


def column_names(path: Path) -> list[str]:
    """Names of the columns of a table, as written.

    Raises:
        DataError: if the file is empty, damaged at its start or no UTF-8 text.
    """
    if path.suffix == ".parquet":
        with explain(str(path)):
            return list(pl.read_parquet_schema(path))
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            line = file.readline(1 << 20)
    except (OSError, EOFError, zlib.error):
        raise DataError("the file is damaged or cut off", where=str(path), mend="Fetch it again.") from None
    if not line.strip():
        raise DataError("the file is empty", where=str(path), mend="Fetch it again.")
    try:
        text = line.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError:
        raise DataError("the file is not UTF-8 text", where=str(path), mend="Convert it to UTF-8.") from None
    header = text.rstrip("\r\n")
    if "\r" in header:
        mend = "Save it with the line ends of Windows or Unix."
        raise DataError("the lines end in carriage returns alone", where=str(path), mend=mend)
    # Polars leaves a doubled quote inside a name as it is, and columns are asked for by the name that it knows.
    return [name.replace('"', '""') for name in next(csv.reader([header]))]


def _typed(column: pl.Expr, kind: pl.DataType | type[pl.DataType], path: Path) -> pl.Expr:
    if path.suffix == ".parquet":
        return column.cast(kind)
    text = column.str.strip_chars()
    text = pl.when(text.str.len_bytes() > 0).then(text)
    if kind == pl.String:
        return text
    if kind == pl.Datetime:
        return text.str.to_datetime(TIME, time_unit="us")
    return text.cast(kind)


def _noun(kind: str) -> str:
    if "date" in kind:
        return "time (YYYY-MM-DD HH:MM:SS)"
    return "whole number" if kind[0] in "iu" else "number" if kind[0] == "f" else kind
