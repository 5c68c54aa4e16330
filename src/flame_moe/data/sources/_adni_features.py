"""From the rows of a person to the numbers of a modality: clinical table, biospecimens, FreeSurfer, genes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.data.sources._adni_files import Row, age_at, nearest, read_rows, roster
from flame_moe.data.sources._adni_tables import (
    ALLELES,
    BACKWARDS,
    CSF,
    DEMENTIA_DRUGS,
    DRUGS,
    NOT_GENES,
    Channel,
)
from flame_moe.data.tables import collect, column_names, scan_table
from flame_moe.data.work import Work
from flame_moe.errors import DataError

Values = NDArray[np.float64]
_LIMIT = re.compile(r"([<>])=?\s*(\d+(?:\.\d+)?)")


class Person(NamedTuple):
    """The rows of one person, by table, and the visit that is predicted.

    Attributes:
        tables: table -> rows.
        day: of the label.
        window: days around it.
    """

    tables: Mapping[str, Sequence[Row]]
    day: int
    window: int

    def near(self, table: str, column: str) -> Row | None:
        """The row nearest to the label in which the column is filled."""
        rows = self.tables.get(table, ())
        return nearest(
            rows, self.day, self.window, backwards=table in BACKWARDS, usable=lambda row: column in row.cells
        )


def clinical(person: Person, channels: Sequence[Channel], tally: Counter[str]) -> Values:
    """Age, the channels, the medicines; (F,), NaN where nothing is known."""
    told: Counter[str] = Counter()
    found = [_age(person), *(_channel(person, channel, told) for channel in channels), *_medicines(person, tally)]
    # A cell that is read for several features, one per code, is one defect.
    tally.update(told.keys())
    return np.array(found, dtype=np.float64)


def _age(person: Person) -> float:
    rows = [row for row in person.tables.get("PTDEMOG", ()) if age_at(row.cells, person.day) is not None]
    row = nearest(rows, person.day, person.window, backwards=True)
    age = None if row is None else age_at(row.cells, person.day)
    return np.nan if age is None else age


def _channel(person: Person, channel: Channel, tally: Counter[str]) -> float:
    row = person.near(channel.table, channel.column)
    if row is None:
        return np.nan
    text = row.cells[channel.column]
    if channel.codes is not None:
        code = "6" if channel.column == "PTRACCAT" and "|" in text else text.removesuffix(".0")
        if code not in channel.codes and code not in channel.unknown:
            tally[f"{channel.column}: code '{code}' is not in the dictionary, set to missing"] += 1
        return channel.codes.get(code, np.nan)
    try:
        value = float(text)
    except ValueError:
        tally[f"{channel.column}: cell that is no number, set to missing"] += 1
        return np.nan
    unit = ""
    if channel.units:
        unit = row.cells.get(channel.unit_column, "").removesuffix(".0")
        if unit not in channel.units:
            tally[f"{channel.column}: value without a unit, set to missing"] += 1
            return np.nan
        factor, offset = channel.units[unit]
        value = value * factor + offset
    if not channel.low <= value <= channel.high:
        tally[f"{channel.column}: outside of {channel.low:g} to {channel.high:g} {channel.unit}, set to missing"] += 1
        return np.nan
    if channel.units and channel.units[unit] != (1.0, 0.0):
        tally[f"{channel.column}: converted to {channel.unit}"] += 1
    return value


def _medicines(person: Person, tally: Counter[str]) -> list[float]:
    """Number of different medicines recorded up to the label, and which classes are among them."""
    if "RECCMEDS" not in person.tables:
        return [np.nan] * (1 + len(DRUGS))
    rows = [r for r in person.tables["RECCMEDS"] if r.day is not None and r.day - person.day <= person.window]
    if not rows:
        return [np.nan] * (1 + len(DRUGS))
    names = {row.cells["CMMED"].lower() for row in rows if "CMMED" in row.cells}
    given = {name for name in names if any(drug in name for drug in DEMENTIA_DRUGS)}
    tally["RECCMEDS: drug against dementia, left out"] += len(given)
    names -= given
    return [float(len(names)), *(float(any(part in n for n in names for part in parts)) for parts in DRUGS.values())]


def biospecimen(person: Person, tally: Counter[str]) -> Values:
    """APOE alleles and proteins of the fluid drawn nearest to the label; (7,)."""
    row = nearest(person.tables.get("UPENNBIOMK", ()), person.day, person.window, usable=_has_csf)
    fluid = [np.nan] * len(CSF) if row is None else [_assay(row, names, tally) for _, names, _ in CSF]
    return np.array([*_alleles(person.tables.get("APOERES", ()), tally), *fluid], dtype=np.float64)


def _has_csf(row: Row) -> bool:
    return any(name in row.cells for _, names, _ in CSF for name in names)


def _assay(row: Row, names: Sequence[str], tally: Counter[str]) -> float:
    text = next((row.cells[name] for name in names if name in row.cells), None)
    if text is None:
        return np.nan
    limit = _LIMIT.fullmatch(text)
    if limit:
        tally[f"{names[0]}: reported as {limit[1]}{limit[2]}, taken at the limit"] += 1
        return float(limit[2])
    try:
        return float(text)
    except ValueError:
        tally[f"{names[0]}: cell that is no number, set to missing"] += 1
        return np.nan


def _alleles(rows: Sequence[Row], tally: Counter[str]) -> list[float]:
    """Numbers of alleles E2, E3, E4; the genotype does not change, so any row says it."""
    found = {
        tuple(sorted(re.findall("[234]", row.cells.get("GENOTYPE") or "".join(_pair(row)))))
        for row in rows
        if row.cells.get("GENOTYPE") or len(_pair(row)) == 2
    }
    if len(found) > 1:
        tally["APOERES: two genotypes of one person, set to missing"] += 1
    (genotype,) = found if len(found) == 1 else ((),)
    if len(genotype) != 2:
        return [np.nan] * len(ALLELES)
    return [float(genotype.count(allele)) for allele in ALLELES]


def _pair(row: Row) -> list[str]:
    return [row.cells[name].removesuffix(".0") for name in ("APGEN1", "APGEN2") if name in row.cells]


def freesurfer_columns(path: Path) -> tuple[str, ...]:
    """Volumes (CV, SV) and mean thicknesses (TA) of the regions, in the order of the table.

    Raises:
        DataError: if the table has none.
    """
    found = tuple(n.strip() for n in column_names(path) if re.fullmatch(r"ST\d+(CV|TA|SV)", n.strip()))
    if not found:
        raise DataError("there is no column ST*CV, ST*TA or ST*SV", where=str(path), mend="Is it UCSFFSX7?")
    return found


def freesurfer(path: Path, partial: bool, work: Work, tally: Counter[str]) -> tuple[list[Row], Values]:
    """Scans that passed quality control, and their measures; `Row.cells["at"]` is the row of the matrix."""
    columns = freesurfer_columns(path)
    rows = read_rows(path, ("OVERALLQC",), work)
    judged = "OVERALLQC" in {name.strip().upper() for name in column_names(path)}
    texts = collect(scan_table(path, dict.fromkeys(columns, pl.String)), path)
    numbers = texts.select(pl.all().cast(pl.Float64, strict=False))
    bad = sum(numbers[name].null_count() - texts[name].null_count() for name in columns)
    tally["UCSFFSX7: cell that is no number, set to missing"] += bad
    values = numbers.to_numpy().astype(np.float64)
    values[values < 0] = np.nan
    kept = []
    for at, row in enumerate(rows):
        verdict = row.cells.get("OVERALLQC", "none").lower()
        if not judged or verdict == "pass" or (partial and verdict == "partial"):
            kept.append(row._replace(cells={**row.cells, "at": str(at)}))
        else:
            tally[f"UCSFFSX7: quality control says {verdict}, scan left out"] += 1
    return kept, values


def gene_columns(path: Path) -> tuple[str, ...]:
    """Variants of a genomic table, in its order.

    Raises:
        DataError: if it has no variant or nobody's number.
    """
    names = [name.strip() for name in column_names(path)]
    if not {"RID", "PTID", "IID"} & {name.upper() for name in names}:
        mend = "Name the column of the person RID, PTID or IID."
        raise DataError("the genomic table does not say whose its rows are", where=str(path), mend=mend)
    found = tuple(name for name in names if name.upper() not in NOT_GENES)
    if not found:
        raise DataError("the genomic table has no variant", where=str(path))
    return found


def genes(path: Path, work: Work) -> dict[int, Values]:
    """Roster number -> variants, NaN where not called.

    Raises:
        DataError: if a cell is no number or a person has two rows.
    """
    columns = gene_columns(path)
    kinds: dict[str, type[pl.DataType]] = {"RID": pl.String, "PTID": pl.String, "IID": pl.String}
    kinds |= dict.fromkeys(columns, pl.Float64)
    frame = collect(scan_table(work.note(path), kinds, optional=("RID", "PTID", "IID")), path)
    values = frame.select(columns).to_numpy().astype(np.float64)
    found: dict[int, Values] = {}
    for at, (rid, ptid, iid) in enumerate(frame.select("RID", "PTID", "IID").iter_rows()):
        where = f"{path}, row {at + 1}"
        person = roster({"RID": rid or "", "PTID": ptid or iid or ""}, where)
        if person in found:
            raise DataError(f"person {person} has two rows", where=where, mend="Keep one.")
        found[person] = values[at]
    return found
