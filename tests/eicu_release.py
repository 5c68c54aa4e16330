"""A small eICU-CRD release written by hand: the real columns, invented patients."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.eicu import SOURCE, EicuOptions
from flame_moe.data.work import Work

Rows = Sequence[Mapping[str, Any]]

COLUMNS: dict[str, str] = {
    "patient": "patientunitstayid,patienthealthsystemstayid,gender,age,ethnicity,hospitalid,wardid,apacheadmissiondx,"
    "admissionheight,hospitaladmittime24,hospitaladmitoffset,hospitaladmitsource,hospitaldischargeyear,"
    "hospitaldischargetime24,hospitaldischargeoffset,hospitaldischargelocation,hospitaldischargestatus,unittype,"
    "unitadmittime24,unitadmitsource,unitvisitnumber,unitstaytype,admissionweight,dischargeweight,"
    "unitdischargetime24,unitdischargeoffset,unitdischargelocation,unitdischargestatus,uniquepid",
    "hospital": "hospitalid,numbedscategory,teachingstatus,region",
    "vitalPeriodic": "vitalperiodicid,patientunitstayid,observationoffset,temperature,sao2,heartrate,respiration,cvp,"
    "etco2,systemicsystolic,systemicdiastolic,systemicmean,pasystolic,padiastolic,pamean,st1,st2,st3,icp",
    "vitalAperiodic": "vitalaperiodicid,patientunitstayid,observationoffset,noninvasivesystolic,noninvasivediastolic,"
    "noninvasivemean,paop,cardiacoutput,cardiacinput,svr,svri,pvr,pvri",
    "lab": "labid,patientunitstayid,labresultoffset,labtypeid,labname,labresult,labresulttext,labmeasurenamesystem,"
    "labmeasurenameinterface,labresultrevisedoffset",
    "diagnosis": "diagnosisid,patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring,icd9code,"
    "diagnosispriority",
    "treatment": "treatmentid,patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge",
    "medication": "medicationid,patientunitstayid,drugorderoffset,drugstartoffset,drugivadmixture,drugordercancelled,"
    "drugname,drughiclseqno,dosage,routeadmin,frequency,loadingdose,prn,drugstopoffset,gtc",
    "admissionDx": "admissiondxid,patientunitstayid,admitdxenteredoffset,admitdxpath,admitdxname,admitdxtext",
    "infusiondrug": "infusiondrugid,patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,"
    "volumeoffluid,patientweight",
    "pastHistory": "pasthistoryid,patientunitstayid,pasthistoryoffset,pasthistoryenteredoffset,pasthistorynotetype,"
    "pasthistorypath,pasthistoryvalue,pasthistoryvaluetext",
    "note": "noteid,patientunitstayid,noteoffset,noteenteredoffset,notetype,notepath,notevalue,notetext",
    "respiratoryCharting": "respchartid,patientunitstayid,respchartoffset,respchartentryoffset,respcharttypecat,"
    "respchartvaluelabel,respchartvalue",
    "intakeOutput": "intakeoutputid,patientunitstayid,intakeoutputoffset,intaketotal,outputtotal,dialysistotal,"
    "nettotal,intakeoutputentryoffset,cellpath,celllabel,cellvaluenumeric,cellvaluetext",
    "apacheApsVar": "apacheapsvarid,patientunitstayid,intubated,vent,dialysis,eyes,motor,verbal,meds,urine,wbc,"
    "temperature,respiratoryrate,sodium,heartrate,meanbp,ph,hematocrit,creatinine,albumin,pao2,pco2,bun,glucose,"
    "bilirubin,fio2",
    "apachePatientResult": "apachepatientresultsid,patientunitstayid,physicianspeciality,acutephysiologyscore,"
    "apachescore,apacheversion,predictedicumortality,actualicumortality,actualiculos,actualhospitalmortality",
}


def patient(stay: int, **changes: Any) -> dict[str, Any]:
    """A woman of 60 who stays 48 hours and leaves alive; her admission and person are her own."""
    row = {
        "patientunitstayid": stay,
        "patienthealthsystemstayid": 100_000 + stay,
        "uniquepid": f"002-{stay}",
        "gender": "Female",
        "age": "60",
        "ethnicity": "Asian",
        "hospitalid": 7,
        "admissionheight": 165.1,
        "admissionweight": 70.5,
        "hospitaladmitoffset": -90,
        "hospitaldischargeyear": 2015,
        "hospitaldischargeoffset": 9000,
        "hospitaldischargestatus": "Alive",
        "unittype": "MICU",
        "unitadmitsource": "Floor",
        "unitvisitnumber": 1,
        "unitstaytype": "admit",
        "dischargeweight": 69.0,
        "unitdischargeoffset": 2880,
        "unitdischargelocation": "Floor",
        "unitdischargestatus": "Alive",
    }
    return row | changes


def write_release(folder: Path, tables: Mapping[str, Rows]) -> Path:
    """The tables as CSV with their real header; columns that a row leaves out are empty."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS[name].split(","), restval="")
            writer.writeheader()
            writer.writerows({"patientunitstayid": 1} | row if name != "hospital" else row for row in rows)
    return folder


