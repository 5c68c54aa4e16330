"""Which unit stays of eICU-CRD become samples, and what became of them: the table `patient` alone."""

from __future__ import annotations

from typing import Any

import polars as pl

from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._eicu_options import DAY, STAY, EicuOptions, Release
from flame_moe.data.tables import collect, scan_table
from flame_moe.data.work import Work
from flame_moe.errors import DataError

STEP_DOWN = "stepdown/other"
_COLUMNS: dict[str, Any] = {
    "patientunitstayid": pl.Int64,
    "patienthealthsystemstayid": pl.Int64,
    "uniquepid": pl.String,
    "hospitalid": pl.Int64,
    "age": pl.String,
    "gender": pl.String,
    "ethnicity": pl.String,
    "admissionheight": pl.Float64,
    "admissionweight": pl.Float64,
    "unittype": pl.String,
    "unitadmitsource": pl.String,
    "unitstaytype": pl.String,
    "unitvisitnumber": pl.Int64,
    "hospitaladmitoffset": pl.Int64,
    "hospitaldischargeyear": pl.Int64,
    "unitdischargeoffset": pl.Int64,
    "unitdischargestatus": pl.String,
}
_OPTIONAL = ("hospitaldischargeyear", "unitdischargeoffset", "unitdischargestatus")
_STATUS = {"alive": 0.0, "expired": 1.0}


def read_patients(place: Release, work: Work, funnel: Funnel) -> pl.DataFrame:
    """Every unit stay with `age` in years ("> 89" is 90, unknown is null), `over_89`, and `died` in the unit.

    Raises:
        DataError: if the table is missing, a stay is there twice with different content, or an age or a discharge
            status is none.
    """
    path = work.note(place.need("patient"))
    stays = collect(scan_table(path, _COLUMNS, optional=_OPTIONAL), path)
    stays = stays.rename({"patientunitstayid": STAY})
    for column, name in ((STAY, "patientunitstayid"), ("uniquepid", "uniquepid")):
        if stays[column].null_count():
            mend = "Give every stay its number and its patient."
            raise DataError(f"a stay has no {name}", where=str(path), mend=mend)
    funnel.start(len(stays), "unit stays in the table patient")
    distinct = stays.unique(maintain_order=True)
    if len(distinct) < len(stays):
        funnel.rule("is not an exact repetition of another row", len(distinct))
    twice = distinct.filter(pl.col(STAY).is_duplicated())
    if len(twice):
        what = f"unit stay {twice[STAY][0]} is there twice with different content"
        raise DataError(what, where=str(path), mend="Remove the wrong row.")
    return _outcome(_age(distinct, str(path)), str(path)).sort(STAY)


def select(stays: pl.DataFrame, options: EicuOptions, funnel: Funnel) -> pl.DataFrame:
    """The stays that become samples, sorted by stay; the funnel is told of every rule.

    A stay whose end is not known, as for a patient who is still in the unit, is kept without labels.
    """
    for text, rule in _rules(options):
        stays = _first(stays) if rule is None else stays.filter(rule.fill_null(value=False))
        funnel.rule(text, len(stays))
    for text, column in (
        ("stay without unitdischargeoffset, kept without labels", "unitdischargeoffset"),
        ("stay without unitdischargestatus, no label of mortality", "died"),
    ):
        if stays[column].null_count():
            funnel.count(text, stays[column].null_count())
    return stays.sort(STAY)


def outcomes(stays: pl.DataFrame, options: EicuOptions) -> pl.DataFrame:
    """Labels of every stay, null where there is none: `mortality`, `readmission`, `los`.

    Args:
        stays: all stays of the table, because a readmission may be of a stay that is no sample.
        options: how labels are defined.
    """
    long = pl.col("unitdischargeoffset") - options.end > options.los_days * DAY
    labels = stays.select(STAY, pl.col("died").alias("mortality"), long.cast(pl.Float64).alias("los"))
    return labels.join(_readmitted(stays, options), on=STAY, how="left", maintain_order="left")


def _age(stays: pl.DataFrame, where: str) -> pl.DataFrame:
    over = pl.col("age").str.contains(r"^>\s*89$")
    years = pl.when(over).then(pl.lit("90")).otherwise(pl.col("age")).cast(pl.Float64, strict=False)
    aged = stays.with_columns(years.alias("years"), over.fill_null(value=False).alias("over_89"))
    wrong = aged.filter(pl.col("age").is_not_null() & (pl.col("years").is_null() | ~pl.col("years").is_between(0, 120)))
    if len(wrong):
        what = f"the age '{wrong['age'][0]}' of unit stay {wrong[STAY][0]} is neither a number of years nor '> 89'"
        raise DataError(what, where=where, mend="Mend the cell, or leave it empty.")
    return aged.drop("age").rename({"years": "age"})


