"""Diagnoses, treatments, drugs and laboratory tests of eICU-CRD as typed events; values are not used."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from flame_moe.data.codes import code_id
from flame_moe.data.sources._eicu_options import MINUTE, STAY, EicuOptions, Release, Tally
from flame_moe.data.sources._eicu_parts import Part, Reading, window
from flame_moe.data.sources._eicu_series import LAB_COLUMNS
from flame_moe.schema import Modality

FEWEST, MOST = 3, 256
"""Events of a stay that the published code keeps."""


class Kind(NamedTuple):
    """Where events of a type come from: table, column of the code, offsets; whether the later offset is the time."""

    table: str
    column: str
    offset: str
    entered: str | None = None
    when_known: bool = False


KINDS: dict[str, Kind] = {
    "diagnosis": Kind("diagnosis", "diagnosisstring", "diagnosisoffset"),
    "treatment": Kind("treatment", "treatmentstring", "treatmentoffset"),
    "medication": Kind("medication", "drugname", "drugstartoffset", "drugorderoffset", when_known=True),
    "lab": Kind("lab", "labname", "labresultoffset", "labresultrevisedoffset"),
    "admission": Kind("admissionDx", "admitdxpath", "admitdxenteredoffset"),
    "infusion": Kind("infusiondrug", "drugname", "infusionoffset"),
    "history": Kind("pastHistory", "pasthistorypath", "pasthistoryoffset", "pasthistoryenteredoffset"),
}


def events_modality(place: Release, options: EicuOptions) -> Modality | None:
    """Events of the types that are asked for; None if none of their tables is there.

    The numbers of the types do not depend on which tables are there.
    """
    if not any(place.find(KINDS[name].table) for name in options.event_types):
        return None
    return Modality(
        name="events",
        kind="codes",
        features=2,
        scaling="none",
        types=options.event_types,
        description=f"events charted by {options.hours} h after admission to the unit; earlier than the window: time 0",
    )


def events(reading: Reading, modality: Modality) -> Part:
    """Events with the minute they are about; a drug is an event once it is both ordered and started."""
    frames = []
    for number, name in enumerate(modality.types):
        kind = KINDS[name]
        if reading.place.find(kind.table) is None:
            continue
        minute = pl.col("known" if kind.when_known else MINUTE).alias(MINUTE)
        typed = pl.lit(number, dtype=pl.Int32).alias("type"), pl.lit(name).alias("type_name")
        frames.append(_rows(reading, name, kind).select(STAY, minute, *typed, "text"))
    options = reading.options

    def clean(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
        return clean_events(rows, tally, options)

    return Part(modality, pl.concat(frames), clean)


def clean_events(rows: pl.DataFrame, tally: Tally, options: EicuOptions) -> pl.DataFrame:
    """Columns stay, minute, type, code; sorted by minute, type and text as the published code does."""
    tally["event without a code, left out"] += rows["text"].null_count()
    rows = rows.filter(pl.col("text").is_not_null())
    rows = _code_rules(rows, options) if options.event_rules == "code" else _plain_rules(rows, tally, options)
    texts = rows["text"].unique().to_list()
    kinds = {"text": pl.String, "code": pl.Int32}
    ids = pl.DataFrame({"text": texts, "code": [code_id(text) for text in texts]}, schema=kinds)
    return rows.join(ids, on="text", how="left", maintain_order="left").select(STAY, MINUTE, "type", "code")


def _rows(reading: Reading, name: str, kind: Kind) -> pl.LazyFrame:
    """Rows of one table with their code as text: lower case, single blanks."""
    columns: dict[str, Any] = {kind.column: pl.String}
    if name == "lab":  # The step of the laboratory series is used again.
        columns = LAB_COLUMNS
    elif name == "medication":
        columns = {**columns, "drughiclseqno": pl.Int64}
    rows = window(reading, kind.table, columns, kind.offset, kind.entered, early=True)
    text = pl.col(kind.column).str.to_lowercase().str.replace_all(r"\s+", " ")
    if name == "infusion":  # The unit of the rate is no part of the drug: "propofol (ml/hr)".
        text = text.str.replace(r"\s*\([^()]*\)$", "")
    if name == "medication":
        number = pl.format("hicl {}", pl.col("drughiclseqno"))
        text = pl.coalesce(text, number) if reading.options.drug_code == "name" else pl.coalesce(number, text)
    return rows.with_columns(text.alias("text"))


def _plain_rules(rows: pl.DataFrame, tally: Tally, options: EicuOptions) -> pl.DataFrame:
    """One event per code and minute, and the latest `max_events` of a stay."""
    distinct = rows.unique([STAY, MINUTE, "type", "text"])
    tally["event repeated in one minute, one kept"] += len(rows) - len(distinct)
    ordered = distinct.sort(STAY, MINUTE, "type_name", "text")
    latest = ordered.group_by(STAY, maintain_order=True).tail(options.max_events)
    tally[f"event before the latest {options.max_events} of its stay, left out"] += len(ordered) - len(latest)
    return latest


def _code_rules(rows: pl.DataFrame, options: EicuOptions) -> pl.DataFrame:
    """Whole hours, rounded up and at least 1; only stays with 3 to 256 events.

    The published code adds a millionth of a minute first, so a full hour belongs to the next one.
    """
    hour = ((pl.col(MINUTE) + 1e-6) / 60).ceil().clip(lower_bound=1).cast(pl.Int64)
    kept = rows.filter(hour <= options.hours)
    kept = kept.filter(pl.len().over(STAY).is_between(FEWEST, MOST))
    # Sorted by the minute, then told in hours: the order within an hour stays.
    kept = kept.sort(STAY, MINUTE, "type_name", "text")
    return kept.with_columns((60 * hour).alias(MINUTE))
