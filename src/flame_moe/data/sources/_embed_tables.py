"""The two tables of EMBED: pictures by exam and breast, findings and pathology by woman."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from flame_moe.data.tables import collect, find_table, scan_table
from flame_moe.errors import DataError

CLINICAL = ("EMBED_OpenData_clinical", "EMBED_OpenData_clinical_reduced")
METADATA = ("EMBED_OpenData_metadata", "EMBED_OpenData_metadata_reduced")
"""Names of the tables in the open release; they are looked for in the raw folder and in `tables` below it."""

STREAMS: dict[tuple[str, str], str] = {
    ("2D", "CC"): "ffdm_cc",
    ("2D", "MLO"): "ffdm_mlo",
    ("CVIEW", "CC"): "cview_cc",
    ("CVIEW", "MLO"): "cview_mlo",
}
"""(FinalImageType, ViewPosition), in capitals -> modality. All other kinds and views are left out."""

MALE = 5
AGES = (18.0, 110.0)
"""Years; an age outside is no age of this cohort."""

_CLINICAL_COLUMNS: dict[str, Any] = {
    "empi_anon": pl.String,
    "acc_anon": pl.String,
    "study_date_anon": pl.String,
    "desc": pl.String,
    "side": pl.String,
    "asses": pl.String,
    "tissueden": pl.Float64,
    "implanfind": pl.String,
    "bside": pl.String,
    "procdate_anon": pl.String,
    "pdate_anon": pl.String,
    "path_severity": pl.Float64,
    "age_at_study": pl.Float64,
}
_OPTIONAL = ("desc", "implanfind", "procdate_anon")
_DATES = ("study_date_anon", "procdate_anon", "pdate_anon")


class Finding(NamedTuple):
    """A row of the clinical table: a finding of an exam, with the pathology of its specimen if there was one."""

    side: str | None
    assessment: str | None
    density: float | None
    implant: bool
    age: float | None
    screening: bool | None


class Specimen(NamedTuple):
    """A pathology result; `side` and `day` are None where the table does not say them."""

    side: str | None
    day: date | None
    severity: int


@dataclass
class Woman:
    """Everything that the clinical table says of one person.

    Attributes:
        exams: exam key -> its findings, in the order of the table.
        days: exam key -> date of its report.
        specimens: pathology results.
        last: the last day on which anything of her was recorded.
    """

    exams: dict[str, list[Finding]] = field(default_factory=dict)
    days: dict[str, date] = field(default_factory=dict)
    specimens: list[Specimen] = field(default_factory=list)
    last: date | None = None


@dataclass
class Breast:
    """One breast in one exam, with the pictures of it.

    Attributes:
        streams: modality -> its pictures' paths, sorted.
    """

    empi: str
    acc: str
    side: str
    day: date | None
    streams: dict[str, list[str]] = field(default_factory=dict)


def find(raw: Path, names: tuple[str, ...]) -> Path | None:
    """The table of one of these names, in the folder or in `tables` below it."""
    places = [raw, raw / "tables"]
    found = [path for place in places for name in names if (path := find_table(place, name)) is not None]
    if len(found) > 1:
        what = f"the table '{names[0]}' is there twice: {found[0].name} and {found[1].name}"
        raise DataError(what, where=str(raw), mend="Remove one.")
    return found[0] if found else None


def need_metadata(raw: Path | None) -> Path:
    """The metadata table.

    Raises:
        DataError: if there is no folder or no table.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds the tables of EMBED.")
    path = find(raw, METADATA)
    if path is None:
        mend = "It is part of the EMBED open data (Emory Breast Imaging Dataset, on AWS)."
        raise DataError(f"the table '{METADATA[0]}' is missing", where=str(raw), mend=mend)
    return path


def read_women(path: Path, tally: Counter[str]) -> dict[str, Woman]:
    """The clinical table by person.

    Raises:
        DataError: if a column is missing or a cell is not of its type.
    """
    frame = collect(_with_dates(scan_table(path, _CLINICAL_COLUMNS, optional=_OPTIONAL), _DATES), path)
    women: dict[str, Woman] = {}
    for row in _rows(frame, ("empi_anon", "acc_anon"), tally):
        woman = women.setdefault(row["empi_anon"], Woman())
        woman.exams.setdefault(row["acc_anon"], []).append(_finding(row, tally))
        if row["study_date_anon"] is not None:
            woman.days.setdefault(row["acc_anon"], row["study_date_anon"])
        if row["path_severity"] is not None:
            day = row["pdate_anon"] or row["procdate_anon"]
            side = _side(row["bside"]) or _side(row["side"])
            woman.specimens.append(Specimen(side, day, int(row["path_severity"])))
        days = [day for name in _DATES if (day := row[name]) is not None]
        woman.last = max([*days, *([woman.last] if woman.last else [])], default=None)
    return women


