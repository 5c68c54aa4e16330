"""What is known of a patient at admission, and the APACHE variables of the first day: tables of eICU-CRD."""

from __future__ import annotations

import polars as pl

from flame_moe.data.sources._eicu_options import STAY, EicuOptions, Release, Tally
from flame_moe.data.sources._eicu_parts import Part, Reading, plausible, table
from flame_moe.data.sources._eicu_tables import APACHE, BEDS, CATEGORIES, MEASURES, TEACHING, Channel
from flame_moe.data.tables import collect, scan_table
from flame_moe.schema import Modality

_HOSPITAL = (
    Channel("hospital_beds", "1 = up to 99, 2 = up to 249, 3 = up to 499, 4 = more", 1, 4),
    Channel("teaching_hospital", "1 = yes", 0, 1),
)
APACHE_HOURS = 24
MISSING = -1.0


def static_modality(place: Release, options: EicuOptions) -> Modality:
    """Age, body, sex, ethnicity, unit and where the patient came from; never a discharge column."""
    return table("static", _static_columns(place, options), "what is known at admission to the unit")


def static(reading: Reading, modality: Modality) -> Part:
    """The table patient, and the table hospital if it is asked for and there."""
    before = -pl.col("hospitaladmitoffset") / 60
    # A hospital admission that is charted after the unit's is no number of hours before it.
    rows = reading.stays.with_columns(pl.when(before >= 0).then(before).alias("hours_before"))
    if _hospital(reading.place, reading.options):
        path = reading.work.note(reading.place.need("hospital"))
        columns = {"hospitalid": pl.Int64, "numbedscategory": pl.String, "teachingstatus": pl.String}
        rows = rows.join(collect(scan_table(path, columns), path).unique("hospitalid"), on="hospitalid", how="left")
    kept = ["numbedscategory", "teachingstatus"] if "numbedscategory" in rows.columns else []
    return Part(modality, rows.select(STAY, *MEASURES, *CATEGORIES, *kept).lazy(), clean_static)


def clean_static(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """Measures in their limits; a category that is empty or unknown is not observed in any of its columns."""
    rows = rows.rename({column: channel.name for column, channel in MEASURES.items()})
    rows = plausible(rows, tuple(MEASURES.values()), tally, "static")
    columns = [pl.col(channel.name) for channel in MEASURES.values()]
    for column, names in CATEGORIES.items():
        name = pl.col(column).replace_strict(names, default=None, return_dtype=pl.String)
        unknown = rows.select((pl.col(column).is_not_null() & name.is_null()).sum()).item()
        tally[f"static {column} without a column of its own, set to missing"] += int(unknown)
        columns += [(name == each).cast(pl.Float64).alias(each) for each in dict.fromkeys(names.values())]
    if "numbedscategory" in rows.columns:
        beds = pl.col("numbedscategory").replace_strict(BEDS, default=None, return_dtype=pl.Float64)
        teaching = pl.col("teachingstatus").str.to_lowercase()
        teaching = teaching.replace_strict(TEACHING, default=None, return_dtype=pl.Float64)
        columns += [beds.alias("hospital_beds"), teaching.alias("teaching_hospital")]
    return rows.select(STAY, *columns).sort(STAY)


def apache_modality(place: Release, options: EicuOptions) -> Modality | None:
    """The variables of the acute physiology score; None if they reach beyond the time of prediction."""
    if not options.apache or options.hours < APACHE_HOURS or place.find("apacheApsVar") is None:
        return None
    return table("apache", tuple(APACHE.values()), "APACHE: worst value of each variable in the first 24 h")


def apache(reading: Reading, modality: Modality) -> Part:
    """The table apacheApsVar. Predictions and outcomes in apachePatientResult are never read."""
    path = reading.work.note(reading.place.need("apacheApsVar"))
    columns = {"patientunitstayid": pl.Int64, **dict.fromkeys(APACHE, pl.Float64)}
    rows = scan_table(path, columns).rename(
        {"patientunitstayid": STAY, **{column: channel.name for column, channel in APACHE.items()}}
    )
    return Part(modality, collect(rows, path).lazy(), clean_apache)


def clean_apache(rows: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """-1 is missing; a stay that is there twice keeps its first row; a row without a value is no row."""
    channels = tuple(APACHE.values())
    names = [channel.name for channel in channels]
    one = rows.unique(STAY, keep="first", maintain_order=True)
    tally["apache row of a stay that had one, left out"] += len(rows) - len(one)
    one = one.with_columns(pl.when(pl.col(name) != MISSING).then(pl.col(name)).alias(name) for name in names)
    one = plausible(one, channels, tally, "apache")
    some = pl.any_horizontal(pl.col(name).is_not_null() for name in names)
    return one.filter(some).select(STAY, *names).sort(STAY)


def _static_columns(place: Release, options: EicuOptions) -> tuple[Channel, ...]:
    names = [name for names in CATEGORIES.values() for name in dict.fromkeys(names.values())]
    flags = tuple(Channel(name, "1 = yes", 0, 1) for name in names)
    return (*MEASURES.values(), *flags, *(_HOSPITAL if _hospital(place, options) else ()))


def _hospital(place: Release, options: EicuOptions) -> bool:
    return options.hospital and place.find("hospital") is not None
