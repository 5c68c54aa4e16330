"""ADNI: diagnosis of Alzheimer's disease from MRI, PET, genes, biospecimens and clinical data, from the files as
downloaded.

Alzheimer's Disease Neuroimaging Initiative (adni.loni.usc.edu), spec section 1.5. A folder with the tables under the
names of the site, dates in the names included (`DXSUM_12Mar2024.csv`), and volumes as NIfTI. Only DXSUM is needed;
what is absent is left out of the store, and the funnel says so.

    mri            patches: blocks of the T1 volume
    freesurfer     table: regional volumes and thicknesses (UCSFFSX7)
    pet            patches: blocks of the PET volume
    genomic        table: variants
    biospecimen    table: APOE alleles, amyloid beta, tau, phosphorylated tau of the cerebrospinal fluid
    clinical       table: demographics, vital signs, history, neurological examination, medicines

One sample is one person at one visit with a diagnosis. Every modality is taken from the visit nearest in time, not
further than a window. The diagnosis and what defines it (MMSE, CDR), what is given because of it (drugs against
dementia) and when it was first made are no inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources import _adni_describe as _describe
from flame_moe.data.sources import _adni_features as features
from flame_moe.data.sources._adni_files import Row, find, nearest, place_in_time, read_rows
from flame_moe.data.sources._adni_images import blocks, volume_rows, volumes
from flame_moe.data.sources._adni_tables import CLINICAL, COGNITION, CSF, DIAGNOSES, Channel
from flame_moe.data.sources._adni_visits import by_person, label_of, reference
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

CLASSES = ("CN", "MCI", "AD")
PARTS: dict[str, tuple[str, ...]] = {
    "freesurfer": ("UCSFFSX7",),
    "genomic": ("genomic",),
    "biospecimen": ("APOERES", "UPENNBIOMK"),
    "clinical": ("PTDEMOG", "VITALS", "MEDHIST", "NEUROEXM", "RECCMEDS"),
}
"""Table modality -> its files, each of which may be absent."""
ORDER = ("mri", "freesurfer", "pet", "genomic", "biospecimen", "clinical")
COLUMNS: dict[str, tuple[str, ...]] = {
    "APOERES": ("GENOTYPE", "APGEN1", "APGEN2"),
    "UPENNBIOMK": tuple(name for _, names, _ in CSF for name in names),
    "RECCMEDS": ("CMMED",),
    "PTDEMOG": ("PTDOB", "PTDOBMM", "PTDOBYY"),
}


class AdniOptions(Description):
    """How the tables are read.

    Attributes:
        visit: the diagnosis that is predicted: the first of a person, or the last.
        window: days before and after the visit within which a modality is taken.
        imaging: "all"; "volumes" alone; or "tables", the FreeSurfer table without volumes, as the published code.
        quality: FreeSurfer scans whose quality control says "pass", or also those where it says "partial".
        volume: voxels along right, anterior and superior to which volumes are brought.
        block: side of the cubes that they are cut into.
        cognition: add MMSE and CDR to the clinical table. They define the diagnosis: for experiments alone.
        stable: keep only people whose diagnosis never changes, as the published code does. It looks into the future.
        complete: keep only people who have every modality, as the published code does.
        seed: decides the split.
    """

    visit: Literal["baseline", "last"] = "baseline"
    window: Annotated[int, Field(ge=0)] = 180
    imaging: Literal["all", "volumes", "tables"] = "all"
    quality: Literal["pass", "partial"] = "pass"
    volume: tuple[Annotated[int, Field(ge=4)], Annotated[int, Field(ge=4)], Annotated[int, Field(ge=4)]] = (64, 80, 64)
    block: Annotated[int, Field(ge=2)] = 16
    cognition: bool = False
    stable: bool = False
    complete: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if any(side % self.block for side in self.volume):
            raise ValueError(f"volume {self.volume} is not a multiple of block {self.block} on every side")
        return self


def describe(raw: Path | None, options: AdniOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """The modalities whose files are there, and the diagnosis task that reads all of them.

    Raises:
        DataError: if DXSUM or every modality is missing, or a table is there twice.
    """
    folder = _folder(raw)
    found = find(folder)
    makers: dict[str, Callable[[], Modality]] = {
        "mri": lambda: _describe.volume("mri", "T1 MRI", options.volume, options.block),
        "pet": lambda: _describe.volume("pet", "PET", options.volume, options.block),
        "freesurfer": lambda: _describe.freesurfer(found["UCSFFSX7"]),
        "genomic": lambda: _describe.genomic(found["genomic"]),
        "biospecimen": _describe.biospecimen,
        "clinical": lambda: _describe.clinical(_channels(options)),
    }
    names = _offered(folder, found, options)
    caveat = _CAVEAT + (_CAVEAT_COGNITION if options.cognition else "")
    task = Task.parse({**_DIAG, "modalities": names, "caveat": caveat}, where="tasks.diag")
    return tuple(makers[name]() for name in names), (task,)


def read(raw: Path | None, options: AdniOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the people by roster number, and count every rule and defect.

    Raises:
        DataError: with file and line, if a table, column, number or date cannot be read.
    """
    folder = _folder(raw)
    tally: Counter[str] = Counter()
    data = _load(folder, options, work, tally)
    diagnoses = by_person(data.tables["DXSUM"])
    people = {name: by_person(rows) for name, rows in data.tables.items() if name != "DXSUM"}
    rules: Counter[str] = Counter()
    for rid in sorted(diagnoses):
        visit = reference(diagnoses[rid], options.visit == "baseline", tally)
        if visit is None or visit.day is None:
            continue
        rules["dated"] += 1
        if options.stable and len({label for row in diagnoses[rid] if (label := label_of(row)) is not None}) > 1:
            continue
        rules["stable"] += 1
        tables = {name: rows.get(rid, []) for name, rows in people.items()}
        modalities = _modalities(rid, features.Person(tables, visit.day, options.window), data, options, work, tally)
        if not modalities:
            continue
        rules["any"] += 1
        if options.complete and len(modalities) < len(data.names):
            continue
        rules["complete"] += 1
        label = label_of(visit)
        targets = {} if label is None else {"diag": np.array([label], dtype=np.float32)}
        tally["no diagnosis, no label"] += label is None
        subject = visit.cells.get("PTID", str(rid))
        yield Sample(subject, subject, modalities, targets)
    funnel.start(len(diagnoses), "people in the diagnosis table")
    funnel.rule("has a visit of the diagnosis table that can be dated", rules["dated"])
    if options.stable:
        funnel.rule("diagnosis never changes", rules["stable"])
    funnel.rule(f"has a modality within {options.window} days of the visit", rules["any"])
    if options.complete:
        funnel.rule("has every modality", rules["complete"])
    for text in sorted(text for text, n in tally.items() if n):
        funnel.count(text, tally[text])


