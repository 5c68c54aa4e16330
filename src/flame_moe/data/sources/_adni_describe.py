"""Descriptions of ADNI's modalities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flame_moe.data.sources._adni_features import freesurfer_columns, gene_columns
from flame_moe.data.sources._adni_images import Size
from flame_moe.data.sources._adni_tables import CSF, MEDICINES, Channel
from flame_moe.schema import Modality

OF_UNIT = {"CV": "mm3", "SV": "mm3", "TA": "mm"}


def clinical(channels: Sequence[Channel]) -> Modality:
    """A table of age, channels and medicines."""
    columns = [("age", "years"), *((c.name, c.unit) for c in channels), *MEDICINES]
    return table("clinical", columns, "demographics, vital signs, history, examination, medicines")


def biospecimen() -> Modality:
    """A table of APOE alleles and proteins of the cerebrospinal fluid."""
    columns = [*((f"apoe_e{a}", "alleles") for a in "234"), *((name, unit) for name, _, unit in CSF)]
    return table("biospecimen", columns, "APOE alleles, proteins of the cerebrospinal fluid")


def genomic(path: Path) -> Modality:
    """A table of the variants that the file has."""
    return table("genomic", [(name, "") for name in gene_columns(path)], "variants")


def freesurfer(path: Path) -> Modality:
    """A table of the regions that the file has."""
    columns = freesurfer_columns(path)
    return table("freesurfer", [(n, OF_UNIT[n[-2:]]) for n in columns], "regional volumes and mean thicknesses")


def table(name: str, columns: Sequence[tuple[str, str]], description: str) -> Modality:
    """A table with these columns and units."""
    return Modality(
        name=name,
        kind="table",
        features=len(columns),
        channels=tuple(column for column, _ in columns),
        units=tuple(unit for _, unit in columns),
        description=description,
        scaling="quantile",
    )


def volume(name: str, what: str, size: Size, block: int) -> Modality:
    """Cubes of side `block` of a volume of `size` voxels."""
    sides = " x ".join(str(side) for side in size)
    return Modality(
        name=name,
        kind="patches",
        features=block**3,
        description=f"{what}, {sides} voxels, z-scored within the head, in cubes of side {block}",
        scaling="none",
    )
