"""Invented women in the schema of the EMBED open release."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

DAY = date(2013, 1, 1)
KINDS = {"ffdm": "2D", "cview": "cview"}
STREAMS = ("ffdm_cc", "ffdm_mlo", "cview_cc", "cview_mlo")
CLINICAL_COLUMNS = (
    *("empi_anon", "acc_anon", "study_date_anon", "desc", "numfind", "side", "tissueden", "asses", "implanfind"),
    *("bside", "procdate_anon", "pdate_anon", "path_severity", "age_at_study"),
)


def after(days: int) -> date:
    """A day counted from the exam on `DAY`."""
    return DAY + timedelta(days=days)


class Release:
    """Two tables that grow by findings and pictures, and a folder of tiny PNG files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[dict[str, Any]] = []
        self.pictures: list[dict[str, Any]] = []

    def exam(self, empi: str, acc: str, *, day: date = DAY, sides: str = "LR", **finding: Any) -> None:
        """An exam with all four streams of each side and one finding row."""
        self.finding(empi, acc, day=day, **finding)
        for side in sides:
            for stream in STREAMS:
                self.picture(empi, acc, side, stream, day=day)

    def finding(self, empi: str, acc: str, *, day: date = DAY, **cells: Any) -> None:
        row = dict.fromkeys(CLINICAL_COLUMNS) | {
            "empi_anon": empi,
            "acc_anon": acc,
            "study_date_anon": f"{day} 00:00:00",
            "desc": "MG Screening Bilateral w/CAD",
            "numfind": 1,
            "asses": "N",
            "tissueden": 2.0,
            "age_at_study": 55.5,
        }
        self.findings.append(row | cells)

    def picture(self, empi: str, acc: str, side: str, stream: str, *, day: date = DAY, **cells: Any) -> Path:
        """A picture row and its file: 8 x 6 pixels, brighter to the right."""
        kind, view = stream.split("_")
        name = f"{acc}_{side}_{stream}_{len(self.pictures)}.png"
        path = self.folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = np.tile(np.arange(6, dtype=np.uint8) * 40, (8, 1))
        Image.fromarray(shade).save(path)
        row = {
            "empi_anon": empi,
            "acc_anon": acc,
            "study_date_anon": str(day),
            "anon_dicom_path": f"/mnt/somewhere/images/{name}",
            "png_filename": name,
            "FinalImageType": KINDS[kind],
            "ImageLateralityFinal": side,
            "ViewPosition": view.upper(),
            "spot_mag": None,
        }
        self.pictures.append(row | cells)
        return path

    def write(self, *, clinical: bool = True) -> Path:
        """The release's folder."""
        (self.folder / "tables").mkdir(parents=True, exist_ok=True)
        if clinical:
            rows = [{k: None if v is None else str(v) for k, v in row.items()} for row in self.findings]
            pl.DataFrame(rows, schema=dict.fromkeys(CLINICAL_COLUMNS, pl.String)).write_csv(
                self.folder / "tables" / "EMBED_OpenData_clinical.csv"
            )
        pl.DataFrame(self.pictures, infer_schema_length=None).write_csv(
            self.folder / "tables" / "EMBED_OpenData_metadata.csv"
        )
        return self.folder
