"""CBIS-DDSM: masses and calcifications in film mammograms as radiologists described them, with their pathology.

Lee, Gimenez, Hoogi, Miyake, Gorovoy and Rubin, A curated mammography data set for use in computer-aided detection and
diagnosis research, Scientific Data 4:170177, 2017. Four case tables, masses and calcifications, for training and test;
the pictures are a separate download and optional. A sample is one breast of a woman with all findings in it.

    mass_cc, mass_mlo        table: shape and margins of the masses seen in that view
    calc_cc, calc_mlo        table: type and distribution of the calcifications seen in that view
    picture_cc, picture_mlo  image: the whole film of that view, if the option `pictures` names a folder

The official training and test tables are not used as splits: of masses and calcifications they were drawn separately,
and some women are in the training table of one and the test table of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._cbis_ddsm_tables import PARTS, VIEWS, WORDS, Row, find_tables, read_table
from flame_moe.data.sources._embed_labels import ASSESSMENTS, DENSITIES, GROUPINGS
from flame_moe.data.sources._pictures import Pictures
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.schema import Modality, Task

Size = Annotated[int, Field(ge=1)]
_LETTERS = {category: letter for letter, category in ASSESSMENTS.items()}


class CbisDdsmOptions(Description):
    """How the set is read.

    Attributes:
        unit: what a sample is: a `breast` with all its findings, or a single `finding` in its views.
        birads: how assessments become three classes, see `_embed_labels.GROUPINGS`.
        pictures: folder of the DICOM files, as the tables name them or with one folder per view as download tools
            make them (`Calc-Test_P_00038_LEFT_CC` with one file below); without it there are no pictures.
        size: height and width that pictures are brought to.
        mirror: mirror right breasts, so that all chest walls are on the left.
        unreadable: what a damaged picture file does: `stop`, or `leave_out` its view and count it.
        seed: decides the split.
    """

    unit: Literal["breast", "finding"] = "breast"
    birads: Literal["reading", "management", "screening"] = "management"
    pictures: str | None = None
    size: tuple[Size, Size] = (224, 192)
    mirror: bool = True
    unreadable: Literal["stop", "leave_out"] = "stop"
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: CbisDdsmOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """A table per kind and view, pictures if they are given; three tasks."""
    kinds = [kind for kind in WORDS if any(found == kind for found, _ in find_tables(raw))]
    modalities = [_table(kind, view) for kind in kinds for view in VIEWS]
    if options.pictures is not None:
        modalities += [_picture(view, options) for view in VIEWS]
    names = tuple(m.name for m in modalities)
    classes = {
        "risk": ("benign", "malignant"),
        "birads": tuple(name for name, _ in GROUPINGS[options.birads]),
        "density": DENSITIES,
    }
    tasks = [{**task, "modalities": names, "classes": classes[str(task["name"])]} for task in _TASKS]
    return tuple(modalities), tuple(Task.parse(task, where=f"tasks.{task['name']}") for task in tasks)


def read(raw: Path | None, options: CbisDdsmOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the breasts, or findings, by woman.

    Raises:
        DataError: with file, column and value, if a table cannot be used.
    """
    tally: Counter[str] = Counter()
    rows: dict[tuple[str, ...], list[Row]] = {}
    parts: dict[str, set[str]] = {part: set() for part in PARTS}
    tables = find_tables(raw)
    for (kind, part), path in tables.items():
        for row in read_table(work.note(path), kind, part, tally):
            rows.setdefault(_key(row, options), []).append(row)
            parts[part].add(row.woman)
    tally["women in a training table and a test table, kept in one split"] = len(parts["train"] & parts["test"])
    for kind in WORDS:
        if not any(found == kind for found, _ in tables):
            tally[f"tables of {kind} absent: modalities {kind}_cc and {kind}_mlo left out"] += 1
    funnel.start(len(rows), "findings described" if options.unit == "finding" else "breasts with findings described")
    folder = None
    if options.pictures is not None:
        skip = options.unreadable == "leave_out"
        root, shape = Path(options.pictures), (*options.size, 1)
        folder = Pictures(root, shape, mirror=options.mirror, skip=skip, alone=True)
    for key in sorted(rows):
        found = rows[key]
        modalities = _tables(found)
        if folder is not None:
            modalities |= _pictures(found, folder, tally)
        yield Sample("-".join(key), key[0], modalities, _targets(found, options, tally))
    for text in sorted(text for text, n in tally.items() if n):
        funnel.count(text, tally[text])


def split(options: CbisDdsmOptions) -> SplitSpec:
    """70/10/20 by woman."""
    return SplitSpec(seed=options.seed)


def _key(row: Row, options: CbisDdsmOptions) -> tuple[str, ...]:
    breast = (row.woman, row.side)
    return breast if options.unit == "breast" else (*breast, row.kind, str(row.number))