def read_breasts(path: Path, column: str, women: dict[str, Woman], tally: Counter[str]) -> list[Breast]:
    """The metadata table by exam and breast, sorted; breasts without a standard view have no stream.

    A later picture extends its woman's record: `Woman.last` is moved.

    Raises:
        DataError: if a column is missing, a cell is not of its type, or an exam belongs to two persons.
    """
    names = ("empi_anon", "acc_anon", "study_date_anon", "FinalImageType", "ImageLateralityFinal", "ViewPosition")
    columns: dict[str, Any] = {name: pl.String for name in (*names, column)} | {"spot_mag": pl.Float64}
    frame = collect(_with_dates(scan_table(path, columns, optional=("spot_mag",)), ("study_date_anon",)), path)
    owner: dict[str, str] = {}
    breasts: dict[tuple[str, str], Breast] = {}
    for row in _rows(frame, ("empi_anon", "acc_anon"), tally):
        empi, acc, day = row["empi_anon"], row["acc_anon"], row["study_date_anon"]
        if owner.setdefault(acc, empi) != empi:
            what = f"exam {acc} belongs to two persons, {owner[acc]} and {empi}"
            raise DataError(what, where=str(path), mend="Mend the key acc_anon.")
        if day is not None and empi in women:
            women[empi].last = max(day, women[empi].last or day)
        side = _side(row["ImageLateralityFinal"])
        if side is None:
            tally["picture without a side left out"] += 1
            continue
        breast = breasts.setdefault((acc, side), Breast(empi, acc, side, day))
        breast.day = min(filter(None, (breast.day, day)), default=None)
        stream = _stream(row, tally)
        if stream is not None and row[column] is None:
            tally[f"picture without a {column} left out"] += 1
        elif stream is not None:
            breast.streams.setdefault(stream, []).append(row[column])
    for breast in breasts.values():
        for paths in breast.streams.values():
            paths.sort()
            tally["further picture of the same view left out"] += len(paths) - 1
    return sorted(breasts.values(), key=lambda b: (b.empi, b.acc, b.side))


def _stream(row: dict[str, Any], tally: Counter[str]) -> str | None:
    kind, view = (row["FinalImageType"] or "").upper(), (row["ViewPosition"] or "").upper()
    if row["spot_mag"] == 1:
        tally["spot or magnification view left out"] += 1
    elif kind not in {known for known, _ in STREAMS}:
        tally["picture of another type than 2D or C-view left out"] += 1
    elif (kind, view) not in STREAMS:
        tally["view other than CC or MLO left out"] += 1
    else:
        return STREAMS[kind, view]
    return None


def _finding(row: dict[str, Any], tally: Counter[str]) -> Finding:
    age = row["age_at_study"]
    if age is not None and not AGES[0] <= age <= AGES[1]:
        tally[f"age outside {AGES[0]:g} to {AGES[1]:g} years set to missing"] += 1
        age = None
    text = (row["desc"] or "").lower()
    screening = True if "screen" in text else False if "diag" in text else None
    code = None if row["asses"] is None else row["asses"].upper()
    return Finding(_side(row["side"]), code, row["tissueden"], row["implanfind"] is not None, age, screening)


def _side(text: str | None) -> str | None:
    return text.upper() if text is not None and text.upper() in ("L", "R") else None


def _rows(frame: pl.DataFrame, keys: tuple[str, ...], tally: Counter[str]) -> Iterator[dict[str, Any]]:
    """Rows with their keys as plain text; a table that went through a spreadsheet has them as 123.0."""
    plain = frame.with_columns(pl.col(key).str.strip_suffix(".0") for key in keys)
    whole = plain.drop_nulls(list(keys))
    tally["row without a person or exam left out"] += plain.height - whole.height
    return whole.iter_rows(named=True)


def _with_dates(frame: pl.LazyFrame, columns: tuple[str, ...]) -> pl.LazyFrame:
    """Dates, written with or without a time of day behind them."""
    return frame.with_columns(pl.col(name).str.slice(0, 10).str.to_date("%Y-%m-%d") for name in columns)
