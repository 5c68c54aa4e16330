"""Who is in the cohort of MIMIC-IV, what is known at admission, and what came of it.

A sample is the first intensive-care stay of a hospital admission of an adult. Ages and dates follow the release: dates
are shifted per patient, age is `anchor_age` plus the years since `anchor_year`, and everyone over 89 is given as 91.
"""

from __future__ import annotations

from typing import Any, Literal

import polars as pl

from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._mimic_files import Release
from flame_moe.data.tables import collect, scan_table
from flame_moe.data.work import Work

HOUR = 3600
WINDOW = 48 * HOUR
SHORT_STAY = 96 * HOUR
LONG_STAY = 7 * 24 * HOUR
READMISSION_DAYS = 30
ADULT, OVER_89 = 18, 91
PLANNED = ("ELECTIVE", "SURGICAL SAME DAY ADMISSION")

_PATIENTS: dict[str, Any] = {
    "subject_id": pl.Int64,
    "gender": pl.String,
    "anchor_age": pl.Int64,
    "anchor_year": pl.Int64,
    "dod": pl.String,
}
_ADMISSIONS: dict[str, Any] = {
    "subject_id": pl.Int64,
    "hadm_id": pl.Int64,
    "admittime": pl.Datetime,
    "dischtime": pl.Datetime,
    "deathtime": pl.Datetime,
    "admission_type": pl.String,
    "admission_location": pl.String,
    "hospital_expire_flag": pl.Int64,
}
_STAYS: dict[str, Any] = {
    "subject_id": pl.Int64,
    "hadm_id": pl.Int64,
    "stay_id": pl.Int64,
    "first_careunit": pl.String,
    "intime": pl.Datetime,
    "outtime": pl.Datetime,
}


def read_admissions(release: Release, funnel: Funnel, work: Work) -> pl.DataFrame:
    """All hospital admissions, one row each, with the date of death of the patient."""
    path, people = (work.note(release.tables[name]) for name in ("hosp/admissions", "hosp/patients"))
    optional = ("dischtime", "deathtime", "hospital_expire_flag", "admission_location")
    admissions = collect(scan_table(path, _ADMISSIONS, optional=optional), path)
    patients = collect(
        scan_table(people, _PATIENTS, optional=("dod",)).with_columns(
            pl.col("dod").str.slice(0, 10).str.to_date("%Y-%m-%d")
        ),
        people,
    )
    admissions = _once(admissions, "hadm_id", "admission", funnel)
    return admissions.join(_once(patients, "subject_id", "patient", funnel), on="subject_id")


def read_cohort(release: Release, admissions: pl.DataFrame, funnel: Funnel, work: Work) -> pl.DataFrame:
    """The stays of the cohort in order of patient and time, with a column `order` from 0; see `_measures`.

    Raises:
        DataError: if a table cannot be read.
    """
    path = work.note(release.tables["icu/icustays"])
    found = collect(scan_table(path, _STAYS, optional=("outtime", "first_careunit")), path)
    found = _once(found, "stay_id", "stay", funnel)
    funnel.start(found.height, "intensive-care stays found")
    stays = found.join(admissions, on=("subject_id", "hadm_id"))
    funnel.rule("patient and hospital admission are in the release", stays.height)
    stays = stays.filter(
        pl.col("intime").is_not_null(),
        pl.col("outtime").is_null() | (pl.col("outtime") > pl.col("intime")),
        pl.col("admittime").is_not_null(),
    )
    funnel.rule("begins before it ends", stays.height)
    stays = stays.sort("subject_id", "intime", "stay_id").unique("hadm_id", keep="first", maintain_order=True)
    funnel.rule("first intensive-care stay of the hospital admission", stays.height)
    age = pl.col("anchor_age") + pl.col("admittime").dt.year() - pl.col("anchor_year")
    stays = stays.with_columns(age=pl.when(age >= OVER_89 - 1).then(OVER_89).otherwise(age)).filter(
        pl.col("age") >= ADULT
    )
    funnel.rule(f"{ADULT} years or older at hospital admission", stays.height)
    stays = stays.with_row_index("order").with_columns(pl.col("order").cast(pl.Int32))
    return _measures(stays, admissions, funnel)


