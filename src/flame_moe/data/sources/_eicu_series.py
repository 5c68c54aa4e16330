"""Vital signs, laboratory values, respiratory settings and fluids of eICU-CRD as series at their irregular times."""

from __future__ import annotations

from typing import Any

import polars as pl

from flame_moe.data.sources._eicu_options import MINUTE, STAY, EicuOptions, Release, Tally
from flame_moe.data.sources._eicu_parts import Part, Reading, plausible, series, steps, window
from flame_moe.data.sources._eicu_tables import (
    FLUIDS,
    LAB_FOREIGN_UNITS,
    LAB_REPORTED_UNITS,
    LAB_SYSTEM_UNITS,
    LABS,
    RESPIRATORY,
    RESPIRATORY_LABELS,
    VITALS,
    Channel,
)
from flame_moe.schema import Modality

LAB_COLUMNS: dict[str, Any] = {
    "labname": pl.String,
    "labresult": pl.Float64,
    "labmeasurenamesystem": pl.String,
    "labmeasurenameinterface": pl.String,
}


def vitals_modality(place: Release, options: EicuOptions) -> Modality | None:
    """Channels of those of the two tables that are there."""
    found = [channel for name in VITALS if place.find(name) for channel in VITALS[name].values()]
    return series("vitals", found, f"vital signs of {_span(options)}") if found else None


