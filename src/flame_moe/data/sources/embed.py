"""EMBED: mammograms of the Emory Breast Imaging Dataset with their reports and pathology, from the open release.

Jeong et al., The Emory BrEast imaging Dataset (EMBED), Radiology: Artificial Intelligence 5(1):e220047, 2023. The
release has a table of pictures (`EMBED_OpenData_metadata`) and a table of findings (`EMBED_OpenData_clinical`).
A sample is one breast in one exam; its subject is the woman.

    ffdm_cc, ffdm_mlo      image: full-field digital mammogram, cranio-caudal and medio-lateral oblique
    cview_cc, cview_mlo    image: synthetic 2D picture made of the tomosynthesis (C-view), the same two views
    clinical               table: what is known before the pictures are read: age, exam kind, earlier exams

Instead of pictures, vectors that a vision model made of them can be read (option `embeddings`): the published
experiments of FLAME used such vectors of 768 numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.ahead import in_order
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._embed_labels import DENSITIES, GROUPINGS, birads, density, risk
from flame_moe.data.sources._embed_tables import (
    CLINICAL,
    MALE,
    STREAMS,
    Breast,
    Finding,
    Woman,
    find,
    need_metadata,
    read_breasts,
    read_women,
)
from flame_moe.data.sources._embed_vectors import Vectors
from flame_moe.data.sources._pictures import Pictures
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.schema import Modality, Task

Size = Annotated[int, Field(ge=1)]
_Rule = Callable[[Breast], bool]

YEAR_DAYS = 365.25
_CLINICAL_COLUMNS = (
    ("age", "years"),
    ("screening", "1 = screening, 0 = diagnostic"),
    ("earlier_exams", "exams"),
    ("years_since_exam", "years"),
)
_MEANING = {
    "ffdm_cc": "full-field digital mammogram, cranio-caudal view",
    "ffdm_mlo": "full-field digital mammogram, medio-lateral oblique view",
    "cview_cc": "synthetic 2D mammogram (C-view), cranio-caudal view",
    "cview_mlo": "synthetic 2D mammogram (C-view), medio-lateral oblique view",
}


class EmbedOptions(Description):
    """How the release is read.

    Attributes:
        pictures: folder that holds the picture files; the raw folder if not given.
        path_column: column of the metadata table that names a picture's file.
        size: height and width that pictures are brought to.
        mirror: mirror right breasts, so that all chest walls are on the left.
        workers: processes that read pictures; the store is the same whatever their number.
        unreadable: what a damaged picture file does: `stop`, or `leave_out` its view and count it.
        embeddings: file of vectors to read instead of pictures, see `_embed_vectors.Vectors`.
        embedding_width: numbers in a vector.
        birads: how letters of the assessment become three classes, see `_embed_labels.GROUPINGS`.
        short_followup: what a breast without cancer whose record ends before five years is for `risk`.
        exams: `all`, or only those whose description says `screening`.
        implants: whether exams with an implant finding are kept.
        seed: decides the split.
    """

    pictures: str | None = None
    path_column: Literal["anon_dicom_path", "png_path", "png_filename"] = "anon_dicom_path"
    size: tuple[Size, Size] = (224, 192)
    mirror: bool = True
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    unreadable: Literal["stop", "leave_out"] = "stop"
    embeddings: str | None = None
    embedding_width: Size = 768
    birads: Literal["reading", "management", "screening"] = "reading"
    short_followup: Literal["no_label", "negative"] = "no_label"
    exams: Literal["all", "screening"] = "all"
    implants: Literal["keep", "leave_out"] = "keep"
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: EmbedOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Four streams of pictures or vectors and, where the clinical table is there, a table; three tasks."""
    need_metadata(raw)
    modalities = [_stream(name, options) for name in STREAMS.values()]
    if raw is not None and find(raw, CLINICAL) is not None:
        modalities.append(_table())
    names = tuple(m.name for m in modalities)
    classes = {
        "birads": tuple(name for name, _ in GROUPINGS[options.birads]),
        "risk": ("no cancer", "cancer"),
        "density": DENSITIES,
    }
    tasks = [{**task, "modalities": names, "classes": classes[str(task["name"])]} for task in _TASKS]
    return tuple(modalities), tuple(Task.parse(task, where=f"tasks.{task['name']}") for task in tasks)


