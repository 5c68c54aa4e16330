"""Vital signs and laboratory values of MIMIC-IV: from tables of hundreds of millions of rows to one series per stay.

Each table is a step that is written to a file once, slice by slice: narrowed to the items and patients that matter,
units converted, with the fault of every row that cannot be used. The file is then read for a few thousand stays at a
time; where the table is sorted by patient, as published, most of the file is skipped then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.slices import Each, read_slices
from flame_moe.data.sources._mimic_cohort import HOUR, WINDOW
from flame_moe.data.sources._mimic_files import Release
from flame_moe.data.sources._mimic_variables import (
    LABS,
    NOT_TESTABLE,
    VERBAL,
    VITALS,
    Channel,
    item_table,
    range_table,
    unit_table,
)
from flame_moe.data.tables import collect
from flame_moe.data.work import Make, Work

Reader = Callable[[int, int], dict[int, Observation]]
"""(first order, end order) -> order of a stay -> what it has of one modality; stays without it are left out."""

VERSION = 1
_USABLE = ""
_CHART: dict[str, Any] = {
    "stay_id": pl.Int64,
    "subject_id": pl.Int64,
    "charttime": pl.Datetime,
    "storetime": pl.Datetime,
    "itemid": pl.Int32,
    "value": pl.String,
    "valuenum": pl.Float64,
    "valueuom": pl.String,
}


class Window(NamedTuple):
    """What a stay may show, in seconds from admission to the unit.

    Attributes:
        suffix: of the names of modalities that are read in it.
        begin: earliest, 0 or negative.
        ends: (n,) the prediction time of every stay; what happens or becomes known later is not used.
        spans: (n,) what becomes time 1; `begin` becomes 0.
    """

    suffix: str
    begin: int
    ends: NDArray[np.int64]
    spans: NDArray[np.int64]

    def times(self, seconds: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.float32]:
        """Seconds of stays -> 0 to 1."""
        return ((seconds - self.begin) / self.spans[order]).astype(np.float32)

    def frame(self) -> pl.LazyFrame:
        """Columns order and end, to be joined."""
        return pl.LazyFrame({"order": np.arange(len(self.ends), dtype=np.int32), "end": self.ends})


def first_hours(stays: pl.DataFrame, before_hours: float) -> Window:
    """The first 48 h, or the whole stay if it is shorter; times are parts of the 48 h."""
    begin = -round(before_hours * HOUR)
    ends = stays["stay"].fill_null(WINDOW).clip(upper_bound=WINDOW).cast(pl.Int64).to_numpy()
    return Window("", begin, ends, np.full(len(ends), WINDOW - begin, dtype=np.int64))


def whole_stay(stays: pl.DataFrame, before_hours: float) -> Window:
    """All of the stay; times are parts of its own length."""
    begin = -round(before_hours * HOUR)
    ends = stays["stay"].fill_null(WINDOW).cast(pl.Int64).to_numpy()
    return Window("_stay", begin, ends, ends - begin)


def vitals(release: Release, stays: pl.DataFrame, work: Work, *, arterial: bool) -> pl.LazyFrame:
    """Usable and faulty rows of the nine vital signs: columns order, channel, seconds, stored, value, fault.

    Rows belong to the stay that they name; a row whose patient is another is a fault.
    """
    path = release.tables["icu/chartevents"]
    keys = stays.lazy().select("order", "stay_id", "intime", owner="subject_id")

    def judged(rows: pl.LazyFrame) -> pl.LazyFrame:
        rows = rows.join(keys, on="stay_id")
        text = pl.col("value").str.to_lowercase()
        tube = (pl.col("channel") == VERBAL) & (text == NOT_TESTABLE)
        return _judged(
            rows,
            VITALS,
            {
                "of another patient than the stay": pl.col("owner") != pl.col("subject_id"),
                "verbal response not testable because of a tube": tube,
            },
        )

    make = _make(path, VITALS, judged, arterial=arterial)
    return work.step("chartevents", [path, *release.core], {"version": VERSION, "arterial": arterial}, make)


def labs(release: Release, stays: pl.DataFrame, work: Work, *, before_hours: float) -> pl.LazyFrame:
    """Usable and faulty rows of the 21 laboratory values, as `vitals`.

    A quarter of the rows name no admission, so rows belong to the stay by patient and time: from `before_hours` before
    it, but not before admission to the hospital, to its end.
    """
    path = release.tables["hosp/labevents"]
    keys = stays.lazy().select("order", "subject_id", "intime", "admittime", "stay")

    def judged(rows: pl.LazyFrame) -> pl.LazyFrame:
        rows = rows.join(keys, on="subject_id")
        since = (pl.col("charttime") - pl.col("intime")).dt.total_seconds()
        inside = (since >= -round(before_hours * HOUR)) & (since <= pl.col("stay").fill_null(WINDOW))
        admitted = (since >= 0) | (pl.col("charttime") >= pl.col("admittime"))
        return _judged(rows.filter(inside & admitted), LABS, {})

    make = _make(path, LABS, judged)
    return work.step("labevents", [path, *release.core], {"version": VERSION, "before": before_hours}, make)


def series(
    name: str, frame: pl.LazyFrame, channels: Sequence[Channel], window: Window, tally: Counter[str], *, begin: int = 0
) -> Reader:
    """Reads a modality of kind series, and counts in `tally` what was left out and why.

    Values of a channel at the same second become their mean. `begin` is the earliest second that is used.
    """
    limits = window.frame()

    def read(first: int, end: int) -> dict[int, Observation]:
        rows = frame.filter(pl.col("order").is_between(first, end - 1)).join(limits, on="order")
        found = collect(rows.with_columns(_late(begin)), name)
        for why, n in found.filter(pl.col("why") != _USABLE)["why"].value_counts().iter_rows():
            tally[f"{name}: {why}"] += n
        found = found.filter(pl.col("why") == _USABLE).sort("order", "seconds", "channel", "value")
        return _pivot(name, found, len(channels), window, tally)

    return read


def _make(path: Path, channels: Sequence[Channel], judged: Each, *, arterial: bool = False) -> Make:
    """Rows of the items of these channels that have a time."""
    items = item_table(channels, arterial=arterial)
    columns = {name: kind for name, kind in _CHART.items() if name != "stay_id" or channels is VITALS}

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        return judged(rows.filter(pl.col("charttime").is_not_null()).join(items.lazy(), on="itemid"))

    keep = {"itemid": items["itemid"].to_list()}
    return partial(read_slices, path, columns, each, optional=("storetime", "value", "valueuom"), keep=keep)


def _judged(rows: pl.LazyFrame, channels: Sequence[Channel], faults: Mapping[str, pl.Expr]) -> pl.LazyFrame:
    """Values in the units of the store, and the first fault of each row in words; empty: none."""
    rows = rows.with_columns(
        written=pl.col("valueuom").fill_null("").str.to_lowercase().str.replace_all(" ", "", literal=True)
    )
    rows = rows.join(unit_table(channels).lazy(), on=("channel", "written"), how="left")
    rows = rows.join(range_table(channels).lazy(), on="channel")
    value = pl.col("valuenum") * pl.col("factor")
    number = pl.col("valuenum").is_not_null() & pl.col("valuenum").is_finite()
    names = pl.col("channel").replace_strict(dict(enumerate(c.name for c in channels)), return_dtype=pl.String)
    reasons = {
        **faults,
        "no number": ~number,
        "unit": pl.col("factor").is_null(),
        "range": ~value.is_between("low", "high"),
    }
    words = {
        "unit": pl.lit("unit of ") + names + pl.lit(" unknown: ") + pl.col("valueuom"),
        "range": names + pl.lit(" outside its plausible range"),
    }
    fault = pl.lit(_USABLE)
    for text, condition in reversed(reasons.items()):
        fault = pl.when(condition).then(words.get(text, pl.lit(text))).otherwise(fault)
    converted = (pl.col("factor") != 1.0) & (pl.col("written") != "")
    return rows.select(
        "order",
        "channel",
        seconds=(pl.col("charttime") - pl.col("intime")).dt.total_seconds(),
        stored=(pl.col("storetime") - pl.col("intime")).dt.total_seconds(),
        value=value,
        fault=fault,
        converted=pl.when(converted).then(pl.lit("converted from ") + pl.col("valueuom")),
    )


def _late(begin: int) -> pl.Expr:
    """Why a row is not used, in words: outside the window, known too late, or its fault."""
    return (
        pl.when(pl.col("seconds") < begin)
        .then(pl.lit("measured before admission to the unit"))
        .when(pl.col("seconds") > pl.col("end"))
        .then(pl.lit("measured after the prediction time"))
        .when(pl.col("fault") != _USABLE)
        .then(pl.col("fault"))
        .when(pl.col("stored") > pl.col("end"))
        .then(pl.lit("measured in time, but recorded after the prediction time"))
        .otherwise(pl.lit(_USABLE))
        .alias("why")
    )


def _pivot(name: str, found: pl.DataFrame, width: int, window: Window, tally: Counter[str]) -> dict[int, Observation]:
    """Sorted rows -> per stay the matrix of its steps."""
    if found.is_empty():
        return {}
    for text, n in found["converted"].drop_nulls().value_counts().iter_rows():
        tally[f"{name}: {text}"] += n
    order, seconds, channel, value = (found[c].to_numpy() for c in ("order", "seconds", "channel", "value"))
    step_begins = np.r_[True, (np.diff(order) != 0) | (np.diff(seconds) != 0)]
    cell_begins = np.flatnonzero(step_begins | np.r_[True, np.diff(channel.astype(int)) != 0])
    sizes = np.diff(np.r_[cell_begins, len(value)])
    tally[f"{name}: repeated at the same time, averaged"] += int((sizes[sizes > 1] - 1).sum())
    step = np.cumsum(step_begins) - 1
    values = np.zeros((step[-1] + 1, width), dtype=np.float32)
    observed = np.zeros(values.shape, dtype=bool)
    cells = (step[cell_begins], channel[cell_begins])
    values[cells] = np.add.reduceat(value, cell_begins) / sizes
    observed[cells] = True
    owner = order[step_begins]
    times = window.times(seconds[step_begins], owner)
    stays, starts = np.unique(owner, return_index=True)
    parts = zip(stays.tolist(), starts, np.r_[starts[1:], len(owner)], strict=True)
    return {stay: Observation(values[a:b], times[a:b], observed[a:b]) for stay, a, b in parts}
