"""MIMIC-IV: the first 48 hours of intensive-care stays of adults, from the tables as published.

Johnson, Bulgarelli, Shen, Gayles, Shammout, Horng, Pollard, Hao, Moody, Gow, Lehman, Celi and Mark, Scientific Data
10:1, 2023. Read from a folder that holds `hosp` and `icu`, or folders with them as the releases unpack; notes, the
emergency department and chest X-rays are used where their tables are there.

    vitals       series: nine vital signs                     static     table: age, sex, how and where admitted
    labs         series: 21 laboratory values of blood        triage     table: emergency department, before the stay
    radiology    timed: radiology reports of the stay         complaint  timed: chief complaint at triage
    history      timed: summaries of earlier admissions       diagnoses  codes: of earlier admissions
    cxr          image or timed: chest X-rays of the stay     cxr_reports  timed: their reports

A sample is the first stay of a hospital admission and serves all tasks. Nothing is used that happened or was recorded
after the prediction time: 48 h after admission to the unit, or the end of the stay if that is earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources import _mimic_describe as describing
from flame_moe.data.sources import _mimic_tables as tables
from flame_moe.data.sources._mimic_cohort import add_labels, read_admissions, read_cohort
from flame_moe.data.sources._mimic_cxr import picture_loader, pictures, reports, studies, vector_loader
from flame_moe.data.sources._mimic_events import Reader, first_hours, labs, series, vitals, whole_stay
from flame_moe.data.sources._mimic_files import OPTIONAL, Release, locate
from flame_moe.data.sources._mimic_notes import complaints, history, notes, radiology
from flame_moe.data.sources._mimic_phenotypes import PHENOTYPES, Phenotyper
from flame_moe.data.sources._mimic_variables import LABS, VITALS
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.text import TextOptions
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

PART = 2048
"""Stays that are held in memory at a time."""

TaskName = Literal["ihm", "los", "pheno", "readmission"]


class MimicIvOptions(Description):
    """How MIMIC-IV is read.

    Attributes:
        tasks: which tasks the store has.
        los: "remaining": more than 7 more days in the unit after the 48 h (paper); "short": left the unit alive within
            96 h of admission to it (published code).
        pheno_window: "first48": pheno reads what the other tasks read; "stay": it reads modalities of the whole stay,
            which are added to the store (published code).
        readmission: which admissions count: "all", or "unplanned", without elective and same-day surgical ones.
        before_hours: also read laboratory values, radiology reports and X-rays of so many hours before the stay, within
            the same hospital admission for laboratory values; times then count from there.
        arterial: also read blood pressures of arterial lines, into the channels of the cuff pressures.
        diagnoses: whether to read the diagnosis codes of earlier admissions.
        text: how notes become vectors.
        most_notes: how many of the last notes of a kind are kept.
        cxr_vectors: file of vectors of X-rays by dicom_id, .npz or .parquet, absolute or below the raw folder; without
            it pictures are read.
        cxr_size: height and width of pictures, in pixels.
        cxr_views: which views are read; empty for all.
        most_pictures: how many of the last pictures are kept.
        cxr_reports: whether to read the reports of MIMIC-CXR, which are the radiology reports of MIMIC-IV-Note again.
        report_delay: hours after its study at which such a report is taken to be written: the release does not say.
        seed: decides the split.
    """

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = ("ihm", "los", "pheno", "readmission")
    los: Literal["remaining", "short"] = "remaining"
    pheno_window: Literal["first48", "stay"] = "first48"
    readmission: Literal["all", "unplanned"] = "all"
    before_hours: Annotated[float, Field(ge=0, le=24)] = 0.0
    arterial: bool = False
    diagnoses: bool = True
    text: TextOptions = TextOptions()
    most_notes: Annotated[int, Field(ge=1)] = 5
    cxr_vectors: str | None = None
    cxr_size: Annotated[int, Field(ge=8, le=1024)] = 64
    cxr_views: tuple[str, ...] = ("PA", "AP")
    most_pictures: Annotated[int, Field(ge=1)] = 5
    cxr_reports: bool = False
    report_delay: Annotated[float, Field(ge=0)] = 24.0
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: MimicIvOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """The modalities whose tables are there, and the tasks that can be labelled; looks at names of files only.

    Raises:
        DataError: if a needed table is missing, or there are two of one.
        ExtraMissingError: if the task pheno is made and the extra `mimic` is not installed.
    """
    return describing.describe(_locate(raw), options)


def read(raw: Path | None, options: MimicIvOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the stays, one sample each, and count every rule and everything that is left out.

    Raises:
        DataError: with file and column, if a table is missing, damaged or has a cell that cannot be read.
    """
    release = _locate(raw)
    for name, (product, what) in OPTIONAL.items():
        if name not in release:
            funnel.count(f"table {name} of {product} absent: {what} left out")
    admissions = read_admissions(release, funnel, work)
    stays = read_cohort(release, admissions, funnel, work)
    stays = add_labels(stays, admissions, funnel, los=options.los, readmission=options.readmission)
    if stays.is_empty():
        raise DataError("no stay is left after the rules of the cohort", where=str(raw), mend="Look at icu/icustays.")
    modalities, tasks = describing.describe(release, options)
    tally: Counter[str] = Counter()
    diagnoses = tables.read_diagnoses(release, work) if "hosp/diagnoses_icd" in release else None
    readers = _readers(release, options, stays, work, tally)
    if diagnoses is not None and options.diagnoses:
        readers["diagnoses"] = tables.earlier_diagnoses(stays, admissions, diagnoses)
    phenotypes = _phenotypes(diagnoses, stays, tally) if any(t.name == "pheno" for t in tasks) else {}
    assert set(readers) == {m.name for m in modalities}
    rows = stays.select("order", "stay_id", "subject_id", "hadm_id", "ihm", "los", "readmission")
    kept = 0
    for first in range(0, stays.height, PART):
        work.say("stays", first / stays.height)
        part = rows.slice(first, PART)
        found = {name: reader(first, first + part.height) for name, reader in readers.items()}
        for row in part.iter_rows(named=True):
            have = {name: by_order[row["order"]] for name, by_order in found.items() if row["order"] in by_order}
            if not have.keys() & {"vitals", "labs"}:
                continue
            kept += 1
            targets = {t.name: _target(t.name, row, phenotypes) for t in tasks}
            for name, target in targets.items():
                tally[f"no label for {name}"] += target is None
            known = {name: target for name, target in targets.items() if target is not None}
            yield Sample(str(row["stay_id"]), str(row["subject_id"]), have, known)
    funnel.rule("has a vital sign or laboratory value before the prediction time", kept)
    for text in sorted(tally):
        if tally[text]:
            funnel.count(text, tally[text])