def _measures(stays: pl.DataFrame, admissions: pl.DataFrame, funnel: Funnel) -> pl.DataFrame:
    """Adds: stay (seconds in the unit, null while it lasts), wait (seconds from hospital to unit), earlier (hospital
    admissions that ended before this one), death (seconds from admission to the unit to death in hospital), died."""
    died = pl.col("hospital_expire_flag") == 1
    stays = stays.with_columns(
        stay=_seconds("outtime", "intime"),
        wait=_seconds("intime", "admittime"),
        death=_seconds("deathtime", "intime"),
        died=died,
    )
    ended = stays.select("order", "subject_id", begin="admittime").join(
        admissions.select("subject_id", end="dischtime"), on="subject_id"
    )
    earlier = ended.filter(pl.col("end") <= pl.col("begin")).group_by("order").agg(earlier=pl.len())
    wrong = stays.filter(died != pl.col("deathtime").is_not_null()).height
    if wrong:
        funnel.count("time of death and flag of death in hospital disagree, the flag counts", wrong)
    early = stays.filter(pl.col("deathtime") < pl.col("outtime")).height
    if early:
        funnel.count("time of death before the end of the stay in the unit, both kept", early)
    return stays.join(earlier, on="order", how="left").with_columns(pl.col("earlier").fill_null(0)).sort("order")


def add_labels(
    stays: pl.DataFrame,
    admissions: pl.DataFrame,
    funnel: Funnel,
    *,
    los: Literal["remaining", "short"],
    readmission: Literal["all", "unplanned"],
) -> pl.DataFrame:
    """Adds columns ihm, los and readmission: 1, 0, or null where the stay has no label.

    ihm and los are for stays of at least 48 h that the patient outlived by their 48th hour; who dies in that very
    minute is in.
    """
    observed = (pl.col("stay") >= WINDOW) & (pl.col("death").is_null() | (pl.col("death") >= WINDOW))
    long = pl.col("stay") - WINDOW > LONG_STAY
    short = (pl.col("stay") < SHORT_STAY) & ~pl.col("died")
    again = _readmitted(stays, admissions, funnel, readmission)
    backwards = stays.filter(pl.col("dischtime") < pl.col("admittime")).height
    if backwards:
        funnel.count("hospital admission that ends before it begins, no label of readmission", backwards)
    stays = stays.join(again, on="order", how="left").with_columns(
        ihm=pl.when(observed).then(pl.col("died").cast(pl.Float32)),
        los=pl.when(observed).then((long if los == "remaining" else short).cast(pl.Float32)),
        readmission=pl.when(~pl.col("died") & (pl.col("dischtime") >= pl.col("admittime"))).then(
            pl.col("again").is_not_null().cast(pl.Float32)
        ),
    )
    return stays.sort("order")


def _readmitted(stays: pl.DataFrame, admissions: pl.DataFrame, funnel: Funnel, which: str) -> pl.DataFrame:
    """Orders of the stays whose hospital discharge is followed by another admission in time."""
    later = admissions.select("subject_id", next="hadm_id", start="admittime", kind="admission_type")
    pairs = (
        stays.filter(~pl.col("died"))
        .select("order", "subject_id", "hadm_id", "admittime", "dischtime", "dod")
        .join(later, on="subject_id")
        .filter(pl.col("next") != pl.col("hadm_id"), pl.col("start") >= pl.col("admittime"))
    )
    soon = pairs.filter(pl.col("start") <= pl.col("dischtime") + pl.duration(days=READMISSION_DAYS))
    after_death = (soon["start"].dt.date() > soon["dod"]).fill_null(False)
    overlapping = soon["start"] < soon["dischtime"]
    for text, rows in (("after the date of death", after_death), ("before the discharge", overlapping)):
        if rows.any():
            funnel.count(f"admission that begins {text}, no readmission", int(rows.sum()))
    counted = soon.filter(~after_death, ~overlapping)
    if which == "unplanned":
        counted = counted.filter(~pl.col("kind").is_in(PLANNED).fill_null(False))
    return counted.select("order").unique().with_columns(again=pl.lit(True))


def _once(table: pl.DataFrame, key: str, what: str, funnel: Funnel) -> pl.DataFrame:
    """The first row of each key, in the order of the file; repeats are counted."""
    single = table.unique(key, keep="first", maintain_order=True)
    if single.height < table.height:
        funnel.count(f"line of a {what} repeated, the first is kept", table.height - single.height)
    return single


def _seconds(later: str, earlier: str) -> pl.Expr:
    return (pl.col(later) - pl.col(earlier)).dt.total_seconds()
