"""How eICU-CRD is read: the options of the source, and the window that follows from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import polars as pl
from pydantic import Field

from flame_moe.data.tables import find_table, need_table
from flame_moe.data.text import TextOptions
from flame_moe.description import Description

STAY, MINUTE = "stay", "minute"
DAY = 1440
Tally = Counter[str]
EventType = Literal["diagnosis", "treatment", "medication", "lab", "admission", "infusion", "history"]


class EicuOptions(Description):
    """How the database is read. The defaults follow the paper; what its published code does is said at each option.

    Attributes:
        hours: time of prediction, hours after admission to the unit. Only what was known by then is read, and only
            stays that last longer are kept. (code: 12)
        lookback: hours before admission to the unit from which series are read too, such as laboratory values of the
            emergency department; the origin of all times is that much earlier.
        stays: "all", or "first": the first unit stay of each patient.
        step_down: whether stays in step-down units (unitstaytype "stepdown/other") are kept as samples.
        over_89: patients whose age is given as "> 89" are "as_90", or "exclude". (code: exclude)
        max_days: stays longer than this are left out; none by default. (code: 10)
        readmission: "30d": another intensive-care stay of the same hospital admission starts within 30 days of the end
            of this one; "15d": any other unit stay of it starts within 15 days of the start of this one. (code: 15d)
        los_days: a stay is long if it goes on for more than this many days after the time of prediction.
        event_types: tables of which the events are made. (code: diagnosis, treatment, medication, lab)
        event_rules: "plain", or "code": times in whole hours rounded up, and only stays with 3 to 256 events.
        max_events: "plain" keeps the latest so many events of a stay.
        drug_code: a drug is called by its "name" as written, or by its "hicl" number, which is the same in every
            hospital; where the one is missing the other is used.
        notes: whether to read the notes.
        text: how a note becomes a vector.
        apache: whether to read the APACHE variables; needs hours >= 24, because they are the worst of 24 hours.
        hospital: whether the static table says beds and teaching status of the hospital.
        yaib: folder with tasks and hourly series that YAIB made of the same stays; looked for below the raw folder
            if not given.
        seed: decides the split.
    """

    hours: Annotated[int, Field(ge=1, le=168)] = 24
    lookback: Annotated[int, Field(ge=0, le=168)] = 6
    stays: Literal["all", "first"] = "all"
    step_down: bool = True
    over_89: Literal["as_90", "exclude"] = "as_90"
    max_days: Annotated[float, Field(gt=0)] | None = None
    readmission: Literal["30d", "15d"] = "30d"
    los_days: Annotated[float, Field(gt=0)] = 3
    event_types: Annotated[tuple[EventType, ...], Field(min_length=1)] = (
        "diagnosis",
        "treatment",
        "medication",
        "lab",
        "admission",
        "infusion",
    )
    event_rules: Literal["plain", "code"] = "plain"
    max_events: Annotated[int, Field(ge=1)] = 256
    drug_code: Literal["name", "hicl"] = "name"
    notes: bool = True
    text: TextOptions = TextOptions()
    apache: bool = True
    hospital: bool = False
    yaib: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def end(self) -> int:
        """Minute of the prediction, after admission to the unit."""
        return 60 * self.hours

    @property
    def begin(self) -> int:
        """Minute at which series start; zero or negative."""
        return -60 * self.lookback


class Release(NamedTuple):
    """A folder that holds the tables."""

    folder: Path

    def find(self, table: str) -> Path | None:
        """The file of a table, or None."""
        return find_table(self.folder, table)

    def need(self, table: str) -> Path:
        """The file of a table without which nothing can be done.

        Raises:
            DataError: if it is not there.
        """
        return need_table(self.folder, table, "eICU-CRD (physionet.org/content/eicu-crd)")


def release(raw: Path) -> Release:
    """The folder with the table `patient`: `raw` itself, or the one folder below it that has it."""
    if find_table(raw, "patient") is None and raw.is_dir():
        below = [path for path in sorted(raw.iterdir()) if path.is_dir() and find_table(path, "patient")]
        if len(below) == 1:
            return Release(below[0])
    return Release(raw)


def known_at(offset: str, entered: str | None = None) -> pl.Expr:
    """Minute at which a row was known: when it was entered, but not before the time it is about."""
    return pl.col(offset) if entered is None else pl.max_horizontal(offset, entered)
