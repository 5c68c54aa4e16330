"""Transcribed clinical documents of mtsamples.com, as compiled by others: the notes modality on open data.

Two tables, either or both: `mtsamples_500_fulltext` (description, text, class) and `mtsamples_1818_descriptions`
(description, medical specialty; no text). Invented or de-identified documents, unrelated to any other set.

    text         timed: the whole document as one vector
    description  timed: its one-sentence description as one vector

Texts become vectors by a fixed function (`flame_moe.data.text`), so nothing is fitted. The keywords and sample names of
the second table are not read: they often contain the specialty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import collect, find_table, scan_table
from flame_moe.data.text import TextOptions, read_texts, text_modality
from flame_moe.data.work import Work
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

Row = Mapping[str, Any]

FULL, SHORT = "mtsamples_500_fulltext", "mtsamples_1818_descriptions"
DOCUMENTS = ("Surgery", "Medical Records", "Internal Medicine", "Other")
"""Of the numbers 1 to 4 in column `label`."""
SPECIALTIES = ("Surgery", "Radiology", "Urology", "SOAP / Chart / Progress Notes")
"""Those with a hundred documents or more; the rest is one class."""
REST = "Other"


class MtsamplesOptions(TextOptions):
    """How texts become vectors, as in `flame_moe.data.text.TextOptions`, and the split.

    Attributes:
        seed: decides the split.
    """

    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: MtsamplesOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Texts and descriptions where the table with the texts is there, otherwise descriptions alone."""
    full, short = (True, True) if raw is None else map(bool, _tables(raw))
    description = text_modality("description", options, "one-sentence description")
    text = text_modality("text", options, "whole document")
    modalities = (text, description) if full else (description,)
    return modalities, tuple(task for task, table in ((_DOCUMENT, full), (_SPECIALTY, short)) if table)


def read(raw: Path | None, options: MtsamplesOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the documents, those with a text first.

    Raises:
        DataError: if both tables are missing, one is malformed, or a label is none of the known.
    """
    full, short = _tables(raw)
    for path, what in ((full, "texts"), (short, "specialties")):
        if path is None:
            funnel.count(f"the table with the {what} is not there: its documents and task are left out")
    rows = [row for path in (full, short) if path for row in _rows(path, work)]
    funnel.start(len(rows), "documents of the tables")
    rows = [row for row in rows if row["text"] or row["description"]]
    funnel.rule("has a text or a description", len(rows))
    groups = _groups(rows)
    texts = [row["text"] for row in rows if row["text"]]
    counts = {
        "text that occurs before, word for word: kept, in the split of the first": len(texts) - len(set(texts)),
        "text missing in the table of texts": sum(row["full"] and not row["text"] for row in rows),
        "description missing": sum(not row["description"] for row in rows),
    }
    for what, times in counts.items():
        if times:
            funnel.count(what, times)
    found = _read(rows, options, work)
    for row, group in zip(rows, groups, strict=True):
        parts = {name: found[row[name]] for name in ("text", "description") if row[name]}
        yield Sample(row["id"], group, parts, _targets(row))


def split(options: MtsamplesOptions) -> SplitSpec:
    """70/10/20 by document; documents with the same text or description are dealt together."""
    return SplitSpec(seed=options.seed)


def _tables(raw: Path | None) -> tuple[Path | None, Path | None]:
    if raw is None:
        raise DataError("this source needs raw data", mend=f"Give the folder that holds {FULL}.csv.gz.")
    found = find_table(raw, FULL), find_table(raw, SHORT)
    if found == (None, None):
        what = f"neither '{FULL}' nor '{SHORT}' is there"
        raise DataError(what, where=str(raw), mend="Give the folder with one of the tables, as .csv or .csv.gz.")
    return found


def _rows(path: Path, work: Work) -> Iterator[Row]:
    """Rows of either table with the same keys: id, text, description, and the label in words or None."""
    full = path.name.lower().startswith(FULL)
    wanted: dict[str, type[pl.DataType]] = {"description": pl.String}
    wanted |= {"text": pl.String, "class_name": pl.String} if full else {"medical_specialty": pl.String}
    frame = scan_table(work.note(path), wanted, optional=("class_name", "medical_specialty"))
    for number, row in enumerate(collect(frame, path).iter_rows(named=True), start=1):
        label = row["class_name" if full else "medical_specialty"]
        if full and label is not None and label not in DOCUMENTS:
            mend = f"Known: {', '.join(DOCUMENTS)}."
            raise DataError(f"unknown class '{label}'", where=f"{path}, row {number}", mend=mend)
        name = f"{'text' if full else 'short'}{number:04d}"
        yield {"id": name, "text": row.get("text"), "description": row["description"], "full": full, "label": label}


def _groups(rows: list[Row]) -> list[str]:
    """Name of each row's group: rows that share a text or a description, compared without case and blanks."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        for name in ("text", "description"):
            if row[name]:
                j = first.setdefault((name, " ".join(row[name].lower().split())), i)
                a, b = sorted((root(i), root(j)))
                parent[b] = a
    return [rows[root(i)]["id"] for i in range(len(rows))]


def _read(rows: list[Row], options: MtsamplesOptions, work: Work) -> dict[str, Observation]:
    """Every different text once."""
    texts = sorted({row[name] for row in rows for name in ("text", "description") if row[name]})
    work.say(f"reading {len(texts)} texts")
    plain = TextOptions(**options.model_dump(exclude={"seed"}))
    return dict(zip(texts, read_texts(texts, plain, work.vectors).each(), strict=True))


def _targets(row: Row) -> dict[str, NDArray[np.float32]]:
    if row["label"] is None:
        return {}
    if row["full"]:
        return {"document": np.array([DOCUMENTS.index(row["label"])], dtype=np.float32)}
    known = row["label"] if row["label"] in SPECIALTIES else REST
    return {"specialty": np.array([(*SPECIALTIES, REST).index(known)], dtype=np.float32)}


_DOCUMENT = Task(
    name="document",
    kind="multiclass",
    modalities=("text", "description"),
    classes=DOCUMENTS,
    description="kind of the document as the compiler grouped it: surgery, medical records, internal medicine, other",
    caveat="the same text occurs with two different classes: even a perfect reader is not always right",
)
_SPECIALTY = Task(
    name="specialty",
    kind="multiclass",
    modalities=("description",),
    classes=(*SPECIALTIES, REST),
    description="medical specialty under which the document was filed, from its one-sentence description",
    caveat="specialties overlap (urology and surgery), and the collection is half surgery",
)

SOURCE = Source(
    name="mtsamples",
    summary="Transcribed clinical documents of mtsamples.com as texts and descriptions, with kind and specialty.",
    needs_raw=True,
    options=MtsamplesOptions,
    describe=describe,
    read=read,
    split=split,
)
