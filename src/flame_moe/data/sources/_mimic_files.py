"""Where the tables of MIMIC-IV, its notes, its emergency department and MIMIC-CXR lie below a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flame_moe.data.tables import find_table
from flame_moe.errors import DataError

CORE = "MIMIC-IV, with its folders hosp and icu (physionet.org/content/mimiciv, or the open demo mimic-iv-demo)"
NOTES, ED, CXR = "MIMIC-IV-Note", "MIMIC-IV-ED", "MIMIC-CXR"
METADATA = "mimic-cxr-2.0.0-metadata"

NEEDED = ("hosp/patients", "hosp/admissions", "icu/icustays", "icu/chartevents", "hosp/labevents")
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "hosp/diagnoses_icd": (CORE, "task pheno and modality diagnoses"),
    "ed/edstays": (ED, "modalities triage and complaint"),
    "ed/triage": (ED, "modalities triage and complaint"),
    "note/radiology": (NOTES, "modality radiology"),
    "note/discharge": (NOTES, "modality history"),
    METADATA: (CXR, "modality cxr"),
}
"""Table -> the release that holds it, and what is left out without it."""


@dataclass(frozen=True)
class Release:
    """Tables that were found below `root`, by name, and the folder `files` of MIMIC-CXR, if it is there."""

    root: Path
    tables: Mapping[str, Path]
    files: Path | None

    def __contains__(self, name: object) -> bool:
        return name in self.tables

    @property
    def core(self) -> list[Path]:
        """The tables that decide who is in the cohort, and when."""
        return [self.tables[name] for name in NEEDED[:3]]


def locate(raw: Path) -> Release:
    """Find every table in `raw` itself or in a folder in it, as the releases unpack.

    Raises:
        DataError: if a needed table is missing, or one is there twice.
    """
    if not raw.is_dir():
        raise DataError("this is no folder", where=str(raw), mend=f"Give the folder that holds {CORE}.")
    folders = [raw, *sorted(path for path in raw.iterdir() if path.is_dir())]
    tables: dict[str, Path] = {}
    for name in (*NEEDED, *OPTIONAL):
        found = [path for folder in folders if (path := find_table(folder, name)) is not None]
        if len(found) > 1:
            places = " and ".join(str(path.relative_to(raw)) for path in found)
            raise DataError(f"the table '{name}' is there twice: {places}", where=str(raw), mend="Give one release.")
        if found:
            tables[name] = found[0]
        elif name in NEEDED:
            raise DataError(f"the table '{name}' is missing", where=str(raw), mend=f"It is part of {CORE}.")
    files = None
    if METADATA in tables:
        folder = tables[METADATA].parent / "files"
        files = folder if folder.is_dir() else None
    return Release(raw, tables, files)
