"""What is known of a MIMIC-IV stay before it begins: static table, triage in the emergency room, earlier codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.codes import code_id
from flame_moe.data.sources._mimic_cohort import HOUR
from flame_moe.data.sources._mimic_events import Reader
from flame_moe.data.sources._mimic_files import Release
from flame_moe.data.tables import collect, scan_table
from flame_moe.data.work import Work

ADMISSION_TYPES: Mapping[str, tuple[str, ...]] = {
    "emergency": ("EW EMER.", "DIRECT EMER."),
    "urgent": ("URGENT",),
    "elective": ("ELECTIVE", "SURGICAL SAME DAY ADMISSION"),
    "observation": ("EU OBSERVATION", "OBSERVATION ADMIT", "DIRECT OBSERVATION", "AMBULATORY OBSERVATION"),
}
ADMISSION_FROM: Mapping[str, tuple[str, ...]] = {
    "from_emergency_room": ("EMERGENCY ROOM",),
    "from_hospital": ("TRANSFER FROM HOSPITAL",),
    "from_nursing_facility": ("TRANSFER FROM SKILLED NURSING FACILITY",),
}
CARE_UNITS: Mapping[str, tuple[str, ...]] = {
    "unit_medical": ("Medical Intensive Care Unit (MICU)",),
    "unit_mixed": ("Medical/Surgical Intensive Care Unit (MICU/SICU)",),
    "unit_surgical": ("Surgical Intensive Care Unit (SICU)",),
    "unit_trauma": ("Trauma SICU (TSICU)",),
    "unit_cardiac_surgery": ("Cardiac Vascular Intensive Care Unit (CVICU)",),
    "unit_coronary": ("Coronary Care Unit (CCU)",),
    "unit_neuro": ("Neuro Surgical Intensive Care Unit (Neuro SICU)", "Neuro Intermediate", "Neuro Stepdown"),
}
"""Column -> the entries that make it 1; an entry that is in no column makes all of its group 0."""
_GROUPS = {"admission_type": ADMISSION_TYPES, "admission_location": ADMISSION_FROM, "first_careunit": CARE_UNITS}

STATIC: tuple[tuple[str, str], ...] = (
    ("age", "years, over 89: 91"),
    ("male", "1 = male"),
    ("hours_before", "h in hospital before the unit"),
    ("earlier_admissions", "count"),
    *((column, "1 = yes") for group in _GROUPS.values() for column in group),
)


class Measure(NamedTuple):
    """A column of triage: its unit and plausible range."""

    name: str
    unit: str
    low: float
    high: float


TRIAGE: tuple[Measure, ...] = (
    Measure("temperature", "C", 25, 44),
    Measure("heartrate", "beats/min", 10, 300),
    Measure("resprate", "breaths/min", 2, 80),
    Measure("o2sat", "%", 20, 100),
    Measure("sbp", "mmHg", 20, 300),
    Measure("dbp", "mmHg", 5, 225),
    Measure("pain", "points", 0, 10),
    Measure("acuity", "1 = most urgent", 1, 5),
)
_FAHRENHEIT = (60.0, 115.0)
DIAGNOSIS_TYPES = ("icd9", "icd10")


def static(stays: pl.DataFrame) -> Reader:
    """Reads the table of what is known at admission to the unit; nothing in it is later than that."""
    columns: list[pl.Expr] = [
        pl.col("age"),
        pl.when(pl.col("gender").is_in(("M", "F"))).then(pl.col("gender") == "M"),
        pl.col("wait").clip(lower_bound=0) / HOUR,
        pl.col("earlier"),
    ]
    for source, group in _GROUPS.items():
        columns += [pl.when(pl.col(source).is_not_null()).then(pl.col(source).is_in(e)) for e in group.values()]
    names = [name for name, _ in STATIC]
    made = stays.select(c.cast(pl.Float64).alias(n) for n, c in zip(names, columns, strict=True)).fill_null(np.nan)
    table = made.to_numpy()
    return lambda first, end: {order: _row(table[order]) for order in range(first, end)}


def emergency(release: Release, stays: pl.DataFrame, work: Work, tally: Counter[str]) -> pl.DataFrame:
    """The last triage before the stay of the same hospital admission: columns order, measures, chiefcomplaint."""
    paths = [work.note(release.tables[name]) for name in ("ed/edstays", "ed/triage")]
    visits = collect(
        scan_table(paths[0], {"hadm_id": pl.Int64, "stay_id": pl.Int64, "intime": pl.Datetime}), paths[0]
    ).rename({"stay_id": "visit", "intime": "arrival"})
    columns: dict[str, Any] = {"stay_id": pl.Int64, **{m.name: pl.Float64 for m in TRIAGE}, "pain": pl.String}
    triage = collect(scan_table(paths[1], {**columns, "chiefcomplaint": pl.String}), paths[1])
    seen = visits.drop_nulls().join(stays.select("order", "hadm_id", "intime"), on="hadm_id")
    before = seen.filter(pl.col("arrival") <= pl.col("intime")).sort("arrival", "visit")
    tally["triage: visit after admission to the unit"] += seen.height - before.height
    last = before.unique("order", keep="last", maintain_order=True)
    tally["triage: earlier visit of the same admission"] += before.height - last.height
    triage = triage.unique("stay_id", keep="first", maintain_order=True).rename({"stay_id": "visit"})
    found = last.select("order", "visit").join(triage, on="visit")
    pain = pl.col("pain").cast(pl.Float64, strict=False)
    tally["triage: pain that is no number"] += found.filter(pl.col("pain").is_not_null() & pain.is_null()).height
    warm = pl.col("temperature").is_between(*_FAHRENHEIT)
    tally["triage: temperature converted from Fahrenheit"] += found.filter(warm).height
    celsius = pl.when(warm).then((pl.col("temperature") - 32) / 1.8).otherwise(pl.col("temperature"))
    found = found.with_columns(pain=pain, temperature=celsius)
    for m in TRIAGE:
        plausible = pl.col(m.name).is_between(m.low, m.high)
        tally[f"triage: {m.name} outside its plausible range"] += found.filter(~plausible).height
        found = found.with_columns(pl.when(plausible).then(pl.col(m.name)).alias(m.name))
    return found.sort("order")


def triage_table(found: pl.DataFrame) -> Reader:
    """Reads the vital signs, pain and acuity of triage."""
    table = found.select(pl.col(m.name).cast(pl.Float64) for m in TRIAGE).fill_null(np.nan).to_numpy()
    rows = dict(zip(found["order"].to_list(), table, strict=True))

    def read(first: int, end: int) -> dict[int, Observation]:
        known = {order: rows[order] for order in range(first, end) if order in rows}
        return {order: _row(row) for order, row in known.items() if not np.isnan(row).all()}

    return read


def earlier_diagnoses(stays: pl.DataFrame, admissions: pl.DataFrame, diagnoses: pl.DataFrame) -> Reader:
    """Reads the diagnosis codes of hospital admissions that ended before this one began, oldest first, all at time 0.

    Those of the admission itself are given at discharge and are no input.
    """
    ended = admissions.select("subject_id", "hadm_id", end="dischtime")
    past = (
        stays.select("order", "subject_id", begin="admittime")
        .join(ended, on="subject_id")
        .filter(pl.col("end") <= pl.col("begin"))
        .join(diagnoses, on="hadm_id")
        .sort("order", "end", "hadm_id", "seq_num")
    )
    codes: dict[int, list[tuple[int, int]]] = {}
    for order, version, code in past.select("order", "icd_version", "icd_code").iter_rows():
        codes.setdefault(order, []).append((int(version == 10), code_id(f"{version}:{code}")))

    def read(first: int, end: int) -> dict[int, Observation]:
        return {
            order: Observation(np.array(codes[order], dtype=np.int32), np.zeros(len(codes[order]), dtype=np.float32))
            for order in range(first, end)
            if order in codes
        }

    return read


def read_diagnoses(release: Release, work: Work) -> pl.DataFrame:
    """Columns hadm_id, seq_num, icd_code, icd_version; rows without a code are left out."""
    path = work.note(release.tables["hosp/diagnoses_icd"])
    columns: dict[str, Any] = {
        "hadm_id": pl.Int64,
        "seq_num": pl.Int64,
        "icd_code": pl.String,
        "icd_version": pl.Int64,
    }
    return collect(scan_table(path, columns), path).drop_nulls()


def _row(values: NDArray[np.float64]) -> Observation:
    observed = ~np.isnan(values)
    return Observation(np.where(observed, values, 0.0).astype(np.float32)[None], None, observed[None])
