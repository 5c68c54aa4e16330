"""Notes of MIMIC-IV as vectors at times: radiology reports of the stay, and summaries of earlier admissions.

A discharge summary is written when the patient leaves and tells the whole story with its end, so that of the same
admission is never an input; those of earlier admissions are.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from flame_moe.batch import Observation
from flame_moe.data.slices import read_slices
from flame_moe.data.sources._mimic_cohort import HOUR, WINDOW
from flame_moe.data.sources._mimic_events import Reader, Window
from flame_moe.data.sources._mimic_files import Release
from flame_moe.data.tables import collect
from flame_moe.data.text import TextOptions, read_texts
from flame_moe.data.work import Work

VERSION = 1
_KEPT = ("order", "note_id", "text", "seconds", "stored")
_NOTE: dict[str, Any] = {
    "note_id": pl.String,
    "subject_id": pl.Int64,
    "hadm_id": pl.Int64,
    "charttime": pl.Datetime,
    "storetime": pl.Datetime,
    "text": pl.String,
}
_OPTIONAL = ("storetime", "hadm_id")


def radiology(release: Release, stays: pl.DataFrame, work: Work, *, before_hours: float) -> pl.LazyFrame:
    """Reports by patient and time of the examination: columns order, note_id, seconds, stored, text."""
    path = release.tables["note/radiology"]

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        rows = _of_patients(rows, stays)
        first = -round(before_hours * HOUR)
        return rows.filter(pl.col("seconds").is_between(first, pl.col("stay").fill_null(WINDOW))).select(_KEPT)

    make = partial(read_slices, path, _NOTE, each, optional=_OPTIONAL)
    return work.step("radiology", [path, *release.core], {"version": VERSION, "before": before_hours}, make)


def history(release: Release, stays: pl.DataFrame, work: Work) -> pl.LazyFrame:
    """Discharge summaries of other admissions, charted and recorded before the stay; columns as `radiology`."""
    path = release.tables["note/discharge"]

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        rows = _of_patients(rows, stays)
        before = (pl.col("charttime") <= pl.col("admittime")) & (pl.col("stored").fill_null(0) <= 0)
        return rows.filter((pl.col("hadm_id") != pl.col("own")) & before).select(_KEPT)

    make = partial(read_slices, path, _NOTE, each, optional=_OPTIONAL)
    return work.step("discharge", [path, *release.core], {"version": VERSION}, make)


def notes(
    name: str,
    frame: pl.LazyFrame,
    window: Window | None,
    options: TextOptions,
    most: int,
    work: Work,
    tally: Counter[str],
) -> Reader:
    """Reads a modality of texts: the last `most` notes of each stay; without a window all at time 0."""
    cache = work.vectors

    def read(first: int, end: int) -> dict[int, Observation]:
        rows = frame.filter(pl.col("order").is_between(first, end - 1))
        found = collect(rows if window is None else rows.join(window.frame(), on="order"), name)
        if window is not None:
            found = _in_time(name, found, tally)
        found = found.sort("order", "seconds", "note_id")
        kept = found.group_by("order", maintain_order=True).tail(most)
        tally[f"{name}: not among the last {most} of the stay"] += found.height - kept.height
        return vectors(kept, window, options, cache)

    return read


def vectors(found: pl.DataFrame, window: Window | None, options: TextOptions, cache: Path) -> dict[int, Observation]:
    """Sorted rows with columns order, seconds and text -> per stay its texts."""
    if found.is_empty():
        return {}
    values, owner = read_texts(found["text"].to_list(), options, cache)
    order, seconds = found["order"].to_numpy()[owner], found["seconds"].to_numpy()[owner]
    times = np.zeros(len(order), dtype=np.float32) if window is None else window.times(seconds, order)
    stays, starts = np.unique(order, return_index=True)
    parts = zip(stays.tolist(), starts, np.r_[starts[1:], len(order)], strict=True)
    return {stay: Observation(values[a:b], times[a:b]) for stay, a, b in parts}


def complaints(found: pl.DataFrame, options: TextOptions, work: Work) -> Reader:
    """Reads the chief complaint at triage, at time 0."""
    texts = found.select("order", seconds=pl.lit(0, dtype=pl.Int64), text="chiefcomplaint").drop_nulls("text")

    def read(first: int, end: int) -> dict[int, Observation]:
        part = texts.filter(pl.col("order").is_between(first, end - 1))
        return vectors(part, None, options, work.vectors)

    return read


def _in_time(name: str, found: pl.DataFrame, tally: Counter[str]) -> pl.DataFrame:
    timely = found.filter(pl.col("seconds") <= pl.col("end"))
    tally[f"{name}: after the prediction time"] += found.height - timely.height
    known = timely.filter(pl.col("stored").is_null() | (pl.col("stored") <= pl.col("end")))
    tally[f"{name}: recorded after the prediction time"] += timely.height - known.height
    return known


def _of_patients(rows: pl.LazyFrame, stays: pl.DataFrame) -> pl.LazyFrame:
    """Every note of a patient, once for each of the patient's stays."""
    keys = stays.lazy().select("order", "subject_id", "intime", "admittime", "stay", own="hadm_id")
    return (
        rows.filter(pl.col("text").is_not_null())
        .join(keys, on="subject_id")
        .with_columns(
            seconds=(pl.col("charttime") - pl.col("intime")).dt.total_seconds(),
            stored=(pl.col("storetime") - pl.col("intime")).dt.total_seconds(),
        )
    )
