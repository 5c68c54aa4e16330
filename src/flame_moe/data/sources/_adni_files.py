"""Finding ADNI's tables under their dated names, reading them, and placing every row in time."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import NamedTuple

import polars as pl

from flame_moe.data.sources._adni_tables import DATES, DAYS_PER_MONTH, MISSING, SCREENING, STEMS
from flame_moe.data.tables import SUFFIXES, collect, column_names, scan_table
from flame_moe.data.work import Work
from flame_moe.errors import DataError

_FORMATS = ("%Y-%m-%d", "%m/%d/%Y", "%Y/%m/%d")
_KEYS = ("RID", "PTID", "VISCODE", "VISCODE2", *DATES, "update_stamp")


class Row(NamedTuple):
    """One row of a table: who, when, and its cells by column; a missing cell is not there.

    Attributes:
        rid: roster number of the person.
        day: proleptic day number of the visit, or None if it cannot be told.
        stamp: when the row was last changed, as text that sorts.
        cells: column -> text.
    """

    rid: int
    day: int | None
    stamp: str
    cells: Mapping[str, str]


def find(raw: Path) -> dict[str, Path]:
    """Table -> file, for every table that is in the folder.

    Raises:
        DataError: if a table is there more than once.
    """
    found: dict[str, Path] = {}
    for path in sorted(raw.iterdir()) if raw.is_dir() else ():
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None or not path.is_file():
            continue
        table = _table(path.name[: -len(suffix)])
        if table is None:
            continue
        if table in found:
            what = f"the table {table} is there twice: {found[table].name} and {path.name}"
            raise DataError(what, where=str(raw), mend="Keep the newer one.")
        found[table] = path
    return found


def _table(name: str) -> str | None:
    """The table that a file name without its suffix stands for."""
    dated = r"(_(?=[\w-]*\d)[\w-]+)?"
    matches = (table for table, stem in STEMS.items() if re.fullmatch(f"(all_subjects_)?{stem}{dated}", name.lower()))
    return next(matches, None)


def read_rows(path: Path, columns: Iterable[str], work: Work) -> list[Row]:
    """Rows of a table with the columns that are asked for, where it has them.

    Raises:
        DataError: naming file and line, if the table has no RID (or PTID), or a RID or date cannot be read.
    """
    wanted = dict.fromkeys((*_KEYS, *columns), pl.String)
    frame = collect(scan_table(work.note(path), wanted, optional=tuple(wanted)), path)
    names = {name.strip().upper() for name in column_names(path)}
    if not names & {"RID", "PTID"}:
        raise DataError("the column 'RID' is missing", where=str(path), mend="Every table of ADNI has it.")
    rows = []
    for line, cells in enumerate(frame.iter_rows(named=True), start=2):
        known = {name: text for name, text in cells.items() if text is not None and text.lower() not in MISSING}
        where = f"{path}, line {line}"
        days = (day_of(known[name], where) for name in DATES if name in known)
        rows.append(Row(roster(known, where), next(days, None), known.get("update_stamp", ""), known))
    return rows


def roster(cells: Mapping[str, str], where: str) -> int:
    """RID of a row, or the last part of its PTID (011_S_0002 is 2).

    Example:
        >>> roster({"PTID": "011_S_0002"}, "here")
        2
    """
    text = cells.get("RID") or cells.get("PTID", "").split("_")[-1]
    if not re.fullmatch(r"\d+(\.0)?", text):
        raise DataError(f"'{text}' is no RID", where=where, mend="Give the roster number of the person.")
    return int(float(text))


def day_of(text: str, where: str) -> int:
    """Day number of a date as ADNI writes it."""
    for form in _FORMATS:
        try:
            return datetime.strptime(text[:10].strip(), form).date().toordinal()
        except ValueError:
            continue
    mend = "Write it as YYYY-MM-DD."
    raise DataError(f"'{text}' is no date", where=where, mend=mend)


def month_of(viscode: str) -> float | None:
    """Months since baseline of a visit code, or None if it does not say.

    Example:
        >>> month_of("m06"), month_of("bl"), month_of("uns1")
        (6.0, 0.0, None)
    """
    code = viscode.lower()
    if code in SCREENING:
        return 0.0
    return float(code[1:]) if re.fullmatch(r"m\d{1,3}", code) else None


def place_in_time(tables: Mapping[str, Sequence[Row]], tally: Counter[str]) -> dict[str, list[Row]]:
    """The tables with a day for every row whose visit can be dated.

    A row without a date takes that of the same visit code in another table; failing that, as many months after the
    person's baseline as its code says. The baseline is the date of code bl, or follows from the earliest dated code.
    """
    visits: dict[tuple[int, str], int] = {}
    origins: dict[int, int] = {}
    for rows in tables.values():
        for row in rows:
            code = _code(row)
            if row.day is not None and code:
                visits.setdefault((row.rid, code), row.day)
    for (rid, code), day in sorted(visits.items(), key=lambda item: (item[0][1] != "bl", item[1])):
        months = month_of(code)
        if months is not None:
            origins.setdefault(rid, day - round(months * DAYS_PER_MONTH))
    return {name: [_dated(row, name, visits, origins, tally) for row in rows] for name, rows in tables.items()}


def _code(row: Row) -> str:
    return (row.cells.get("VISCODE2") or row.cells.get("VISCODE") or "").lower()


def _dated(
    row: Row, table: str, visits: Mapping[tuple[int, str], int], origins: Mapping[int, int], tally: Counter[str]
) -> Row:
    if row.day is not None or not _code(row):
        return row
    day = visits.get((row.rid, _code(row)))
    months = month_of(_code(row))
    if day is None and months is not None and row.rid in origins:
        day = origins[row.rid] + round(months * DAYS_PER_MONTH)
    tally[f"{table}: row without a date, " + ("placed by its visit code" if day is not None else "left out")] += 1
    return row._replace(day=day)


def nearest(
    rows: Iterable[Row], day: int, window: int, *, backwards: bool = False, usable: Callable[[Row], bool] | None = None
) -> Row | None:
    """The row nearest in time to a day; of two as near the earlier, of one day the last changed.

    Args:
        rows: of one person.
        day: of the label.
        window: largest distance in days, before and after.
        backwards: no limit before, for facts that stay.
        usable: which rows may be taken.
    """
    best: Row | None = None
    key = (math.inf, False)
    for row in rows:
        if row.day is None or (usable is not None and not usable(row)):
            continue
        away = row.day - day
        if away > window or (away < -window and not backwards):
            continue
        found = (abs(away), away > 0)
        if best is None or found < key or (found == key and row.stamp > best.stamp):
            best, key = row, found
    return best


def age_at(cells: Mapping[str, str], day: int) -> float | None:
    """Years from birth (month and year; July without a month) to a day, or None.

    Example:
        >>> round(age_at({"PTDOBMM": "1", "PTDOBYY": "1940"}, date(2010, 1, 15).toordinal()), 2)
        70.0
    """
    text = cells.get("PTDOB", "")
    parts = text.split("/") if re.fullmatch(r"\d{1,2}/\d{4}", text) else [cells.get("PTDOBMM", "7"), ""]
    month, year = parts[0], parts[1] or cells.get("PTDOBYY", "")
    if not (re.fullmatch(r"\d{4}(\.0)?", year) and re.fullmatch(r"\d{1,2}(\.0)?", month)):
        return None
    born = date(int(float(year)), min(max(int(float(month)), 1), 12), 15).toordinal()
    return (day - born) / 365.2425