def _outcome(stays: pl.DataFrame, where: str) -> pl.DataFrame:
    status = pl.col("unitdischargestatus").str.to_lowercase()
    died = status.replace_strict(_STATUS, default=None, return_dtype=pl.Float64)
    stays = stays.with_columns(died.alias("died"))
    wrong = stays.filter(pl.col("unitdischargestatus").is_not_null() & pl.col("died").is_null())
    if len(wrong):
        what = f"the unitdischargestatus '{wrong['unitdischargestatus'][0]}' of unit stay {wrong[STAY][0]} is unknown"
        raise DataError(what, where=where, mend="It is Alive, Expired or empty.")
    return stays


def _rules(options: EicuOptions) -> list[tuple[str, pl.Expr | None]]:
    """What a stay must be, in the order in which it is asked; None stands for the first stay of each patient."""
    rules: list[tuple[str, pl.Expr | None]] = []
    if options.stays == "first":
        rules.append(("is the patient's first unit stay", None))
    rules.append(("has a known age", pl.col("age").is_not_null()))
    rules.append(("is of an adult (18 years or more)", pl.col("age") >= 18))
    if options.over_89 == "exclude":
        rules.append(("is of a patient of at most 89 years", ~pl.col("over_89")))
    if not options.step_down:
        rules.append(("is no stay in a step-down unit", pl.col("unitstaytype").ne_missing(STEP_DOWN)))
    lasts = pl.col("unitdischargeoffset").is_null() | (pl.col("unitdischargeoffset") > options.end)
    rules.append((f"lasts longer than the {options.hours} h until prediction", lasts))
    if options.max_days is not None:
        short = pl.col("unitdischargeoffset").is_null() | (pl.col("unitdischargeoffset") <= options.max_days * DAY)
        rules.append((f"lasts at most {options.max_days:g} days", short))
    return rules


def _first(stays: pl.DataFrame) -> pl.DataFrame:
    """The first unit stay per patient: by year of discharge, then age, hospital admission and number of the visit.

    Within a year the database does not say which of two hospital admissions came first; the number of the admission
    then decides, which is arbitrary but always the same.
    """
    order = ["hospitaldischargeyear", "age", "patienthealthsystemstayid", "unitvisitnumber", STAY]
    return stays.sort(order, nulls_last=True).unique("uniquepid", keep="first", maintain_order=True)


def _readmitted(stays: pl.DataFrame, options: EicuOptions) -> pl.DataFrame:
    """1 or 0 per stay, null where the order of the stays of the admission or the end of this one is not known.

    Minutes count from admission to the hospital: a unit stay starts at -hospitaladmitoffset.
    """
    start = -pl.col("hospitaladmitoffset")
    short = stays.select(
        STAY,
        "patienthealthsystemstayid",
        "died",
        start.alias("start"),
        (start + pl.col("unitdischargeoffset")).alias("end"),
        pl.col("unitdischargeoffset").is_not_null().alias("left"),
        pl.col("unitstaytype").ne_missing(STEP_DOWN).alias("intensive"),
    )
    other = short.select("patienthealthsystemstayid", pl.exclude("patienthealthsystemstayid").name.suffix("_other"))
    # A stay without an admission number has no others: null joins nothing.
    pairs = short.join(other, on="patienthealthsystemstayid").filter(pl.col(STAY) != pl.col(f"{STAY}_other"))
    after = pl.col("start_other")
    if options.readmission == "30d":
        back = (after > pl.col("end")) & (after <= pl.col("end") + 30 * DAY) & pl.col("intensive_other")
    else:
        back = (after > pl.col("start") + options.end) & (after <= pl.col("start") + 15 * DAY)
    found = pairs.group_by(STAY).agg(
        back.any().cast(pl.Float64).alias("readmission"), back.is_null().any().alias("unclear")
    )
    joined = short.join(found, on=STAY, how="left", maintain_order="left")
    came_back = pl.col("readmission").fill_null(0.0)
    clear = ~pl.col("unclear").fill_null(value=False) | (came_back == 1)
    if options.readmission == "30d":  # Who died in the unit cannot come back.
        clear &= (pl.col("died") == 0).fill_null(value=False)
    return joined.select(STAY, pl.when(clear & pl.col("left")).then(came_back).alias("readmission"))