def _columns(kind: str) -> list[tuple[str, str]]:
    """(column of the table or own name, word) of each feature."""
    words = [(column, word) for column, lexicon in WORDS[kind].items() for word in lexicon]
    return [*words, ("findings", ""), ("subtlety", "")]


def _tables(rows: list[Row]) -> dict[str, Observation]:
    """The union of words of all findings of a kind in a view; a group of words that no finding has is not observed."""
    parts = {}
    for kind, lexicon in WORDS.items():
        for view in VIEWS:
            seen = [row for row in rows if row.kind == kind and row.view == view]
            if not seen:
                continue
            words = {column: frozenset[str]().union(*(r.words.get(column, ()) for r in seen)) for column in lexicon}
            said = [float(w in words[c]) if words[c] else np.nan for c, group in lexicon.items() for w in group]
            clear = [row.subtlety for row in seen if row.subtlety is not None]
            values = np.array([[*said, len({row.number for row in seen}), max(clear, default=np.nan)]])
            observed = ~np.isnan(values)
            cells = np.where(observed, values, 0.0).astype(np.float32)
            parts[f"{kind}_{view.lower()}"] = Observation(cells, None, observed)
    return parts


def _pictures(rows: list[Row], folder: Pictures, tally: Counter[str]) -> dict[str, Observation]:
    """Of each view the first film, by path, that is there."""
    parts = {}
    for view in VIEWS:
        names = sorted({row.picture for row in rows if row.view == view and row.picture is not None})
        first = folder.first(names, rows[0].side, tally)
        if first is not None:
            parts[f"picture_{view.lower()}"] = first
    return parts


def _targets(rows: list[Row], options: CbisDdsmOptions, tally: Counter[str]) -> dict[str, NDArray[np.float32]]:
    """Any malignant finding, the most serious assessment, the density if all findings agree on it."""
    found: dict[str, int] = {}
    pathologies = [row.malignant for row in rows if row.malignant is not None]
    if pathologies:
        found["risk"] = max(pathologies)
    classes = {letter: i for i, (_, group) in enumerate(GROUPINGS[options.birads]) for letter in group}
    letters = [_LETTERS[row.assessment] for row in rows if row.assessment is not None]
    if letters and all(letter in classes for letter in letters):
        found["birads"] = max(classes[letter] for letter in letters)
    else:
        tally[f"assessment outside the classes of {options.birads}, no label of birads"] += 1
    densities = {row.density for row in rows if row.density is not None}
    if len(densities) == 1:
        found["density"] = densities.pop() - 1
    else:
        tally["density missing or different between findings, no label of density"] += 1
    return {name: np.array([value], dtype=np.float32) for name, value in found.items()}


def _table(kind: str, view: str) -> Modality:
    what = "masses" if kind == "mass" else "calcifications"
    columns = _columns(kind)
    return Modality(
        name=f"{kind}_{view.lower()}",
        kind="table",
        features=len(columns),
        channels=tuple(f"{column.split()[-1]} {word.lower()}".strip() for column, word in columns),
        units=tuple({"findings": "findings", "subtlety": "1 to 5"}.get(column, "1 = yes") for column, _ in columns),
        description=f"{what} seen in the {view} view, as the radiologist described them",
        scaling="quantile",
    )


def _picture(view: str, options: CbisDdsmOptions) -> Modality:
    height, width = options.size
    return Modality(
        name=f"picture_{view.lower()}",
        kind="image",
        features=height * width,
        shape=(height, width, 1),
        description=f"film mammogram, {view} view",
    )


_TASKS: tuple[dict[str, object], ...] = (
    {
        "name": "risk",
        "kind": "binary",
        "loss": "focal",
        "family": "outcome",
        "description": "any finding of the sample malignant by pathology; benign without callback counts as benign",
        "caveat": "Every sample has a finding that was described, so this is diagnosis of findings, not screening; "
        "benign findings without callback were not biopsied.",
    },
    {
        "name": "birads",
        "kind": "multiclass",
        "loss": "focal",
        "family": "assessment",
        "description": "the radiologist's BI-RADS assessment, most serious finding",
        "caveat": "Given by the reader who also described the findings, so largely a function of the description.",
    },
    {
        "name": "density",
        "kind": "multiclass",
        "loss": "focal",
        "family": "assessment",
        "description": "BI-RADS density of the breast",
        "caveat": "Descriptions of findings hardly say it; with pictures it is visible.",
    },
)

SOURCE = Source(
    name="cbis_ddsm",
    summary="CBIS-DDSM mammography: described masses and calcifications per view; pathology, BI-RADS, density.",
    needs_raw=True,
    options=CbisDdsmOptions,
    describe=describe,
    read=read,
    split=split,
)