def vitals(reading: Reading, modality: Modality) -> Part:
    """vitalPeriodic (medians of 5 minutes from the monitor) and vitalAperiodic (cuff and catheter)."""
    frames = []
    for name, columns in VITALS.items():
        if reading.place.find(name):
            frame = window(reading, name, dict.fromkeys(columns, pl.Float64), "observationoffset")
            frames.append(frame.rename({column: channel.name for column, channel in columns.items()}))
    channels = [channel for name in VITALS if reading.place.find(name) for channel in VITALS[name].values()]

    def clean(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
        rows = plausible(rows, channels, tally, "vitals")
        names = [channel.name for channel in channels]
        merged = rows.group_by(STAY, MINUTE).agg(pl.col(names).median())
        repeated = sum(merged[name].null_count() - rows[name].null_count() for name in names)
        repeated += (len(rows) - len(merged)) * len(names)
        tally["vitals measured twice in one minute, median taken"] += repeated
        return steps(merged, channels)

    return Part(modality, pl.concat(frames, how="diagonal"), clean)


def labs_modality(place: Release, options: EicuOptions) -> Modality | None:
    """The laboratory values of the table of channels."""
    if place.find("lab") is None:
        return None
    return series("labs", tuple(LABS.values()), f"laboratory values drawn in {_span(options)} and known by then")


def labs(reading: Reading, modality: Modality) -> Part:
    """Results at the minute of the draw; a result that was entered or revised after the prediction is not known."""
    rows = window(reading, "lab", LAB_COLUMNS, "labresultoffset", "labresultrevisedoffset", early=True)
    inside = rows.filter((pl.col(MINUTE) >= reading.options.begin) & pl.col("labname").is_in(list(LABS)))
    return Part(modality, inside, clean_labs)


def clean_labs(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Units checked and converted; of several revisions of one draw the last that was known; one row per minute."""
    tally["labs result that is text only, left out"] += rows["labresult"].null_count()
    rows = _lab_units(rows.filter(pl.col("labresult").is_not_null()), tally)
    last = rows.sort("known", "labresult").unique([STAY, MINUTE, "labname"], keep="last", maintain_order=True)
    tally["labs revised result of one draw, the last known taken"] += len(rows) - len(last)
    wide = last.group_by(STAY, MINUTE).agg(
        pl.col("labresult").filter(pl.col("labname") == name).first().alias(channel.name)
        for name, channel in LABS.items()
    )
    return steps(plausible(wide, tuple(LABS.values()), tally, "labs"), tuple(LABS.values()))


def respiratory_modality(place: Release, options: EicuOptions) -> Modality | None:
    """Settings and readings of the ventilator, and oxygen."""
    if place.find("respiratoryCharting") is None:
        return None
    return series("respiratory", tuple(RESPIRATORY.values()), f"ventilator and oxygen of {_span(options)}")


def respiratory(reading: Reading, modality: Modality) -> Part:
    """respiratoryCharting, as known by its entry."""
    columns = {"respchartvaluelabel": pl.String, "respchartvalue": pl.String}
    rows = window(reading, "respiratoryCharting", columns, "respchartoffset", "respchartentryoffset")
    charted = rows.filter(pl.col("respchartvaluelabel").is_in(list(RESPIRATORY_LABELS)))
    return Part(modality, charted, clean_respiratory)


def clean_respiratory(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Numbers out of text, several labels of one quantity joined, the mean of what is charted at one minute."""
    text = pl.col("respchartvalue").str.strip_suffix("%").str.strip_chars()
    rows = rows.with_columns(text.cast(pl.Float64, strict=False).alias("value"))
    wrong = rows.filter(pl.col("value").is_null() & pl.col("respchartvalue").is_not_null())
    tally["respiratory value that is no number, left out"] += len(wrong)
    channel = pl.col("respchartvaluelabel").replace_strict(RESPIRATORY_LABELS, return_dtype=pl.String)
    single = rows.select(
        STAY, MINUTE, *(pl.when(channel == name).then(pl.col("value")).alias(name) for name in RESPIRATORY)
    )
    # Units are mended before a mean is taken: one cell may say 0.4 and the next 40.
    single = plausible(single, tuple(RESPIRATORY.values()), tally, "respiratory")
    return steps(single.group_by(STAY, MINUTE).agg(pl.col(list(RESPIRATORY)).mean()), tuple(RESPIRATORY.values()))


def fluids_modality(place: Release, options: EicuOptions) -> Modality | None:
    """Volumes in and out."""
    if place.find("intakeOutput") is None:
        return None
    return series("fluids", tuple(FLUIDS.values()), f"volumes charted in {_span(options)}")


def fluids(reading: Reading, modality: Modality) -> Part:
    """intakeOutput: single cells, never its running totals."""
    columns = {"cellpath": pl.String, "cellvaluenumeric": pl.Float64}
    rows = window(reading, "intakeOutput", columns, "intakeoutputoffset", "intakeoutputentryoffset")
    return Part(modality, rows, clean_fluids)


def clean_fluids(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Sum per minute of what is charted below Intake, Output and Dialysis; counts and totals are no volumes."""
    parts = pl.col("cellpath").str.split("|")
    branch, label = parts.list.get(3, null_on_oob=True), parts.list.last().str.to_lowercase()
    rows = rows.with_columns(branch.alias("branch"), label.alias("label"))
    rows = rows.filter(pl.col("branch").is_in(["Intake (ml)", "Output (ml)", "Dialysis (ml)"]))
    no_volume = pl.col("label").str.contains(r"\b(?:total|count|number|occurrence|unmeasured)")
    tally["fluids cell that is a total or a count, left out"] += int(rows.select(no_volume.sum()).item() or 0)
    rows = rows.filter(~no_volume & pl.col("cellvaluenumeric").is_not_null())
    value = pl.col("cellvaluenumeric")
    urine = pl.col("label").str.contains(r"urin|foley|void|urethral|indwelling|nephrostomy")
    wide = rows.group_by(STAY, MINUTE).agg(
        _sum(value.filter(pl.col("branch") == "Intake (ml)"), "intake"),
        _sum(value.filter(pl.col("branch") == "Output (ml)"), "output"),
        _sum(value.filter((pl.col("branch") == "Output (ml)") & urine), "urine"),
        _sum(value.filter(pl.col("branch") == "Dialysis (ml)").abs(), "dialysis_out"),
    )
    return steps(plausible(wide, tuple(FLUIDS.values()), tally, "fluids"), tuple(FLUIDS.values()))


def _span(options: EicuOptions) -> str:
    before = f"{options.lookback} h before to " if options.lookback else "the first "
    return f"{before}{options.hours} h {'after' if options.lookback else 'of the'} admission to the unit"


def _sum(values: pl.Expr, name: str) -> pl.Expr:
    """The sum, or null where there is nothing to add."""
    return pl.when(values.len() > 0).then(values.sum()).alias(name)


def _lab_units(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Rows in the unit of our table: those that laboratories reported in another are converted, or left out."""
    system, reported = (
        pl.col(column).str.to_lowercase().str.strip_chars()
        for column in ("labmeasurenamesystem", "labmeasurenameinterface")
    )
    known = {(name, unit) for name, channel in LABS.items() for unit in _spellings(channel)}
    names, units = zip(*sorted(known), strict=True)
    expected = pl.DataFrame({"labname": names, "system": units, "fits": True})
    rows = rows.with_columns(system.alias("system"), reported.alias("reported"))
    rows = rows.join(expected, on=["labname", "system"], how="left")
    strange = pl.col("system").is_not_null() & (pl.col("system") != "") & pl.col("fits").is_null()
    for name, unit, count in rows.filter(strange).group_by("labname", "system").len().sort("labname").rows():
        tally[f"labs {name} in unit '{unit}', left out"] += count
    rows = rows.filter(~strange)
    for name, unit in sorted(LAB_FOREIGN_UNITS):
        foreign = (pl.col("labname") == name) & (pl.col("reported") == unit).fill_null(value=False)
        tally[f"labs {name} reported in {unit}, left out"] += int(rows.select(foreign.sum()).item() or 0)
        rows = rows.filter(~foreign)
    for (name, unit), factor in LAB_REPORTED_UNITS.items():
        other = (pl.col("labname") == name) & (pl.col("reported") == unit).fill_null(value=False)
        tally[f"labs {name} reported in {unit}, converted"] += int(rows.select(other.sum()).item() or 0)
        value = pl.when(other).then(pl.col("labresult") * factor).otherwise(pl.col("labresult"))
        rows = rows.with_columns(value.alias("labresult"))
    return rows


def _spellings(channel: Channel) -> frozenset[str]:
    return LAB_SYSTEM_UNITS.get(channel.unit, frozenset({channel.unit.lower()}))
