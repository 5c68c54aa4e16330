"""Notes of eICU-CRD as embedded documents: what was ticked or written in one note, with the path of each entry."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from flame_moe.data.sources._eicu_options import MINUTE, STAY, EicuOptions, Release, Tally
from flame_moe.data.sources._eicu_parts import Clean, Part, Reading, window
from flame_moe.data.text import read_texts, text_modality
from flame_moe.schema import Modality

_COLUMNS = {"notetype": pl.String, "notepath": pl.String, "notetext": pl.String}
NO_CONTENT = ("notes/Shared/View and Save",)
"""Beginnings of paths that say how a note was saved or printed, not what is in it."""


def notes_modality(place: Release, options: EicuOptions) -> Modality | None:
    """Texts of the notes; None if the table is absent or notes are not asked for."""
    if not options.notes or place.find("note") is None:
        return None
    about = f"structured notes entered by {options.hours} h after admission to the unit"
    return text_modality("notes", options.text, about)


def notes(reading: Reading, modality: Modality) -> Part:
    """The table note, as known by its entry; notes from before the window are at its beginning."""
    rows = window(reading, "note", _COLUMNS, "noteoffset", "noteenteredoffset", early=True)
    return Part(modality, rows, cleaner(modality, reading.options, reading.work.vectors))


def cleaner(modality: Modality, options: EicuOptions, cache: Path | None) -> Clean:
    """From rows of notes to columns stay, minute (when the note was complete) and row: a vector, or a piece."""

    def clean(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
        documents = documents_of(rows, tally)
        kind = pl.Array(pl.Int32 if modality.kind == "tokens" else pl.Float32, modality.features)
        if documents.is_empty():
            return documents.select(STAY, MINUTE).with_columns(pl.Series("row", [], dtype=kind))
        values, owner = read_texts(documents["text"].to_list(), options.text, cache)
        return documents.select(STAY, MINUTE)[owner].with_columns(pl.Series("row", values, dtype=kind))

    return clean


def documents_of(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Columns stay, minute and text: the entries of a stay with one offset and type, one line each, sorted by path.

    An entry is its path and, where it says more than the end of the path, its text.
    """
    path = pl.col("notepath").fill_null("")
    saved = pl.any_horizontal(path.str.starts_with(start) for start in NO_CONTENT)
    tally["notes entry about saving or printing, left out"] += int(rows.select(saved.sum()).item() or 0)
    rows = rows.filter(~saved)
    short = path.str.strip_prefix("notes/").str.strip_prefix("Progress Notes/").str.replace_all("/", " / ")
    text = pl.col("notetext").fill_null("")
    more = pl.when((text != "") & ~path.str.ends_with(text)).then(": " + text).otherwise(pl.lit(""))
    rows = rows.with_columns((short + more).str.strip_chars().alias("line"))
    rows = rows.filter(pl.col("line") != "").sort(STAY, MINUTE, "notetype", "line", "known")
    whole = rows.group_by(STAY, MINUTE, "notetype", maintain_order=True).agg(
        pl.col("known").max(), pl.col("line").unique(maintain_order=True).str.join("\n").alias("text")
    )
    return whole.select(STAY, pl.col("known").alias(MINUTE), "text").sort(STAY, MINUTE, "text")