def split(options: AdniOptions) -> SplitSpec:
    """70/10/20 by person."""
    return SplitSpec(seed=options.seed)


class _Data(NamedTuple):
    """What was read: names of the modalities, rows of the tables, scans, measures of FreeSurfer, volumes, genes."""

    names: tuple[str, ...]
    tables: dict[str, list[Row]]
    measures: NDArray[np.float64]
    volumes: dict[str, dict[int, list[Row]]]
    genes: dict[int, NDArray[np.float64]]


def _folder(raw: Path | None) -> Path:
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder with the tables of ADNI.")
    return raw


def _offered(folder: Path, found: Mapping[str, Path], options: AdniOptions) -> tuple[str, ...]:
    """Names of the modalities whose files are there."""
    if "DXSUM" not in found:
        mend = "Download 'Diagnostic Summary' (DXSUM) from the ADNI site."
        raise DataError("the table DXSUM is missing", where=str(folder), mend=mend)
    there = {name for name, tables in PARTS.items() if any(table in found for table in tables)}
    if options.imaging != "tables":
        there |= set(volumes(folder, found.get("images")))
    if options.imaging == "volumes":
        there.discard("freesurfer")
    names = tuple(name for name in ORDER if name in there)
    if not names:
        mend = "Add at least one, for example PTDEMOG or UCSFFSX7."
        raise DataError("there is no table but the diagnosis", where=str(folder), mend=mend)
    return names


