"""What a store of MIMIC-IV holds: modalities of the tables that are there, tasks that can be labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame_moe.data.sources._mimic_cxr import Vectors, vector_width
from flame_moe.data.sources._mimic_files import METADATA, Release
from flame_moe.data.sources._mimic_phenotypes import PHENOTYPES, need_mappings
from flame_moe.data.sources._mimic_tables import DIAGNOSIS_TYPES, STATIC, TRIAGE
from flame_moe.data.sources._mimic_variables import LABS, VITALS, Channel
from flame_moe.data.text import text_modality
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

if TYPE_CHECKING:
    from flame_moe.data.sources.mimic_iv import MimicIvOptions

__all__ = ["Vectors", "describe", "has_pictures", "has_studies", "has_triage", "needs_whole_stay", "vector_file"]


def describe(release: Release, options: MimicIvOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Modalities and tasks; a task reads every modality of its window.

    Raises:
        DataError: if no task is left, or the file of X-ray vectors cannot be used.
        ExtraMissingError: if pheno is made and the extra `mimic` is not installed.
    """
    followed, fixed = _followed(release, options, ""), _fixed(release, options)
    modalities = followed + fixed
    names = {"": tuple(m.name for m in modalities)}
    if needs_whole_stay(release, options):
        whole = _followed(release, options, "_stay")
        modalities += whole
        names["_stay"] = tuple(m.name for m in (*whole, *fixed))
    wanted = [name for name in options.tasks if name != "pheno" or "hosp/diagnoses_icd" in release]
    if not wanted:
        mend = "Get hosp/diagnoses_icd, or name another task."
        raise DataError("the task pheno needs the table 'hosp/diagnoses_icd', which is absent", mend=mend)
    if "pheno" in wanted:
        need_mappings()
    tasks = []
    for name in dict.fromkeys(wanted):
        reads = names["_stay" if name == "pheno" and needs_whole_stay(release, options) else ""]
        tasks.append(Task.parse({**_task(name, options), "name": name, "modalities": reads}, where=f"tasks.{name}"))
    return tuple(modalities), tuple(tasks)


def needs_whole_stay(release: Release, options: MimicIvOptions) -> bool:
    """Whether a task reads more than the first 48 h."""
    return options.pheno_window == "stay" and "pheno" in options.tasks and "hosp/diagnoses_icd" in release


def has_triage(release: Release) -> bool:
    """Whether the emergency department is there."""
    return "ed/edstays" in release and "ed/triage" in release


def has_studies(release: Release, options: MimicIvOptions) -> bool:
    """Whether anything of MIMIC-CXR is read."""
    return has_pictures(release, options) or _has_reports(release, options)


def has_pictures(release: Release, options: MimicIvOptions) -> bool:
    """Whether there are X-rays, as pictures or as vectors.

    Raises:
        DataError: if vectors are asked for and there is no metadata to place them in time.
    """
    if options.cxr_vectors is not None and METADATA not in release:
        what = f"vectors of X-rays are given, but the table '{METADATA}' is missing"
        raise DataError(what, where=options.cxr_vectors, mend="It is part of MIMIC-CXR-JPG.")
    return METADATA in release and (release.files is not None or options.cxr_vectors is not None)


def vector_file(release: Release, options: MimicIvOptions) -> Path | None:
    """The file of X-ray vectors, if the options name one.

    Raises:
        DataError: if it is not there.
    """
    if options.cxr_vectors is None:
        return None
    path = release.root / options.cxr_vectors
    if not path.is_file():
        raise DataError("there is no file of X-ray vectors", where=str(path), mend="Check the option cxr_vectors.")
    return path


def _has_reports(release: Release, options: MimicIvOptions) -> bool:
    return METADATA in release and release.files is not None and options.cxr_reports