def split(options: MimicIvOptions) -> SplitSpec:
    """70/10/20 by patient."""
    return SplitSpec(seed=options.seed)


def _locate(raw: Path | None) -> Release:
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds hosp and icu.")
    return locate(raw)


def _readers(
    release: Release, options: MimicIvOptions, stays: pl.DataFrame, work: Work, tally: Counter[str]
) -> dict[str, Reader]:
    """Modality -> its reader; those that follow the stay in every window that a task needs."""
    before, text, most = options.before_hours, options.text, options.most_notes
    charted = vitals(release, stays, work, arterial=options.arterial)
    measured = labs(release, stays, work, before_hours=before)
    reported = radiology(release, stays, work, before_hours=before) if "note/radiology" in release else None
    taken = studies(release, stays, work, before_hours=before) if describing.has_studies(release, options) else None
    readers: dict[str, Reader] = {}
    for window in [first_hours(stays, before), whole_stay(stays, before)]:
        end = window.suffix
        if end and not describing.needs_whole_stay(release, options):
            continue
        readers[f"vitals{end}"] = series(f"vitals{end}", charted, VITALS, window, tally)
        readers[f"labs{end}"] = series(f"labs{end}", measured, LABS, window, tally, begin=window.begin)
        if reported is not None:
            readers[f"radiology{end}"] = notes(f"radiology{end}", reported, window, text, most, work, tally)
        if taken is not None and describing.has_pictures(release, options):
            load = _loader(release, options)
            args = (options.cxr_views, window, options.most_pictures, load, tally)
            readers[f"cxr{end}"] = pictures(f"cxr{end}", taken, *args)
        if taken is not None and release.files is not None and options.cxr_reports:
            name = f"cxr_reports{end}"
            readers[name] = reports(name, taken, release.files, window, options.report_delay, text, work, tally)
    readers["static"] = tables.static(stays)
    if describing.has_triage(release):
        found = tables.emergency(release, stays, work, tally)
        readers["triage"] = tables.triage_table(found)
        readers["complaint"] = complaints(found, text, work)
    if "note/discharge" in release:
        readers["history"] = notes("history", history(release, stays, work), None, text, most, work, tally)
    return readers


def _loader(release: Release, options: MimicIvOptions) -> describing.Vectors:
    path = describing.vector_file(release, options)
    if path is not None:
        return vector_loader(path)
    assert release.files is not None
    return picture_loader(release.files, options.cxr_size)


def _phenotypes(
    diagnoses: pl.DataFrame | None, stays: pl.DataFrame, tally: Counter[str]
) -> dict[int, NDArray[np.float32]]:
    """Admission -> (25,) of 0 and 1; admissions without a diagnosis are not in it."""
    if diagnoses is None:
        return {}
    own = diagnoses.filter(pl.col("hadm_id").is_in(stays["hadm_id"].implode()))
    phenotyper = Phenotyper()
    found: dict[int, NDArray[np.float32]] = {}
    for admission, code, version in own.select("hadm_id", "icd_code", "icd_version").iter_rows():
        label = found.setdefault(admission, np.zeros(len(PHENOTYPES), dtype=np.float32))
        positions = phenotyper.of(code, version)
        tally["diagnosis code that no table of phenotypes knows"] += positions is None
        label[list(positions or ())] = 1.0
    return found


def _target(task: str, row: dict[str, Any], phenotypes: dict[int, NDArray[np.float32]]) -> NDArray[np.float32] | None:
    if task == "pheno":
        return phenotypes.get(row["hadm_id"])
    return None if row[task] is None else np.array([row[task]], dtype=np.float32)


SOURCE = Source(
    name="mimic_iv",
    summary="MIMIC-IV: first 48 h of adult intensive-care stays; vitals, labs, notes, X-rays, triage; four tasks.",
    needs_raw=True,
    options=MimicIvOptions,
    describe=describe,
    read=read,
    split=split,
)
