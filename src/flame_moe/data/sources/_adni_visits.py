"""Which visit of a person is predicted, and what it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from flame_moe.data.sources._adni_files import Row
from flame_moe.data.sources._adni_tables import DIAGNOSES


def by_person(rows: Iterable[Row]) -> dict[int, list[Row]]:
    """Roster number -> rows of the person."""
    people: dict[int, list[Row]] = {}
    for row in rows:
        people.setdefault(row.rid, []).append(row)
    return people


def label_of(row: Row) -> float | None:
    """Class of a row of DXSUM, from the first of its columns that says one."""
    said = (DIAGNOSES[column].get(row.cells.get(column, "").removesuffix(".0")) for column in DIAGNOSES)
    return next((label for label in said if label is not None), None)


def reference(rows: list[Row], baseline: bool, tally: Counter[str]) -> Row | None:
    """The first or last dated visit with a diagnosis; without any, the first or last dated visit."""
    dated = [row for row in rows if row.day is not None]
    labelled = [row for row in dated if label_of(row) is not None] or dated
    if not labelled:
        return None
    days = [row.day for row in labelled if row.day is not None]
    day = min(days) if baseline else max(days)
    same = [row for row in labelled if row.day == day]
    if len({label_of(row) for row in same}) > 1:
        tally["two diagnoses on one day, the one changed last is taken"] += 1
    return max(same, key=lambda row: row.stamp)
