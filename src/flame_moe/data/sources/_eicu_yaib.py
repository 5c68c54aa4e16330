"""Hourly series and labels that Yet Another ICU Benchmark made of the same stays (van de Water et al., ICLR 2024).

A folder per task with `eicu_demo/` or `eicu/` below: `dyn.parquet` (48 channels per hour) and `outc.parquet` (labels).
Row h holds the measurements from hour h to hour h + 1, so the rows before the hour of prediction are known by then.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from flame_moe.data.funnel import Funnel
from flame_moe.data.slices import read_slices
from flame_moe.data.sources._eicu_options import MINUTE, STAY, EicuOptions, Release, Tally
from flame_moe.data.sources._eicu_parts import VERSION, Part, Reading, series
from flame_moe.data.sources._eicu_tables import Channel
from flame_moe.data.tables import collect, scan_table
from flame_moe.errors import DataError
from flame_moe.schema import Modality

HOURS = 24
"""Last hour of prediction for which the labels are about the future: the day-2 creatinine starts here."""
LEAD = 6
"""Hours before its onset from which YAIB marks an illness."""
_UNITS = (
    "alb g/dL|alp IU/L|alt IU/L|ast IU/L|be mEq/L|bicar mEq/L|bili mg/dL|bili_dir mg/dL|bnd %|bun mg/dL|ca mg/dL|"
    "cai mmol/L|ck IU/L|ckmb ng/mL|cl mEq/L|crea mg/dL|crp mg/L|dbp mmHg|fgn mg/dL|fio2 %|glu mg/dL|hgb g/dL|hr 1/min|"
    "inr_pt ratio|k mEq/L|lact mmol/L|lymph %|map mmHg|mch pg|mchc %|mcv fL|methb %|mg mg/dL|na mEq/L|neut %|o2sat %|"
    "pco2 mmHg|ph |phos mg/dL|plt K/uL|po2 mmHg|ptt s|resp 1/min|sbp mmHg|temp C|tnt ng/mL|urine mL|wbc K/uL"
)
_PAIRS = tuple(pair.partition(" ") for pair in _UNITS.split("|"))
CHANNELS = tuple(Channel(name, unit, -math.inf, math.inf) for name, _, unit in _PAIRS)
_TIMED: dict[str, Any] = {"stay_id": pl.Int64, "time": pl.Duration("ms"), "label": pl.Float64}
_SERIES_FROM = ("los", "aki", "mortality24", "sepsis", "kidney_function")


class Label(NamedTuple):
    """One label: folder of the task, the store's name for it, and whether there is one per stay or one per hour."""

    folder: str
    task: str
    how: str


LABELS = (
    Label("mortality24", "yaib_mortality24", "stay"),
    Label("kidney_function", "yaib_kidney_function", "stay"),
    Label("aki", "yaib_aki", "onset"),
    Label("sepsis", "yaib_sepsis", "onset"),
    Label("los", "yaib_los", "now"),
)


def yaib_folder(place: Release, raw: Path, options: EicuOptions) -> Path | None:
    """The folder with the tasks: the one that is named, or one below the raw folder; None if there is none.

    Raises:
        DataError: if a folder is named that holds no task.
    """
    places = [raw, raw / "yaib", raw / "yaib-demo", place.folder, place.folder / "yaib", place.folder / "yaib-demo"]
    if options.yaib is not None:
        places = [Path(options.yaib)]
    for folder in places:
        if any(_file(folder, label.folder, "outc") or _file(folder, label.folder, "dyn") for label in LABELS):
            return folder
    if options.yaib is not None:
        mend = "Give the folder that has mortality24/eicu_demo/dyn.parquet and its like."
        raise DataError("there is no task of YAIB", where=options.yaib, mend=mend)
    return None


def yaib_labels(folder: Path, options: EicuOptions) -> dict[Label, Path]:
    """The labels whose files are there, and the files; none if the prediction is later than the labels allow."""
    if options.hours > HOURS:
        return {}
    found = {label: _file(folder, label.folder, "outc") for label in LABELS}
    return {label: path for label, path in found.items() if path is not None}


def yaib_modality(folder: Path, options: EicuOptions) -> Modality | None:
    """The hourly series, if any of the tasks has them."""
    if not any(_file(folder, name, "dyn") for name in _SERIES_FROM):
        return None
    return series("yaib_series", CHANNELS, f"hourly means of YAIB, hours 0 to {options.hours - 1}")


