"""Invented people in tables of ADNI's real schema: nothing of ADNI itself may be passed on."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path

import numpy as np


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = words("PHASE PTID RID VISCODE VISCODE2")
HISTORY = words(
    "MHPSYCH MH2NEURL MH3HEAD MH4CARD MH5RESP MH6HEPAT MH7DERM MH8MUSCL MH9ENDO MH10GAST MH11HEMA MH12RENA MH13ALLE "
    "MH14ALCH MH15DRUG MH16SMOK MH17MALI MH18SURG"
)
EXAM = words(
    "NXVISUAL NXAUDITO NXTREMOR NXCONSCI NXNERVE NXMOTOR NXFINGER NXHEEL NXSENSOR NXTENDON NXPLANTA NXGAIT NXOTHER"
)
REGIONS = words("ST29SV ST88SV ST24CV ST24TA ST83CV ST83TA ST10CV")
SCHEMA: dict[str, tuple[str, ...]] = {
    "DXSUM": KEYS + words("EXAMDATE DIAGNOSIS DXMDUE DXDDUE DXCHANGE DXCURREN USERDATE update_stamp"),
    "REGISTRY": KEYS + words("EXAMDATE update_stamp"),
    "UCSFFSX7": words("COLPROT PTID RID VISCODE VISCODE2 EXAMDATE IMAGEUID OVERALLQC TEMPQC")
    + REGIONS
    + words("ST24TS ST24SA update_stamp"),
    "APOERES": KEYS + words("APTESTDT GENOTYPE APGEN1 APGEN2 update_stamp"),
    "UPENNBIOMK_ROCHE_ELECSYS": KEYS + words("EXAMDATE BATCH RUNDATE ABETA40 ABETA42 TAU PTAU COMMENT update_stamp"),
    "PTDEMOG": KEYS
    + words(
        "VISDATE PTGENDER PTDOB PTDOBMM PTDOBYY PTHAND PTMARRY PTEDUCAT PTNOTRT PTCOGBEG PTADDX PTETHCAT PTRACCAT "
        "update_stamp"
    ),
    "MEDHIST": (*KEYS, "VISDATE", *HISTORY, "update_stamp"),
    "NEUROEXM": (*KEYS, "VISDATE", *EXAM, "NXABNORM", "update_stamp"),
    "RECCMEDS": KEYS + words("VISDATE CMMED CMDOSE CMBGN CMEND update_stamp"),
    "VITALS": KEYS
    + words("VISDATE VSWEIGHT VSWTUNIT VSHEIGHT VSHTUNIT VSBPSYS VSBPDIA VSPULSE VSRESP VSTEMP VSTMPUNT update_stamp"),
    "MMSE": KEYS + words("VISDATE MMSCORE update_stamp"),
    "CDR": KEYS + words("VISDATE CDGLOBAL CDRSB update_stamp"),
}
"""Table -> its columns; long forms are shortened to what is read and some that must not be."""


def write(folder: Path, table: str, rows: list[dict[str, str]], suffix: str = "_12Mar2024") -> Path:
    """A table as the site delivers it: every cell in quotes, the date of the download in the name."""
    path = folder / f"{table}{suffix}.csv"
    lines = [",".join(f'"{name}"' for name in SCHEMA[table])]
    for row in rows:
        assert set(row) <= set(SCHEMA[table]), set(row) - set(SCHEMA[table])
        cells = {"PTID": f"011_S_{int(row['RID']):04d}"} | row
        lines.append(",".join(f'"{cells.get(name, "")}"' for name in SCHEMA[table]))
    path.write_text("\n".join(lines) + "\n")
    return path


def day(start: str, days: int) -> str:
    """The date so many days after another."""
    return (date.fromisoformat(start) + timedelta(days=days)).isoformat()


def nifti(path: Path, seed: int, shape: tuple[int, int, int] = (20, 24, 20)) -> None:
    """A small head: a bright ball with noise in the dark."""
    import nibabel

    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, side) for side in shape), indexing="ij")
    ball = sum(axis**2 for axis in axes) < 0.6
    voxels = np.where(ball, 100 + 20 * generator.random(shape), 2 * generator.random(shape)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3.0, 3.0, 1.0])), path)


def cohort(folder: Path, people: int = 60, seed: int = 0, images: bool = True) -> Path:
    """A whole release of invented people: three classes, every table, each modality missing in some."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in SCHEMA}
    index = ["subject,date,modality,path"]
    genes = ["IID,PHENOTYPE," + ",".join(f"rs{i}_A" for i in range(8))]
    for rid in range(1, people + 1):
        kind = rid % 3
        start = day("2008-03-01", int(generator.integers(0, 2000)))
        base = {"RID": str(rid), "VISCODE": "bl", "VISCODE2": "bl", "update_stamp": "2020-01-01 00:00:00.0"}
        has = dict(zip(words("mri csf gene clinical image"), generator.random(5) < 0.75, strict=True))
        rows["DXSUM"].append(base | {"EXAMDATE": start, "DIAGNOSIS": str(kind + 1)})
        if has["mri"]:
            sizes = {name: f"{3000 - 400 * kind + 200 * generator.normal():.1f}" for name in REGIONS}
            scan = {"EXAMDATE": day(start, int(generator.integers(-60, 60))), "OVERALLQC": "Pass"}
            rows["UCSFFSX7"].append(base | sizes | scan)
        if has["csf"]:
            level = 1500 - 400 * kind + 300 * generator.normal()
            amyloid = ">1700" if level > 1700 else f"{max(level, 200):.0f}"
            fluid = {"ABETA42": amyloid, "TAU": f"{200 + 60 * kind:.1f}", "PTAU": f"{18 + 6 * kind:.1f}"}
            rows["UPENNBIOMK_ROCHE_ELECSYS"].append(base | {"EXAMDATE": start} | fluid)
            rows["APOERES"].append(base | {"GENOTYPE": ("3/3", "3/4", "4/4")[kind]})
        if has["gene"]:
            genes.append(f"011_S_{rid:04d},{kind}," + ",".join(str(v) for v in generator.integers(0, 3, 8)))
        if has["clinical"]:
            for table, cells in _clinic(rid, generator):
                rows[table].append(base | {"VISDATE": start} | cells)
        if has["image"] and images:
            for modality in ("MRI", "PET"):
                name = f"scans/{rid}_{modality}.nii.gz"
                nifti(folder / name, rid)
                index.append(f"011_S_{rid:04d},{start},{modality},{name}")
    for table, found in rows.items():
        if found:
            write(folder, table, found)
    (folder / "genomic_merged.csv").write_text("\n".join(genes) + "\n")
    if images:
        (folder / "images.csv").write_text("\n".join(index) + "\n")
    return folder


def _clinic(rid: int, generator: np.random.Generator) -> list[tuple[str, dict[str, str]]]:
    """Table and cells of one person's clinical visit."""
    birth = str(1930 + int(10 * generator.random()))
    person = {"PTGENDER": str(1 + rid % 2), "PTDOBYY": birth, "PTEDUCAT": "16", "PTRACCAT": "5", "PTMARRY": "1"}
    pressure = f"{130 + 10 * generator.normal():.0f}"
    medicines = words("Lipitor Aricept Calcium")
    return [
        ("PTDEMOG", person),
        ("VITALS", {"VSWEIGHT": "160", "VSWTUNIT": "1", "VSHEIGHT": "-4", "VSBPSYS": pressure}),
        ("MEDHIST", {name: str(int(generator.random() < 0.3)) for name in HISTORY}),
        ("NEUROEXM", {name: str(1 + int(generator.random() < 0.1)) for name in EXAM}),
        *(("RECCMEDS", {"CMMED": name}) for name in medicines),
    ]
