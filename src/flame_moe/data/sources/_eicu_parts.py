"""One modality of eICU-CRD as a part: the rows of its tables, and how they are cleaned for a block of stays.

The large tables are narrowed to the window of every stay by streaming, to a file. Stays are then read from it in
blocks, so memory does not grow with the database.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.slices import read_slices
from flame_moe.data.sources._eicu_options import MINUTE, STAY, EicuOptions, Release, Tally, known_at
from flame_moe.data.sources._eicu_tables import RULES, Channel
from flame_moe.data.work import Work
from flame_moe.schema import Modality

VERSION = 1
"""Of the code that narrows tables: steps made by another version are made anew."""

Clean = Callable[[pl.DataFrame, Tally], pl.DataFrame]


class Reading(NamedTuple):
    """One reading of the release: where its tables are, how they are read, what keeps steps, and the stays kept."""

    place: Release
    options: EicuOptions
    work: Work
    stays: pl.DataFrame


class Part(NamedTuple):
    """A modality and where its values come from.

    Attributes:
        modality: its description.
        rows: rows of all stays, with a column `stay`.
        clean: (rows of some stays, tally) -> columns stay, minute (where the modality has times) and one per feature,
            sorted; null where not observed.
    """

    modality: Modality
    rows: pl.LazyFrame
    clean: Clean


def series(name: str, channels: Sequence[Channel], description: str) -> Modality:
    """Description of a series of these channels."""
    return _measured("series", name, channels, description)


def table(name: str, channels: Sequence[Channel], description: str) -> Modality:
    """Description of a table of these columns."""
    return _measured("table", name, channels, description)


def window(
    reading: Reading,
    source: str,
    columns: Mapping[str, Any],
    offset: str,
    entered: str | None = None,
    *,
    early: bool = False,
    optional: Sequence[str] = (),
) -> pl.LazyFrame:
    """Rows of a table that are about the window and were known by the end of it, streamed to a file once.

    Args:
        reading: the release and its window.
        source: name of the table, which is there.
        columns: name -> type of what is read beside the number of the stay and the offsets.
        offset: column with the minute that a row is about.
        entered: column with the minute at which it was entered, where there is one.
        early: keep rows from before the window too.
        optional: columns that may be missing.

    Returns:
        Columns stay, minute, known (minute at which the row was known) and those asked for.
    """
    place, options, work, _ = reading
    path = place.need(source)
    offsets = [offset] if entered is None else [offset, entered]
    wanted = {"patientunitstayid": pl.Int64, **dict.fromkeys(offsets, pl.Int64), **columns}

    def each(frame: pl.LazyFrame) -> pl.LazyFrame:
        kept = known_at(offset, entered) <= options.end
        if not early:
            kept &= pl.col(offset) >= options.begin
        frame = frame.filter(kept & pl.col("patientunitstayid").is_not_null() & pl.col(offset).is_not_null())
        known = known_at(offset, entered).alias("known")
        return frame.select(
            pl.col("patientunitstayid").alias(STAY), pl.col(offset).alias(MINUTE), known, *columns.keys()
        )

    begin = None if early else options.begin
    settings = {"version": VERSION, "end": options.end, "begin": begin, "columns": sorted(wanted)}
    return work.step(source, [path], settings, partial(read_slices, path, wanted, each, optional=optional))


def plausible(frame: pl.DataFrame, channels: Sequence[Channel], tally: Tally, what: str) -> pl.DataFrame:
    """Wide values in their unit: known slips of unit converted, implausible values set to missing, both counted."""
    for channel in channels:
        value = pl.col(channel.name)
        for rule in (rule for rule in RULES if rule.channel == channel.name):
            slip = value.is_between(rule.low, rule.high)
            tally[rule.text] += int(frame.select(slip.sum()).item())
            frame = frame.with_columns(
                pl.when(slip).then(value * rule.factor + rule.shift).otherwise(value).alias(channel.name)
            )
        fits = value.is_between(channel.low, channel.high)
        wrong = int(frame.select((~fits).sum()).item())
        if wrong:
            limits = f"{channel.low:g} to {channel.high:g} {channel.unit}".rstrip()
            tally[f"{what} {channel.name} outside {limits}, set to missing"] += wrong
        frame = frame.with_columns(pl.when(fits).then(value).alias(channel.name))
    return frame


def steps(frame: pl.DataFrame, channels: Sequence[Channel]) -> pl.DataFrame:
    """Columns stay, minute and channels, without rows in which nothing is observed, sorted."""
    names = [channel.name for channel in channels]
    some = pl.any_horizontal(pl.col(name).is_not_null() for name in names)
    return frame.filter(some).select(STAY, MINUTE, *names).sort(STAY, MINUTE)


def observations(frame: pl.DataFrame, modality: Modality, options: EicuOptions) -> Iterator[tuple[int, Observation]]:
    """(stay, observation) of every stay in a cleaned, sorted frame."""
    if frame.is_empty():
        return
    stays = frame[STAY].to_numpy()
    starts = np.flatnonzero(np.r_[True, stays[1:] != stays[:-1]])
    columns = [name for name in frame.columns if name not in (STAY, MINUTE)]
    values = _values(frame, columns, modality)
    observed = ~np.isnan(values) if modality.has_observed else None
    times = _times(frame[MINUTE].to_numpy(), options) if modality.has_times else None
    for start, end in zip(starts, [*starts[1:], len(stays)], strict=True):
        rows = slice(start, end)
        flags = None if observed is None else observed[rows]
        part = values[rows] if flags is None else np.where(flags, values[rows], np.float32(0))
        yield int(stays[start]), Observation(part, None if times is None else times[rows], flags)


def _measured(kind: str, name: str, channels: Sequence[Channel], description: str) -> Modality:
    return Modality.parse(
        {
            "name": name,
            "kind": kind,
            "features": len(channels),
            "channels": tuple(channel.name for channel in channels),
            "units": tuple(channel.unit for channel in channels),
            "scaling": "quantile",
            "description": description,
        },
        where=f"modality {name}",
    )


def _values(frame: pl.DataFrame, columns: list[str], modality: Modality) -> NDArray[Any]:
    kind = np.dtype(modality.storage)
    if modality.kind in ("timed", "tokens"):
        return np.asarray(frame[columns[0]].to_numpy(), dtype=kind)
    if not columns:
        return np.empty((len(frame), 0), dtype=kind)
    return np.stack([frame[column].to_numpy() for column in columns], axis=1).astype(kind)


def _times(minutes: NDArray[np.int64], options: EicuOptions) -> NDArray[np.float32]:
    """Parts of the window, 0 at its beginning and 1 at the prediction; what is older is at 0."""
    length = options.end - options.begin
    return (np.clip(minutes - options.begin, 0, None) / length).astype(np.float32)
