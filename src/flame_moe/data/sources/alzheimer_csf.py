"""Proteins of the cerebrospinal fluid of 333 older adults, with or without cognitive impairment.

The study of Craig-Schapiro et al. (PLoS ONE 6:e18850, 2011), in the modified form in which the R package
AppliedPredictiveModeling ships it: one row per subject, no missing value, no subject id. Read from
`alzheimer_csf.csv` (or `.csv.gz`, `.parquet`); without the column `Class` the samples have no labels and can be scored.

    proteins    table: 124 proteins, on the scale of the table (log or otherwise transformed)
    markers     table: total tau, phosphorylated tau, amyloid beta 42, log scale
    genetics    table: alleles of the APOE gene
    clinical    table: age (scaled) and sex

The set is complete. `missing` removes whole groups at random to study what a model does without them: an experiment,
not a property of the data.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._alzheimer_csf_proteins import PROTEINS
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import collect, need_table, scan_table
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

Row = Mapping[str, Any]
ALLELES = ("E2", "E3", "E4")
GENOTYPES = ("E2E2", "E2E3", "E2E4", "E3E3", "E3E4", "E4E4")
MARKERS = ("tau", "p_tau", "Ab_42")
CLINICAL = ("age", "male")
CLASSES = {"Control": 0.0, "Impaired": 1.0}


class AlzheimerCsfOptions(Description):
    """How the set is read.

    Attributes:
        apoe: the genotype as numbers of alleles E2, E3, E4 (0 to 2), or as one column for each of the six genotypes.
        missing: an experiment: the share of (subject, group) pairs whose group is taken away, at random by a hash of
            seed, subject and group; the last group of a subject always stays.
        seed: decides the split and what `missing` takes away.
    """

    apoe: Literal["alleles", "genotypes"] = "alleles"
    missing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: AlzheimerCsfOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Four tables and one task."""
    genes = ALLELES if options.apoe == "alleles" else GENOTYPES
    gene_unit = "alleles, 0 to 2" if options.apoe == "alleles" else "1 = yes"
    modalities = (
        _table("proteins", PROTEINS, ("transformed",) * len(PROTEINS), "proteins of the cerebrospinal fluid"),
        _table("markers", MARKERS, ("log",) * 3, "tau, phosphorylated tau and amyloid beta 42, log scale"),
        _table("genetics", genes, (gene_unit,) * len(genes), "APOE gene"),
        _table("clinical", CLINICAL, ("scaled, not years", "1 = male"), "age and sex"),
    )
    return modalities, (_TASK,)


def read(raw: Path | None, options: AlzheimerCsfOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the subjects in the order of the table.

    Raises:
        DataError: if the table, a column or a value is missing or malformed.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds alzheimer_csf.csv.gz.")
    path = work.note(need_table(raw, "alzheimer_csf", "the R package AppliedPredictiveModeling (AlzheimerDisease)"))
    numbers = {name: pl.Float64 for name in (*PROTEINS, *MARKERS, *CLINICAL)}
    scanned = scan_table(path, {**numbers, "Genotype": pl.String, "Class": pl.String}, optional=("Class",))
    table = collect(scanned, path)
    funnel.start(len(table), "rows of the table, one subject each")
    tally: Counter[str] = Counter()
    kept = 0
    for number, row in enumerate(table.iter_rows(named=True), start=1):
        subject = f"row{number:03d}"
        groups = {name: part for name, part in _groups(row, options, f"{path}, row {number}").items() if part}
        if not groups:
            continue
        kept += 1
        for name in taken_away(subject, tuple(groups), options):
            del groups[name]
            tally[f"experiment: {name} taken away at random"] += 1
        yield Sample(subject, subject, groups, _target(row["Class"], f"{path}, row {number}", tally))
    funnel.rule("has at least one value", kept)
    for text in sorted(tally):
        funnel.count(text, tally[text])


def split(options: AlzheimerCsfOptions) -> SplitSpec:
    """70/10/20 by subject."""
    return SplitSpec(seed=options.seed)


def taken_away(subject: str, groups: tuple[str, ...], options: AlzheimerCsfOptions) -> tuple[str, ...]:
    """Groups that the experiment removes from a subject: those whose draw in [0, 1) is below `missing`, but never all.

    Example:
        >>> taken_away("row001", ("proteins", "markers"), AlzheimerCsfOptions())
        ()
    """
    draws = {name: _draw(f"{options.seed}\x00{subject}\x00{name}") for name in groups}
    gone = [name for name in groups if draws[name] < options.missing]
    if len(gone) == len(groups):
        gone.remove(max(gone, key=lambda name: draws[name]))
    return tuple(gone)


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def _groups(row: Row, options: AlzheimerCsfOptions, where: str) -> dict[str, Observation | None]:
    return {
        "proteins": _observation([row[name] for name in PROTEINS]),
        "markers": _observation([row[name] for name in MARKERS]),
        "genetics": _observation(_genes(row["Genotype"], options, where)),
        "clinical": _observation([row[name] for name in CLINICAL]),
    }


def _genes(genotype: str | None, options: AlzheimerCsfOptions, where: str) -> list[float | None]:
    """Allele counts or one-hot genotype; nothing known without a genotype."""
    if genotype is not None and genotype not in GENOTYPES:
        mend = f"Known: {', '.join(GENOTYPES)}."
        raise DataError(f"'{genotype}' in column 'Genotype' is no APOE genotype", where=where, mend=mend)
    if options.apoe == "alleles":
        return [None if genotype is None else float(genotype.count(allele)) for allele in ALLELES]
    return [None if genotype is None else float(genotype == known) for known in GENOTYPES]


def _observation(cells: list[float | None]) -> Observation | None:
    """One row with what is known; None if nothing is."""
    values = np.array([[np.nan if cell is None else cell for cell in cells]])
    observed = np.isfinite(values)
    return Observation(np.where(observed, values, 0.0).astype(np.float32), None, observed) if observed.any() else None


def _target(value: str | None, where: str, tally: Counter[str]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    if value is None:
        tally["no Class, no label"] += 1
        return {}
    if value not in CLASSES:
        raise DataError(f"'{value}' in column 'Class' is neither Control nor Impaired", where=where)
    return {"impaired": np.array([CLASSES[value]], dtype=np.float32)}


def _table(name: str, channels: tuple[str, ...], units: tuple[str, ...], description: str) -> Modality:
    return Modality(
        name=name,
        kind="table",
        features=len(channels),
        channels=channels,
        units=units,
        description=description,
        scaling="quantile",
    )


_TASK = Task(
    name="impaired",
    kind="binary",
    modalities=("proteins", "markers", "genetics", "clinical"),
    classes=("control", "impaired"),
    family="diagnosis",
    description="clinically judged cognitive impairment at the time of the lumbar puncture",
    caveat="A research sample, not a clinic's: 27 % impaired by selection. The fluid and the diagnosis are of the same "
    "time, so this is recognition, not prediction. Units are lost and age is not in years.",
)

SOURCE = Source(
    name="alzheimer_csf",
    summary="333 older adults: 124 proteins, tau and amyloid, APOE, age and sex; cognitive impairment.",
    needs_raw=True,
    options=AlzheimerCsfOptions,
    describe=describe,
    read=read,
    split=split,
)