def _load(folder: Path, options: AdniOptions, work: Work, tally: Counter[str]) -> _Data:
    found = find(folder)
    names = _offered(folder, found, options)
    channels = _channels(options)
    tables = {"DXSUM": read_rows(found["DXSUM"], DIAGNOSES, work)}
    for table in (
        "REGISTRY",
        *PARTS["biospecimen"],
        *PARTS["clinical"],
        *(("MMSE", "CDR") if options.cognition else ()),
    ):
        columns = [name for c in channels if c.table == table for name in (c.column, c.unit_column) if name]
        if table in found:
            tables[table] = read_rows(found[table], (*columns, *COLUMNS.get(table, ())), work)
    measures = np.empty((0, 0))
    if "freesurfer" in names:
        tables["UCSFFSX7"], measures = features.freesurfer(found["UCSFFSX7"], options.quality == "partial", work, tally)
    _say_absent(names, found, options, tally)
    listed: dict[str, list[tuple[str, str, Path]]] = {}
    if {"mri", "pet"} & set(names):
        listed = volumes(folder, found.get("images"))
        if "images" in found:
            work.note(found["images"])
    genes = features.genes(found["genomic"], work) if "genomic" in names else {}
    genotypes = tables.pop("APOERES", [])
    placed = place_in_time(tables, tally) | {"APOERES": genotypes}
    return _Data(names, placed, measures, volume_rows(listed, tally), genes)


def _say_absent(names: tuple[str, ...], found: Mapping[str, Path], options: AdniOptions, tally: Counter[str]) -> None:
    for name in ORDER:
        if name not in names:
            tally[f"modality {name} left out: " + ("option imaging" if _unwanted(name, options) else "no files")] += 1
    for name, tables in PARTS.items():
        for table in tables:
            if name in names and table not in found:
                tally[f"table {table} absent: its part of {name} is missing"] += 1
    for table in ("MMSE", "CDR") if options.cognition else ():
        tally[f"table {table} absent: its part of clinical is missing"] += table not in found


def _unwanted(name: str, options: AdniOptions) -> bool:
    return name in {"all": (), "volumes": ("freesurfer",), "tables": ("mri", "pet")}[options.imaging]


def _modalities(
    rid: int, person: features.Person, data: _Data, options: AdniOptions, work: Work, tally: Counter[str]
) -> dict[str, Observation]:
    """What a person has near the visit, by modality."""
    parts: dict[str, Observation | None] = {}
    for name in data.names:
        if name in ("mri", "pet"):
            row = nearest(data.volumes.get(name, {}).get(rid, ()), person.day, person.window)
            if row is not None:
                parts[name] = Observation(blocks(Path(row.cells["path"]), options.volume, options.block, work))
        elif name == "freesurfer":
            row = nearest(person.tables["UCSFFSX7"], person.day, person.window)
            parts[name] = None if row is None else _observation(data.measures[int(row.cells["at"])])
        elif name == "genomic":
            parts[name] = _observation(data.genes[rid]) if rid in data.genes else None
        elif name == "biospecimen":
            parts[name] = _observation(features.biospecimen(person, tally))
        else:
            parts[name] = _observation(features.clinical(person, _channels(options), tally))
    return {name: part for name, part in parts.items() if part is not None}


def _observation(values: NDArray[np.float64]) -> Observation | None:
    observed = np.isfinite(values)[None]
    if not observed.any():
        return None
    return Observation(np.where(observed, values[None], 0.0).astype(np.float32), None, observed)


def _channels(options: AdniOptions) -> tuple[Channel, ...]:
    return CLINICAL + (COGNITION if options.cognition else ())


_DIAG: dict[str, Any] = {
    "name": "diag",
    "kind": "multiclass",
    "classes": CLASSES,
    "family": "diagnosis",
    "description": "clinical diagnosis at the visit: cognitively normal, mild cognitive impairment, dementia",
}
_CAVEAT = (
    "AD is ADNI's clinical diagnosis of dementia, nearly always but not always due to Alzheimer's disease. A modality "
    "may be of up to the window after the visit. Volunteers of a research study: shares of the classes are by design."
)
_CAVEAT_COGNITION = " MMSE and CDR are among the inputs, and the diagnosis is made from them: do not report this."

SOURCE = Source(
    name="adni",
    summary="ADNI: MRI, PET, genes, biospecimens, clinical tables; normal, mild impairment or Alzheimer's disease.",
    needs_raw=True,
    options=AdniOptions,
    describe=describe,
    read=read,
    split=split,
)