def _followed(release: Release, options: MimicIvOptions, suffix: str) -> list[Modality]:
    """Modalities that follow the stay in a window."""
    when = "of the whole stay" if suffix else "of the first 48 h"
    found = [
        _series("vitals", VITALS, suffix, f"vital signs {when} at their irregular times"),
        _series("labs", LABS, suffix, f"laboratory values of blood {when} at their irregular times"),
    ]
    if "note/radiology" in release:
        found.append(text_modality(f"radiology{suffix}", options.text, f"radiology reports {when}"))
    if has_pictures(release, options):
        path = vector_file(release, options)
        about: dict[str, Any] = {"name": f"cxr{suffix}", "description": f"chest X-rays {when}"}
        size = options.cxr_size
        if path is not None:
            found.append(Modality(kind="timed", features=vector_width(path), **about))
        else:
            found.append(Modality(kind="image", features=size * size, shape=(size, size, 1), **about))
    if _has_reports(release, options):
        found.append(text_modality(f"cxr_reports{suffix}", options.text, f"reports of chest X-rays {when}"))
    return found


def _fixed(release: Release, options: MimicIvOptions) -> list[Modality]:
    """Modalities that are known when the stay begins."""
    found = [_table("static", STATIC, "age, sex, how and where admitted, earlier admissions: known at admission")]
    if has_triage(release):
        columns = [(m.name, m.unit) for m in TRIAGE]
        found.append(_table("triage", columns, "vital signs, pain and acuity at triage in the emergency department"))
        found.append(text_modality("complaint", options.text, "chief complaint at triage"))
    if "note/discharge" in release:
        found.append(text_modality("history", options.text, "discharge summaries of earlier admissions"))
    if options.diagnoses and "hosp/diagnoses_icd" in release:
        what = "diagnosis codes of earlier admissions"
        found.append(Modality(name="diagnoses", kind="codes", features=2, types=DIAGNOSIS_TYPES, description=what))
    return found


def _series(name: str, channels: Sequence[Channel], suffix: str, description: str) -> Modality:
    return Modality(
        name=f"{name}{suffix}",
        kind="series",
        features=len(channels),
        channels=tuple(c.name for c in channels),
        units=tuple(c.unit for c in channels),
        description=description,
        scaling="quantile",
    )


def _table(name: str, columns: Sequence[tuple[str, str]], description: str) -> Modality:
    return Modality(
        name=name,
        kind="table",
        features=len(columns),
        channels=tuple(column for column, _ in columns),
        units=tuple(unit for _, unit in columns),
        description=description,
        scaling="quantile",
    )


_OUTLIVED = "Stays of at least 48 h whose patient was alive at their 48th hour; others have no label."


def _task(name: str, options: MimicIvOptions) -> Mapping[str, Any]:
    tasks: dict[str, Mapping[str, Any]] = {
        "ihm": {
            "kind": "binary",
            "classes": ("survived", "died"),
            "family": "outcome",
            "description": "death before discharge from hospital, from the first 48 h in the unit",
            "caveat": f"{_OUTLIVED} Deaths after discharge from hospital count as survival.",
        },
        "los": {
            "remaining": {
                "kind": "binary",
                "classes": ("up to 7 more days", "more than 7 more days"),
                "family": "stay",
                "description": "more than 7 more days in the unit after the first 48 h",
                "caveat": f"{_OUTLIVED} Who dies in the unit within the 7 days counts as a short stay.",
            },
            "short": {
                "kind": "binary",
                "classes": ("no", "left alive by 96 h"),
                "family": "stay",
                "description": "left the unit within 96 h of admission to it and survived the hospital stay",
                "caveat": f"{_OUTLIVED} The rule of the published code, not of the paper: 1 is the good outcome.",
            },
        }[options.los],
        "pheno": {
            "kind": "multilabel",
            "classes": tuple(words for _, words in PHENOTYPES),
            "family": "diagnosis",
            "description": "25 groups of diagnoses of the hospital stay",
            "caveat": "Codes are given for billing after discharge and do not say when a condition began: many were "
            "known at admission. Codes of ICD-10 reach the groups through a mapping to ICD-9.",
        },
        "readmission": {
            "kind": "binary",
            "classes": ("none within 30 days", "readmitted"),
            "family": "outcome",
            "description": "another hospital admission within 30 days of discharge from hospital, day 30 included"
            + (", planned ones not counted" if options.readmission == "unplanned" else ""),
            "caveat": "Predicted from the first 48 h in the unit, not from what is known at discharge. Who died in "
            "hospital has no label; who died at home without readmission counts as not readmitted; other hospitals "
            "are not seen.",
        },
    }
    return tasks[name]