def samples(folder: Path, **options: Any) -> tuple[dict[str, Sample], Funnel]:
    """Samples by id, and the funnel."""
    funnel, chosen = Funnel(), EicuOptions.parse(options, where="options")
    work = Work(folder.parent / f".{folder.name}.steps")
    found = {sample.id: sample for sample in SOURCE.read(folder, chosen, funnel, work)}
    work.clear()
    return found, funnel


def column(sample: Sample, folder: Path, modality: str, channel: str, **options: Any) -> list[float | None]:
    """Values of one channel in order, None where not observed."""
    described, _ = SOURCE.describe(folder, EicuOptions.parse(options, where="options"))
    at = next(m for m in described if m.name == modality).channels.index(channel)
    values, _, observed = sample.modalities[modality]
    assert observed is not None
    return [float(v) if seen else None for v, seen in zip(values[:, at], observed[:, at], strict=True)]


TABLES: dict[str, list[dict[str, Any]]] = {
    "patient": [patient(1), patient(2, unitdischargestatus="Expired", unitdischargelocation="Death")],
    "hospital": [{"hospitalid": 7, "numbedscategory": "250 - 499", "teachingstatus": "t", "region": "West"}],
    "vitalPeriodic": [{"observationoffset": minute, "heartrate": 80 + minute / 60} for minute in (-361, -360, 0, 1440)],
    "vitalAperiodic": [{"observationoffset": 0, "noninvasivemean": 75}],
    "lab": [
        {"labname": "sodium", "labresultoffset": 30, "labresultrevisedoffset": 70, "labresult": 140},
        {"labname": "sodium", "labresultoffset": 1430, "labresultrevisedoffset": 1440, "labresult": 141},
        {"labname": "sodium", "labresultoffset": 1431, "labresultrevisedoffset": 1441, "labresult": 142},
    ],
    "diagnosis": [{"diagnosisoffset": 10, "diagnosisstring": "Renal|Failure", "activeupondischarge": "True"}],
    "treatment": [{"treatmentoffset": -2000, "treatmentstring": "renal|dialysis", "activeupondischarge": "False"}],
    "medication": [{"drugorderoffset": 50, "drugstartoffset": 20, "drugname": "ASPIRIN  81 MG", "drughiclseqno": 1820}],
    "note": [
        {
            "noteoffset": 20,
            "noteenteredoffset": 35,
            "notetype": "Admission",
            "notepath": "notes/Progress Notes/Social History/Smoking Status/current smoker",
            "notetext": "current smoker",
        }
    ],
    "admissionDx": [{"admitdxenteredoffset": 5, "admitdxpath": "admission diagnosis|Sepsis"}],
    "infusiondrug": [{"infusionoffset": 1440, "drugname": "Propofol (ml/hr)"}],
    "pastHistory": [{"pasthistoryoffset": 1, "pasthistoryenteredoffset": 9, "pasthistorypath": "COPD"}],
    "respiratoryCharting": [
        {"respchartoffset": 60, "respchartentryoffset": 65, "respchartvaluelabel": "FiO2", "respchartvalue": "40%"}
    ],
    "intakeOutput": [
        {
            "intakeoutputoffset": 60,
            "intakeoutputentryoffset": 60,
            "cellpath": "flowsheet|Flowsheet Cell Labels|I&O|Output (ml)|Urine",
            "cellvaluenumeric": 200,
        }
    ],
    "apacheApsVar": [{"intubated": 0, "heartrate": 104, "temperature": -1, "urine": 1500.5}],
    "apachePatientResult": [{"actualicumortality": "ALIVE", "predictedicumortality": 0.01}],
}


def release(tmp_path: Path, **tables: list[dict[str, Any]]) -> Path:
    return write_release(tmp_path / "raw", {**TABLES, **tables})