def read(raw: Path | None, options: EmbedOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream breasts in exams, by woman and exam.

    Raises:
        DataError: with file, column and value, if a table, vector or picture is missing where needed, or malformed.
    """
    metadata, tally = need_metadata(raw), Counter[str]()
    raw = Path(raw) if raw is not None else metadata.parent
    clinical = find(raw, CLINICAL)
    women = {} if clinical is None else read_women(work.note(clinical), tally)
    breasts = read_breasts(work.note(metadata), options.path_column, women, tally)
    funnel.start(len(breasts), "breasts in exams that have a picture")
    if clinical is None:
        funnel.count(f"table {CLINICAL[0]} absent: modality clinical and all labels left out")
    kept = []
    for text, rule in _rules(options, women):
        kept = breasts = [breast for breast in breasts if rule(breast)]
        funnel.rule(text, len(kept))
    source = _open(raw, options, work)
    written = 0
    # Vectors lie in memory: a copy of them per process would cost more than it saves.
    workers = options.workers if isinstance(source, Pictures) else 1
    for breast, (parts, missing) in zip(kept, in_order(partial(_pictures, source), kept, workers), strict=True):
        tally.update(missing)
        woman, targets = women.get(breast.empi), {}
        if woman is not None:
            parts |= _clinical(woman, breast)
        if woman is not None and breast.acc in woman.exams:
            targets = _targets(woman, breast, options, tally)
        elif clinical is not None:
            tally["exam without a row in the clinical table, no labels"] += 1
        if parts:
            written += 1
            yield Sample(f"{breast.acc}-{breast.side}", breast.empi, parts, targets)
    funnel.rule("has a picture that is there, or a clinical table", written)
    for text in sorted(text for text, n in tally.items() if n):
        funnel.count(text, tally[text])


def split(options: EmbedOptions) -> SplitSpec:
    """70/10/20 by woman."""
    return SplitSpec(seed=options.seed)


def _rules(options: EmbedOptions, women: dict[str, Woman]) -> list[tuple[str, _Rule]]:
    """Which breasts stay, in order."""

    def findings(breast: Breast) -> list[Finding]:
        return women[breast.empi].exams.get(breast.acc, []) if breast.empi in women else []

    rules: list[tuple[str, _Rule]] = [
        ("has a standard view: 2D or C-view, CC or MLO, no spot or magnification", lambda b: bool(b.streams)),
        ("not a male breast (density code 5)", lambda b: all(f.density != MALE for f in findings(b))),
    ]
    if options.exams == "screening":
        rules.append(("is a screening exam", lambda b: any(f.screening for f in findings(b))))
    if options.implants == "leave_out":
        rules.append(("has no implant finding", lambda b: not any(f.implant for f in findings(b))))
    return rules


def _open(raw: Path, options: EmbedOptions, work: Work) -> Pictures | Vectors:
    if options.embeddings is not None:
        path = Path(options.embeddings)
        return Vectors(work.note(path) if path.is_file() else path, options.embedding_width)
    root = raw if options.pictures is None else Path(options.pictures)
    shape = (*options.size, 1)
    return Pictures(root, shape, mirror=options.mirror, skip=options.unreadable == "leave_out")


def _pictures(source: Pictures | Vectors, breast: Breast) -> tuple[dict[str, Observation], Counter[str]]:
    """Of each stream the first picture, by path, that is there; and what is missing."""
    missing = Counter[str]()
    found = {name: source.first(breast.streams.get(name, ()), breast.side, missing) for name in STREAMS.values()}
    return {name: picture for name, picture in found.items() if picture is not None}, missing


def _clinical(woman: Woman, breast: Breast) -> dict[str, Observation]:
    """What is known before the pictures are read; nothing of the report, the pathology or later exams."""
    findings = woman.exams.get(breast.acc, [])
    day = breast.day or woman.days.get(breast.acc)
    age = next((f.age for f in findings if f.age is not None), np.nan)
    kind = next((float(f.screening) for f in findings if f.screening is not None), np.nan)
    earlier = [] if day is None else [d for acc, d in woman.days.items() if acc != breast.acc and d < day]
    since = (day - max(earlier)).days / YEAR_DAYS if day is not None and earlier else np.nan
    values = np.array([[age, kind, np.nan if day is None else len(earlier), since]])
    observed = ~np.isnan(values)
    if not observed.any():
        return {}
    return {"clinical": Observation(np.where(observed, values, 0.0).astype(np.float32), None, observed)}


def _targets(
    woman: Woman, breast: Breast, options: EmbedOptions, tally: Counter[str]
) -> dict[str, NDArray[np.float32]]:
    findings = woman.exams[breast.acc]
    day = breast.day or woman.days.get(breast.acc)
    found = {
        "birads": birads(findings, breast.side, options.birads, tally),
        "risk": risk(woman, breast.acc, breast.side, day, options.short_followup, tally),
        "density": density(findings, tally),
    }
    return {name: np.array([value], dtype=np.float32) for name, value in found.items() if value is not None}


def _stream(name: str, options: EmbedOptions) -> Modality:
    if options.embeddings is not None:
        description = f"vectors of the {_MEANING[name]}"
        return Modality(name=name, kind="patches", features=options.embedding_width, description=description)
    height, width = options.size
    return Modality(
        name=name, kind="image", features=height * width, shape=(height, width, 1), description=_MEANING[name]
    )


def _table() -> Modality:
    return Modality(
        name="clinical",
        kind="table",
        features=len(_CLINICAL_COLUMNS),
        channels=tuple(name for name, _ in _CLINICAL_COLUMNS),
        units=tuple(unit for _, unit in _CLINICAL_COLUMNS),
        description="age, exam kind and earlier exams: what is known before the pictures are read",
        scaling="quantile",
    )


_TASKS: tuple[dict[str, object], ...] = (
    {
        "name": "birads",
        "kind": "multiclass",
        "loss": "focal",
        "family": "assessment",
        "description": "the radiologist's assessment of the breast in this exam, its most serious finding",
        "caveat": "What was read, not what was found later. The paper does not say how the letters become three "
        "classes; the option birads chooses.",
    },
    {
        "name": "risk",
        "kind": "binary",
        "loss": "focal",
        "family": "outcome",
        "description": "invasive or in-situ cancer of this breast, by pathology, within five years after the exam",
        "caveat": "Includes cancers that this exam itself led to, so it is detection as well as risk. Cancers treated "
        "elsewhere are not recorded; breasts without cancer and less than five years of record have no label, which "
        "leaves women who keep coming.",
    },
    {
        "name": "density",
        "kind": "multiclass",
        "loss": "focal",
        "family": "assessment",
        "description": "BI-RADS density of the breasts as reported in this exam",
        "caveat": "One value per exam, so both breasts have the same; readers differ between neighbouring classes.",
    },
)

SOURCE = Source(
    name="embed",
    summary="EMBED mammography: four views per breast and exam, clinical table; assessment, five-year cancer, density.",
    needs_raw=True,
    options=EmbedOptions,
    describe=describe,
    read=read,
    split=split,
)
