"""Raw folders of invented people for every source that reads one, in which chosen values can be edited."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from flame_moe.data.prepare import prepare
from tests import eicu_release, example_adni, example_embed, example_mimic, test_sources_cbis_ddsm, test_sources_oasis

SUBJECTS = 60
EARLY, LATE = 17.0, 40.0


@dataclass(frozen=True)
class Edit:
    """What differs from the plain folder.

    Attributes:
        subjects: whose values (not labels) from before the prediction are others.
        late: whether everybody's rows from after the prediction, and reports of the outcome, are others.
    """

    subjects: frozenset[str] = frozenset()
    late: bool = False


Raw = tuple[Path | None, dict[str, Any]]
Make = Callable[[Path, Edit], Raw]
"""Writes a raw folder; gives it with the options of the source."""


def value(subject: int, step: int, edited: bool) -> float:
    return 80.0 + subject + step + (EARLY if edited else 0.0)


def physionet2012(root: Path, edit: Edit) -> Raw:
    (root / "set-a").mkdir(parents=True)
    outcomes = ["RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"]
    for i in range(SUBJECTS):
        name = str(1000 + i)
        lines = [f"00:00,RecordID,{name}", "00:00,Age,60", "00:00,Gender,1", "00:00,Height,170", "00:00,ICUType,3"]
        lines += [f"{h:02}:00,HR,{value(i, h, name in edit.subjects)}" for h in range(1, 4)]
        (root / "set-a" / f"{name}.txt").write_text("\n".join(["Time,Parameter,Value", *lines, ""]))
        outcomes.append(f"{name},{5 + i % 7},{i % 5},{3 + i % 9},{-1 if i % 3 else 2},{int(i % 3 == 0)}")
    (root / "Outcomes-a.txt").write_text("\n".join([*outcomes, ""]))
    return root, {"sets": ["a"]}


def physionet2019(root: Path, edit: Edit) -> Raw:
    from flame_moe.data.sources._physionet2019_tables import COLUMNS, LABEL

    head = (*COLUMNS, LABEL)
    root.mkdir(parents=True)
    for i in range(SUBJECTS):
        rows = []
        for hour in range(1, 40 + 20 * (i % 2)):
            known = {
                "HR": value(i, hour, f"p{i}" in edit.subjects) + LATE * (edit.late and hour > 24),
                "Age": 50 + i,
                "Gender": i % 2,
                "ICULOS": hour,
            }
            known[LABEL] = int(i % 3 == 0 and hour > 36)
            rows.append("|".join(str(known.get(name, "NaN")) for name in head))
        (root / f"p{i}.psv").write_text("\n".join(["|".join(head), *rows, ""]))
    return root, {}


def meds(root: Path, edit: Edit) -> Raw:
    start = datetime(2030, 1, 1)
    events = [
        (
            i,
            start + timedelta(hours=h),
            f"LAB//{i % 4 + (50 if str(i) in edit.subjects or (edit.late and h > 2) else 0)}",
            value(i, h, False),
        )
        for i in range(SUBJECTS)
        for h in range(5)
    ]
    labels = [(i, start + timedelta(hours=2), i % 3 == 0) for i in range(SUBJECTS)]
    for path, rows, names in (
        ("data/0.parquet", events, ["subject_id", "time", "code", "numeric_value"]),
        ("labels/dies/0.parquet", labels, ["subject_id", "prediction_time", "boolean_value"]),
    ):
        (root / path).parent.mkdir(parents=True)
        pl.DataFrame(rows, schema=names, orient="row").write_parquet(root / path)
    return root, {}


def folder(root: Path, edit: Edit) -> Raw:
    root.mkdir(parents=True)
    samples = [f"s{i},p{i // 2},{40 + i},{int(i % 3 == 0)}" for i in range(2 * SUBJECTS)]
    rows = [f"s{i},{h},{value(i, h, f'p{i // 2}' in edit.subjects)}" for i in range(2 * SUBJECTS) for h in range(3)]
    (root / "samples.csv").write_text("\n".join(["id,subject,age,died", *samples, ""]))
    (root / "vitals.csv").write_text("\n".join(["id,hours,hr", *rows, ""]))
    (root / "flame.toml").write_text("""
        [samples]
        file = "samples.csv"
        subject = "subject"
        [modalities.vitals]
        kind = "series"
        file = "vitals.csv"
        time = "hours"
        columns = ["hr"]
        [tasks.died]
        kind = "binary"
        column = "died"
    """)
    return root, {}


def mimic_iv(root: Path, edit: Edit) -> Raw:
    hospital = example_mimic.Hospital()
    late = LATE * edit.late
    for i in range(1, SUBJECTS + 1):
        hadm, stay = 10 * i, 100 * i
        hospital.patient(i).admission(i, hadm, -2.0, 100.0, 70.0 if i % 3 == 0 else None)
        hospital.stay(i, hadm, stay, 0.0, 60.0)
        hospital.chart(stay, 0.5, value(i, 0, str(i) in edit.subjects), subject=i)
        hospital.chart(stay, 48.0, 75, subject=i).chart(stay, 48.01, 60 + late, subject=i)
        hospital.chart(stay, 47.5, 61 + late, subject=i, storetime=example_mimic.at(48.5))
        hospital.lab(i, 10, 1.0).lab(i, 47, 2 + late / 20, storetime=example_mimic.at(49)).lab(i, 50, 3 + late / 20)
        hospital.diagnosis(hadm, "A419" if edit.late else "I10", subject=i)
        text = "dead" if edit.late else "alive"
        hospital.note("radiology", f"{i}-r", 20, "clear lungs", i).note("radiology", f"{i}-l", 49, text, i)
        hospital.note("discharge", f"{i}-d", 100, text, i, hadm_id=hadm)
    return hospital.write(root), {"tasks": ["ihm"]}


def eicu(root: Path, edit: Edit) -> Raw:
    late = LATE * edit.late
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in eicu_release.TABLES}
    tables["hospital"] = eicu_release.TABLES["hospital"]
    for i in range(1, SUBJECTS + 1):
        key = {"patientunitstayid": i}
        dead = {"unitdischargestatus": "Expired", "unitdischargelocation": "Death"} if i % 3 == 0 else {}
        tables["patient"].append(eicu_release.patient(i, **dead))
        first = value(i, 0, f"002-{i}" in edit.subjects)
        rates = ((0, first), (1440, 80), (1441, 60 + late))
        tables["vitalPeriodic"] += [key | {"observationoffset": m, "heartrate": v} for m, v in rates]
        results = ((30, 70, 140.0), (1430, 1441, 100 + late), (1500, 1500, 101 + late))
        tables["lab"] += [
            key | {"labname": "sodium", "labresultoffset": a, "labresultrevisedoffset": b, "labresult": v}
            for a, b, v in results
        ]
        word = "terminal" if edit.late else "routine"
        tables["diagnosis"] += [
            key | {"diagnosisoffset": 10, "diagnosisstring": "renal", "activeupondischarge": str(edit.late)},
            key | {"diagnosisoffset": 1441, "diagnosisstring": word},
        ]
        tables["treatment"].append(key | {"treatmentoffset": 1441, "treatmentstring": word})
        order = {"drugorderoffset": 1441, "drugstartoffset": 20, "drugname": word.upper()}
        tables["medication"].append(key | order)
        tables["infusiondrug"].append(key | {"infusionoffset": 1441, "drugname": word})
        written = {"noteoffset": 20, "notetype": "Admission"}
        tables["note"] += [
            key | written | {"noteenteredoffset": 35, "notepath": "notes/Progress Notes/a/smoker"},
            key | written | {"noteenteredoffset": 1441, "notepath": f"notes/Progress Notes/a/{word}"},
        ]
        tables["apachePatientResult"].append(key | {"predictedicumortality": 0.9 if edit.late else 0.1})
    return eicu_release.write_release(root, tables), {"tasks": ["mortality"]}


def embed(root: Path, edit: Edit) -> Raw:
    """Every woman has an exam and, two years on, another one that may have led to a diagnosis."""
    release = example_embed.Release(root)
    for i in range(SUBJECTS):
        woman = f"w{i}"
        report = {"asses": "NBA"[i % 3], "tissueden": 1 + i % 4}
        if edit.late:
            report = {"asses": "BAN"[i % 3], "tissueden": 1 + (i + 1) % 4, "implanfind": "3"}
        age = 40 + i % 30 + (EARLY if woman in edit.subjects else 0)
        release.finding(woman, f"e{i}", age_at_study=age, **report)
        path = release.picture(woman, f"e{i}", "L", "ffdm_cc")
        if woman in edit.subjects:
            Image.fromarray(np.full((8, 6), 200, dtype=np.uint8)).save(path)
        cancer = {"path_severity": i % 2, "bside": "L", "pdate_anon": example_embed.after(740)}
        later = {"asses": "M" if edit.late else "N", **(cancer if i % 3 == int(edit.late) else {})}
        day = example_embed.after(730)
        release.finding(woman, f"later{i}", day=day, age_at_study=70 + (LATE / 4) * edit.late, **later)
        release.picture(woman, f"later{i}", "L", "cview_mlo", day=day)
    options = {"path_column": "png_filename", "size": [8, 6], "pictures": str(root / "images")}
    return release.write(), options | {"short_followup": "negative"}


def adni(root: Path, edit: Edit) -> Raw:
    root.mkdir(parents=True)
    example_adni.cohort(root, SUBJECTS, images=False)
    for name, column, early in (("UCSFFSX7", "ST29SV", 1), ("VITALS", "VSBPSYS", 1), ("MMSE", "MMSCORE", 0)):
        path = root / f"{name}_12Mar2024.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        for row in rows:
            if row["PTID"] in edit.subjects and row[column]:
                row[column] = str(float(row[column]) + EARLY * early)
        late = (
            {"UCSFFSX7": "4000", "VITALS": "190", "MMSE": "10"} if edit.late else dict.fromkeys(("UCSFFSX7",), "1000")
        )
        if name in late:
            for rid in range(1, SUBJECTS + 1):
                when = {"EXAMDATE" if name == "UCSFFSX7" else "VISDATE": "2022-01-01", column: late[name]}
                extra = {"OVERALLQC": "Pass"} if name == "UCSFFSX7" else {}
                rows.append({"RID": str(rid), "VISCODE": "m99", "VISCODE2": "m99", **when, **extra})
        if rows:
            kept = [{k: v for k, v in row.items() if k in example_adni.SCHEMA[name] and v} for row in rows]
            example_adni.write(root, name, kept)
    return root, {}


def oasis(root: Path, edit: Edit) -> Raw:
    root.mkdir(parents=True)
    lines = []
    for i in range(SUBJECTS):
        group = "Converted" if i % 3 == 0 else "Nondemented"
        grown = (EARLY if f"OAS2_{i:04d}" in edit.subjects else 0) + i
        last = {"etiv": f"{1500 + LATE * edit.late}", "mmse": "12" if edit.late else "28"}
        lines.append(test_sources_oasis.visit(i, 1, 0, "0", group, etiv=f"{1400 + grown}"))
        lines.append(test_sources_oasis.visit(i, 2, 700, str((0.5, 0, 1)[i % 3] if i % 3 != 1 else 0), group, **last))
    test_sources_oasis.longitudinal(root, *lines)
    return root, {}


def cbis_ddsm(root: Path, edit: Edit) -> Raw:
    rows = []
    for i in range(SUBJECTS):
        shape, rating = ("ROUND", 5) if f"P_{i}" in edit.subjects else ("OVAL", 1 + i % 4)
        turn = i + edit.late
        report = {"pathology": ("BENIGN", "MALIGNANT")[turn % 2], "assessment": (2, 3, 5)[turn % 3]}
        row = {"patient_id": f"P_{i}", "mass shape": shape, "subtlety": rating, "breast_density": 1 + turn % 4}
        rows.append(row | report)
    root.mkdir(parents=True)
    test_sources_cbis_ddsm.write(root, "mass", "train", *rows)
    return root, {}


def join(root: Path, edit: Edit) -> Raw:
    parts = {}
    for alias, source in (("mine", folder), ("theirs", physionet2019)):
        own = frozenset(s.split("/", 1)[1] for s in edit.subjects if s.startswith(f"{alias}/"))
        raw, options = source(root / alias, Edit(own, edit.late))
        store = prepare(source.__name__, raw, root / f"{alias}-store", options=options)
        parts[alias] = {"store": str(store.path)}
    return None, {"parts": parts}


SOURCES: dict[str, Make] = {
    make.__name__: make
    for make in (
        *(physionet2012, physionet2019, meds, folder, mimic_iv, eicu, embed, adni, oasis, cbis_ddsm),
        join,
    )
}
