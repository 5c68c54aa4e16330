"""Modalities of a folder that lie in tables: series, tables, vectors, codes, texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.codes import code_id
from flame_moe.data.sources._folder_place import (
    Get,
    Place,
    existing,
    observation,
    read_table,
    refuse_empty_ids,
    refuse_repeated_ids,
    slices,
    timed_rows,
)
from flame_moe.data.sources._folder_rules import CodesRule, SeriesRule, TableRule, TextRule, VectorsRule
from flame_moe.data.tables import collect
from flame_moe.data.text import read_texts
from flame_moe.errors import DataError, nearest


def series(rule: SeriesRule, place: Place) -> Get:
    """Wide or long, at irregular times; a row or event without a value is nothing."""
    frame = timed_rows(rule, place, dict.fromkeys(rule.columns, pl.Float64)) if rule.columns else _widened(rule, place)
    found, times = slices(frame["_id"]), _times(frame)
    values = frame.select(rule.names).to_numpy().astype(np.float64)
    return lambda id: observation(values[found[id]], times[found[id]]) if id in found else None


def _widened(rule: SeriesRule, place: Place) -> pl.DataFrame:
    """A row per sample and time with a column per channel; values of one channel at one time become their mean."""
    channel, value = str(rule.channel), str(rule.value)
    frame = timed_rows(rule, place, {channel: pl.String, value: pl.Float64})
    named = pl.col(channel).is_in(rule.channels).fill_null(False)
    place.count("row of a channel that is not in channels, left out", int(frame.select((~named).sum()).item()))
    frame = frame.filter(named).drop_nulls(value)
    repeated = len(frame) - len(frame.unique(["_id", "_time", channel]))
    place.count("value of a channel at a time that has one already, taken into the mean", repeated)
    means = [pl.col(value).filter(pl.col(channel) == name).mean().alias(name) for name in rule.channels]
    return frame.group_by("_id", "_time").agg(means).sort("_id", "_time")


def table(rule: TableRule, place: Place) -> Get:
    """One row per sample."""
    path = place.work.note(existing(place.raw, str(rule.file), place.name))
    id = rule.id or place.samples.id
    types: dict[str, Any] = {id: pl.String, **dict.fromkeys(rule.columns, pl.Float64)}
    frame = collect(read_table(path, types), path)
    refuse_empty_ids(frame[id], path, id)
    refuse_repeated_ids(frame[id], path, id)
    known = place.known(frame[id], path)
    rows = {name: i for i, name in enumerate(frame[id]) if name in known}
    values = frame.select(rule.columns).to_numpy().astype(np.float64)
    return lambda id: observation(values[[rows[id]]]) if id in rows else None


def vectors(rule: VectorsRule, place: Place) -> Get:
    """Whole vectors; one that lacks a number is refused."""
    frame = timed_rows(rule, place, dict.fromkeys(rule.columns, pl.Float64))
    lacking = frame.filter(pl.any_horizontal(pl.col(rule.columns).is_null()))
    if len(lacking):
        what = f"{len(lacking)} vectors lack a number; the first is of '{lacking['_id'][0]}'"
        raise DataError(what, where=place.name, mend="Fill it, or use kind = 'series', which may have gaps.")
    found, times = slices(frame["_id"]), _times(frame)
    values = frame.select(rule.columns).to_numpy().astype(np.float32)
    return lambda id: Observation(values[found[id]], times[found[id]]) if id in found else None


def codes(rule: CodesRule, place: Place) -> Get:
    """Events by code; a row without a code is nothing."""
    types = {rule.code: pl.String, **({} if rule.type is None else {rule.type: pl.String})}
    frame = timed_rows(rule, place, types)
    place.count("row without a code, left out", frame[rule.code].null_count())
    frame = frame.drop_nulls(rule.code)
    kinds = [0] * len(frame) if rule.type is None else [_type(name, rule, place) for name in frame[rule.type]]
    values = np.array([kinds, [code_id(code) for code in frame[rule.code]]], dtype=np.int32).T
    found, times = slices(frame["_id"]), _times(frame)
    return lambda id: Observation(values[found[id]], times[found[id]]) if id in found else None


def _type(name: str | None, rule: CodesRule, place: Place) -> int:
    if name not in rule.types:
        raise DataError(f"unknown type '{name}'", where=place.name, mend=nearest(str(name), rule.types))
    return rule.types.index(name)


def texts(rule: TextRule, place: Place) -> Get:
    """Texts of a table; a blank text is nothing."""
    frame = timed_rows(rule, place, {rule.text: pl.String})
    place.count("row with a blank text, left out", frame[rule.text].null_count())
    frame = frame.drop_nulls(rule.text)
    values, owner = read_texts(frame[rule.text].to_list(), rule.options, place.work.vectors)
    found, times = slices(frame["_id"][owner]), _times(frame)[owner]
    return lambda id: Observation(values[found[id]], times[found[id]]) if id in found else None


def _times(frame: pl.DataFrame) -> NDArray[np.float32]:
    return frame["_time"].to_numpy().astype(np.float32)
