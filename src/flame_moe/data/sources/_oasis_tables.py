"""The two OASIS tables in one form: a session with its values in the same units, whichever table it is from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from flame_moe.data.tables import collect, scan_table
from flame_moe.errors import DataError

NAMES: dict[str, dict[str, str]] = {
    "cross_sectional": {"id": "ID", "days": "Delay", "education": "Educ"},
    "longitudinal": {
        "id": "MRI ID",
        "subject": "Subject ID",
        "days": "MR Delay",
        "education": "EDUC",
        "group": "Group",
    },
}
SHARED = {"sex": "M/F", "age": "Age", "ses": "SES", "mmse": "MMSE", "cdr": "CDR"} | {
    "etiv": "eTIV",
    "nwbv": "nWBV",
    "asf": "ASF",
}
OPTIONAL = ("CDR", "Group", "MMSE", "SES")
RANGES: dict[str, tuple[float, float]] = {
    "age": (18, 110),
    "education": (0, 40),
    "ses": (1, 5),
    "mmse": (0, 30),
    "cdr": (0, 3),
    "etiv": (500, 3000),
    "nwbv": (0.3, 1.0),
    "asf": (0.3, 3.0),
    "days": (0, 20_000),
}
"""What a value can be; the scales' own limits, and wide limits of anatomy. A value outside is a typing error."""
GROUPS = ("Nondemented", "Demented", "Converted")
LEVELS = ((12, 1.0), (13, 2.0), (16, 3.0), (17, 4.0))
"""Years of schooling below -> level of the cross-sectional table: below high school, high school, some college,
college; beyond college is 5 (Marcus et al. 2007)."""
NEAR_NWBV = 0.03
"""The brain fraction was computed anew for OASIS-2: of the 116 pairs whose sex, age, eTIV, education, MMSE and CDR are
the same, the largest difference is 0.023."""


class Session(NamedTuple):
    """One MRI session.

    Attributes:
        id, subject: as in the table; the subject of a cross-sectional id is its part before "_MR".
        days: since the person's first session.
        cdr: Clinical Dementia Rating, NaN if not rated.
        group: what the investigators called the person in the longitudinal table.
        values: channel -> value, NaN if missing.
    """

    id: str
    subject: str
    days: float
    cdr: float
    group: str | None
    values: dict[str, float]

    @property
    def key(self) -> tuple[float, float, float]:
        """Sex, age and intracranial volume: the same in both tables if the session is."""
        return self.values["male"], self.values["age"], self.values["etiv"]


def same_session(one: Session, other: Session) -> bool:
    """Whether two sessions of different tables with the same key are one; the dementia rating is not asked."""
    a, b = one.values, other.values
    return (
        all(a[name] == b[name] or math.isnan(a[name]) or math.isnan(b[name]) for name in ("education", "mmse", "ses"))
        and abs(a["nwbv"] - b["nwbv"]) <= NEAR_NWBV
    )


def read_sessions(path: Path, table: str, tally: Counter[str]) -> list[Session]:
    """Every session of one table, in its order.

    Args:
        path: of the table.
        table: "cross_sectional" or "longitudinal".
        tally: what was mended, by text.

    Raises:
        DataError: with file and row, if a column is missing or a value cannot be.
    """
    names = NAMES[table] | SHARED
    frame = collect(scan_table(path, {name: pl.String for name in names.values()}, optional=OPTIONAL), path)
    sessions = []
    for number, cells in enumerate(frame.iter_rows(named=True), start=2):
        row = {name: cells[column] for name, column in names.items()}
        sessions.append(_session(row, table, f"{path}, line {number}", tally))
    return sessions


def _session(row: Mapping[str, Any], table: str, where: str, tally: Counter[str]) -> Session:
    if row["id"] is None:
        raise DataError("a session has no id", where=where, mend="Remove the line, or give it one.")
    found = {name: _number(row[name], name, where) for name in RANGES}
    values = {name: found[name] for name in ("age", "education", "ses", "mmse", "etiv", "nwbv", "asf")}
    values["male"] = _male(row["sex"], where)
    if table == "longitudinal":
        values["education"] = level(values["education"])
        tally["years of education turned into the five levels of OASIS-1"] += not math.isnan(values["education"])
    group = row.get("group")
    if group is not None and group not in GROUPS:
        raise DataError(f"unknown group '{group}'", where=where, mend=f"Known: {', '.join(GROUPS)}.")
    subject = row.get("subject") or row["id"].split("_MR")[0]
    days = 0.0 if math.isnan(found["days"]) else found["days"]
    return Session(row["id"], subject, days, found["cdr"], group, values)


def level(years: float) -> float:
    """Level of education for years of schooling.

    Example:
        >>> [level(years) for years in (11, 12, 13, 16, 18)]
        [1.0, 2.0, 3.0, 4.0, 5.0]
    """
    if math.isnan(years):
        return years
    return next((found for below, found in LEVELS if years < below), 5.0)


def _male(text: str | None, where: str) -> float:
    if text is None:
        return math.nan
    if text not in ("M", "F"):
        raise DataError(f"'{text}' in column 'M/F' is neither M nor F", where=where)
    return float(text == "M")


def _number(text: str | None, name: str, where: str) -> float:
    if text is None or text == "N/A":
        return math.nan
    try:
        value = float(text)
    except ValueError:
        mend = "Mend the cell, or leave it empty."
        raise DataError(f"'{text}' is no number ({name})", where=where, mend=mend) from None
    low, high = RANGES[name]
    if not low <= value <= high:
        raise DataError(f"{name} is {text}, outside of {low:g} to {high:g}", where=where, mend="Mend the cell.")
    return value
