"""Releases of MIMIC-IV with invented patients, written table by table in the real layout."""

from __future__ import annotations

import csv
import gzip
import io
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.mimic_iv import SOURCE, MimicIvOptions
from flame_moe.data.work import Work

COLUMNS = {
    "hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admission_location,"
    "discharge_location,hospital_expire_flag",
    "hosp/labevents": "labevent_id,subject_id,hadm_id,itemid,charttime,storetime,value,valuenum,valueuom,flag",
    "hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "icu/chartevents": "subject_id,hadm_id,stay_id,charttime,storetime,itemid,value,valuenum,valueuom,warning",
    "ed/edstays": "subject_id,hadm_id,stay_id,intime,outtime,disposition",
    "ed/triage": "subject_id,stay_id,temperature,heartrate,resprate,o2sat,sbp,dbp,pain,acuity,chiefcomplaint",
    "note/radiology": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text",
    "note/discharge": "note_id,subject_id,hadm_id,note_type,note_seq,charttime,storetime,text",
    "mimic-cxr-2.0.0-metadata": "dicom_id,subject_id,study_id,ViewPosition,Rows,StudyDate,StudyTime",
}
CORE = ("hosp/patients", "hosp/admissions", "hosp/labevents", "icu/icustays", "icu/chartevents", "hosp/diagnoses_icd")
START = datetime(2150, 1, 1)
HR, CREATININE, MCHC, VERBAL = 220045, 50912, 51249, 223900


def at(hours: float | None) -> str:
    """A time as the release writes it, in hours from the start of 2150; None: empty."""
    return "" if hours is None else (START + timedelta(seconds=round(hours * 3600))).strftime("%Y-%m-%d %H:%M:%S")


class Hospital:
    """Rows by table; every method adds one and returns the hospital."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def add(self, table: str, **row: Any) -> Hospital:
        self.rows[table].append(row)
        return self

    def patient(self, subject: int, *, age: int = 60, year: int = 2150, sex: str = "F", dod: str = "") -> Hospital:
        return self.add("hosp/patients", subject_id=subject, gender=sex, anchor_age=age, anchor_year=year, dod=dod)

    def admission(
        self, subject: int, hadm: int, begin: float, end: float | None, death: float | None = None, **more: Any
    ) -> Hospital:
        row = {"admission_type": "EW EMER.", "admission_location": "EMERGENCY ROOM", **more}
        times = {"admittime": at(begin), "dischtime": at(end), "deathtime": at(death)}
        died = int(death is not None)
        return self.add(
            "hosp/admissions", subject_id=subject, hadm_id=hadm, hospital_expire_flag=died, **{**times, **row}
        )

    def stay(self, subject: int, hadm: int, stay: int, begin: float, end: float | None, **more: Any) -> Hospital:
        row = {"first_careunit": "Coronary Care Unit (CCU)", "intime": at(begin), "outtime": at(end), **more}
        return self.add("icu/icustays", subject_id=subject, hadm_id=hadm, stay_id=stay, **row)

    def chart(
        self, stay: int, hours: float, value: Any, item: int = HR, unit: str = "bpm", subject: int = 1, **more: Any
    ) -> Hospital:
        row = {"charttime": at(hours), "itemid": item, "value": value, "valuenum": value, "valueuom": unit, **more}
        return self.add("icu/chartevents", subject_id=subject, stay_id=stay, **row)

    def lab(
        self, subject: int, hours: float, value: Any, item: int = CREATININE, unit: str = "mg/dL", **more: Any
    ) -> Hospital:
        row = {"charttime": at(hours), "itemid": item, "value": value, "valuenum": value, "valueuom": unit, **more}
        return self.add("hosp/labevents", subject_id=subject, **row)

    def diagnosis(self, hadm: int, code: str, version: int = 10, subject: int = 1) -> Hospital:
        n = sum(row["hadm_id"] == hadm for row in self.rows["hosp/diagnoses_icd"])
        row = {"seq_num": n + 1, "icd_code": code, "icd_version": version}
        return self.add("hosp/diagnoses_icd", subject_id=subject, hadm_id=hadm, **row)

    def note(self, table: str, note: str, hours: float, text: str, subject: int = 1, **more: Any) -> Hospital:
        row = {"charttime": at(hours), "storetime": at(hours), "text": text, **more}
        return self.add(f"note/{table}", note_id=note, subject_id=subject, **row)

    def write(self, folder: Path, *, packed: bool = False, without: Sequence[str] = ()) -> Path:
        """The tables that have rows and those that every release has."""
        for table in {*CORE, *self.rows} - set(without):
            path = folder / f"{table}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS[table].split(","), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows[table])
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text.getvalue().encode()))
            else:
                path.write_text(text.getvalue(), encoding="utf-8")
        return folder


def one_stay(
    hours: float = 60.0, discharge: float | None = 100.0, death: float | None = None, **patient: Any
) -> Hospital:
    """Patient 1, admission 10 from hour -2, stay 100 from hour 0, with one heart rate in the first hour."""
    hospital = Hospital().patient(1, **patient).admission(1, 10, -2.0, discharge, death)
    return hospital.stay(1, 10, 100, 0.0, hours).chart(100, 0.5, 80)


def read(raw: Path, funnel: Funnel | None = None, **options: Any) -> list[Sample]:
    """The samples of a release; steps are kept beside it."""
    chosen = MimicIvOptions.parse(options, where="test")
    return list(SOURCE.read(raw, chosen, Funnel() if funnel is None else funnel, Work(raw.with_name("steps"))))