def yaib_series(reading: Reading, modality: Modality, folder: Path) -> Part:
    """The hours before the prediction; of several files with a stay the one of the larger cohort."""
    frames: list[pl.LazyFrame] = []
    columns: dict[str, Any] = {"stay_id": pl.Int64, "time": pl.Duration("ms")}
    columns |= {channel.name: pl.Float64 for channel in CHANNELS}

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        hour = _hour()
        known = rows.filter((hour >= 0) & (hour < reading.options.hours))
        values = [pl.col(channel.name).fill_nan(None) for channel in CHANNELS]
        return known.select(pl.col("stay_id").alias(STAY), (60 * hour).alias(MINUTE), *values)

    for name in _SERIES_FROM:
        path = _file(folder, name, "dyn")
        if path is None:
            continue
        settings = {"version": VERSION, "hours": reading.options.hours}
        rows = reading.work.step(f"yaib_{name}", [path], settings, partial(read_slices, path, columns, each))
        for earlier in frames:
            rows = rows.join(earlier.select(STAY).unique(), on=STAY, how="anti")
        frames.append(rows)
    return Part(modality, pl.concat(frames), clean_yaib)


def clean_yaib(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Hours in which nothing was measured are no steps."""
    names = [channel.name for channel in CHANNELS]
    some = rows.filter(pl.any_horizontal(pl.col(name).is_not_null() for name in names))
    tally["yaib hour without any measurement, left out"] += len(rows) - len(some)
    return some.select(STAY, MINUTE, *names).sort(STAY, MINUTE)


def yaib_outcomes(folder: Path, reading: Reading, funnel: Funnel) -> pl.DataFrame:
    """One row per stay that is kept, one column per label, null where there is none.

    Raises:
        DataError: if a file cannot be read or has a stay twice.
    """
    stays = reading.stays.select(STAY, "died")
    labels = yaib_labels(folder, reading.options)
    for label in LABELS:
        if reading.options.hours > HOURS:
            funnel.count(f"labels of YAIB are about hour {HOURS}: task {label.task} left out")
        elif label not in labels:
            funnel.count(f"file {label.folder}/outc.parquet of YAIB absent: task {label.task} left out")
    for label, path in labels.items():
        found = _labels(reading.work.note(path), label, reading.options)
        twice = found.filter(pl.col(STAY).is_duplicated())
        if len(twice):
            raise DataError(f"stay {twice[STAY][0]} has two labels", where=str(path), mend="Remove one.")
        outside = found.join(stays, on=STAY, how="anti")
        funnel.count(f"{label.task}: stay with a label that is not in the cohort", len(outside))
        stays = stays.join(found, on=STAY, how="left", maintain_order="left")
    if "yaib_mortality24" in stays.columns:
        differs = (pl.col("yaib_mortality24") != pl.col("died")).sum()
        funnel.count("yaib_mortality24 differs from unitdischargestatus", int(stays.select(differs).item() or 0))
    return stays.drop("died")


def _labels(path: Path, label: Label, options: EicuOptions) -> pl.DataFrame:
    """Columns stay and label, for stays that have one at the hour of prediction."""
    name = pl.col("label").alias(label.task)
    stay = pl.col("stay_id").alias(STAY)
    if label.how == "stay":
        columns = {"stay_id": pl.Int64, "label": pl.Float64}
        return collect(scan_table(path, columns).filter(pl.col("label").is_not_nan()).select(stay, name), path)
    rows = scan_table(path, _TIMED).with_columns(_hour().alias("hour"))
    if label.how == "now":
        return collect(rows.filter(pl.col("hour") == options.hours).select(stay, name), path)
    marked = pl.col("hour").filter(pl.col("label") > 0).min()
    per_stay = rows.group_by(stay).agg(marked.alias("marked"), pl.col("hour").max().alias("last"))
    onset = pl.col("marked") + LEAD
    # An onset up to and in the hour of prediction may be seen in what is read, so such a stay has no label.
    later = pl.when(onset.is_null()).then(0.0).when(onset > options.hours).then(1.0)
    kept = per_stay.filter(pl.col("last") >= options.hours).select(STAY, later.alias(label.task))
    return collect(kept, path).drop_nulls()


def _hour() -> pl.Expr:
    """Hours since admission; the published files hold some that are a little off a whole hour."""
    return (pl.col("time").dt.total_milliseconds() / 3_600_000).round().cast(pl.Int64)


def _file(folder: Path, task: str, name: str) -> Path | None:
    for cohort in ("eicu_demo", "eicu"):
        path = folder / task / cohort / f"{name}.parquet"
        if path.is_file():
            return path
    return None
