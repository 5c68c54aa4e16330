"""Dates and times of a folder: from what is written to hours since the origin of a sample."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.errors import DataError

WRITTEN = r"^\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d([.,]\d{1,9})?)?)?\s?(Z|[+-]\d\d:?\d\d)?$"
_BASE = r"^(\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:[.,]\d{1,9})?)?)?)"
_ZONE = r"(Z|[+-]\d\d:?\d\d)$"
_HOUR = 3_600_000_000


class Origins(NamedTuple):
    """The moment of each sample that counts as time 0.

    Attributes:
        column: of the table of samples.
        known: id -> moment; a sample whose cell is empty is not there.
        zoned: whether the moments are written with a time zone; they are in UTC then.
    """

    column: str
    known: Mapping[str, datetime]
    zoned: bool


def moments(column: str, kind: pl.DataType | type[pl.DataType]) -> list[pl.Expr]:
    """Columns `_moment`, without a time zone, `_zoned`, whether it was written with one (it is in UTC then), and
    `_written`, the text of a cell that is no time.

    Text is read as ISO 8601 writes it, to the day, minute, second or a fraction of it.

    Args:
        column: that holds them.
        kind: its type in the file.
    """
    cell = pl.col(column)
    if kind in (pl.Datetime, pl.Date):
        zone = getattr(kind, "time_zone", None)
        moment = cell.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if zone else cell.cast(pl.Datetime("us"))
        nothing = pl.lit(None, dtype=pl.String)
        return [
            moment.cast(pl.Datetime("us")).alias("_moment"),
            pl.lit(zone is not None).alias("_zoned"),
            nothing.alias("_written"),
        ]
    text = cell.cast(pl.String)
    base = text.str.extract(_BASE).str.replace("T", " ").str.replace(",", ".")
    length = base.str.len_bytes()
    whole = pl.when(length == 10).then(base + " 00:00:00").when(length == 16).then(base + ":00").otherwise(base)
    zone = text.str.extract(_ZONE)
    sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
    digits = zone.str.replace("Z", "+0000").str.replace_all(r"[+:-]", "")
    minutes = digits.str.slice(0, 2).cast(pl.Int64) * 60 + digits.str.slice(2, 2).cast(pl.Int64)
    shift = pl.duration(minutes=sign * minutes.fill_null(0))
    parsed = whole.str.to_datetime("%Y-%m-%d %H:%M:%S%.f", strict=False, time_unit="us") - shift
    moment = pl.when(text.str.contains(WRITTEN)).then(parsed)
    wrong = text.is_not_null() & moment.is_null()
    return [moment.alias("_moment"), zone.is_not_null().alias("_zoned"), pl.when(wrong).then(text).alias("_written")]


def checked(frame: pl.DataFrame, column: str, where: str) -> bool | None:
    """Whether the moments of a frame have time zones; None if there is no moment.

    Raises:
        DataError: for a cell that is no time, or if some have a zone and others not.
    """
    wrong = frame["_written"].drop_nulls()
    if len(wrong):
        what = f"'{wrong[0]}' in column '{column}' is no time (YYYY-MM-DD HH:MM:SS)"
        raise DataError(what, where=where, mend="Mend the cell, or leave it empty.")
    zoned = frame.filter(pl.col("_moment").is_not_null())["_zoned"].unique().to_list()
    if len(zoned) > 1:
        what = f"some times in column '{column}' have a time zone and others not"
        raise DataError(what, where=where, mend="Write all of them with one, or none.")
    return zoned[0] if zoned else None


def hours_since(frame: pl.DataFrame, origins: Origins, column: str, where: str) -> pl.Series:
    """Hours from the origins of the samples `_id` to `_moment`, null where the moment is missing.

    Raises:
        DataError: for a cell that is no time, a sample without an origin, or time zones here and none there.
    """
    zoned = checked(frame, column, where)
    if zoned is not None and origins.known and zoned != origins.zoned:
        with_zone, without = (column, origins.column) if zoned else (origins.column, column)
        what = f"times in column '{with_zone}' have a time zone, those in column '{without}' have none"
        raise DataError(what, where=where, mend="Write all of them with one, or none.")
    lacking = [id for id in frame["_id"].unique(maintain_order=True) if id not in origins.known]
    if lacking:
        what = f"sample '{lacking[0]}' has no time in column '{origins.column}', from which its times are counted"
        raise DataError(what, where=where, mend="Fill the cell, or remove the sample's rows.")
    start = frame["_id"].replace_strict(dict(origins.known), return_dtype=pl.Datetime("us"))
    return (frame["_moment"] - start).dt.total_microseconds() / _HOUR


def array_hours(times: NDArray[np.generic], origin: datetime, where: str) -> NDArray[np.float64]:
    """Hours from the origin to the moments of an array.

    Raises:
        DataError: if they are no datetime64, or one is missing.
    """
    if times.dtype.kind != "M" or np.isnat(times).any():
        what = "a time is missing" if times.dtype.kind == "M" else f"the times are {times.dtype}, not datetime64"
        raise DataError(what, where=where, mend="Write them as numpy datetime64, or set another unit.")
    return (times.astype("datetime64[us]") - np.datetime64(origin, "us")).astype(np.int64) / _HOUR
