"""The four case tables of CBIS-DDSM, and the words in which they describe a finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from flame_moe.data.tables import collect, find_table, scan_table
from flame_moe.errors import DataError

PARTS = ("train", "test")
VIEWS = ("CC", "MLO")
SIDES = {"LEFT": "L", "RIGHT": "R"}
SYNONYMS = {"LUCENT_CENTERED": "LUCENT_CENTER"}

WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "mass": {
        "mass shape": (
            *("ROUND", "OVAL", "LOBULATED", "IRREGULAR", "LYMPH_NODE"),
            *("ARCHITECTURAL_DISTORTION", "FOCAL_ASYMMETRIC_DENSITY", "ASYMMETRIC_BREAST_TISSUE"),
        ),
        "mass margins": ("CIRCUMSCRIBED", "MICROLOBULATED", "OBSCURED", "ILL_DEFINED", "SPICULATED"),
    },
    "calc": {
        "calc type": (
            *("AMORPHOUS", "PUNCTATE", "PLEOMORPHIC", "FINE_LINEAR_BRANCHING", "COARSE", "DYSTROPHIC", "EGGSHELL"),
            *("LARGE_RODLIKE", "LUCENT_CENTER", "MILK_OF_CALCIUM", "ROUND_AND_REGULAR", "SKIN", "VASCULAR"),
        ),
        "calc distribution": ("CLUSTERED", "LINEAR", "SEGMENTAL", "REGIONAL", "DIFFUSELY_SCATTERED"),
    },
}
"""Kind of finding -> column -> the words of the lexicon that occur in it; several are joined by a hyphen."""

PATHOLOGIES = {"MALIGNANT": 1, "BENIGN": 0, "BENIGN_WITHOUT_CALLBACK": 0}

_DENSITY = ("breast_density", "breast density")
"""The name of the column in the tables of masses and in those of calcifications."""


class Row(NamedTuple):
    """A finding in one view.

    Attributes:
        words: column -> the words that describe the finding; a column without any is left out.
        subtlety: 1 (hardly visible) to 5, or None.
    """

    woman: str
    side: str
    view: str
    kind: str
    part: str
    number: int
    words: dict[str, frozenset[str]]
    subtlety: int | None
    density: int | None
    assessment: int | None
    malignant: int | None
    picture: str | None


def find_tables(raw: Path | None) -> dict[tuple[str, str], Path]:
    """(kind, part) -> its file, for those of the four tables that are there.

    Raises:
        DataError: if none is.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder of the CBIS-DDSM case tables.")
    places = {(kind, part): find_table(raw, f"{kind}_case_description_{part}_set") for kind in WORDS for part in PARTS}
    found = {key: path for key, path in places.items() if path is not None}
    if not found:
        what = "no table KIND_case_description_PART_set is there"
        raise DataError(what, where=str(raw), mend="They are part of CBIS-DDSM in The Cancer Imaging Archive.")
    return found


def read_table(path: Path, kind: str, part: str, tally: Counter[str]) -> Iterator[Row]:
    """Findings of one table.

    Raises:
        DataError: if a column is missing or a cell is not of its type.
    """
    for row in collect(_scan(path, kind), path).iter_rows(named=True):
        side, view = SIDES.get(row["left or right breast"]), row["image view"]
        if row["patient_id"] is None or side is None or view not in VIEWS:
            tally["row without a woman, side or view left out"] += 1
            continue
        words = {column: _words(row[column], column, kind, tally) for column in WORDS[kind]}
        malignant = PATHOLOGIES.get(row["pathology"])
        tally[f"unknown pathology {row['pathology']}, no label"] += row["pathology"] is not None and malignant is None
        yield Row(
            woman=row["patient_id"],
            side=side,
            view=view,
            kind=kind,
            part=part,
            number=row["abnormality id"] or 1,
            words={column: found for column, found in words.items() if found},
            subtlety=_within(row["subtlety"], 1, 5, "subtlety", tally),
            density=_within(row["density"], 1, 4, "density", tally),
            assessment=_within(row["assessment"], 0, 5, "assessment", tally),
            malignant=malignant,
            picture=row["image file path"],
        )


def _scan(path: Path, kind: str) -> pl.LazyFrame:
    """The columns that are used; text is stripped, because cells of paths end with a line end."""
    texts = ("patient_id", "left or right breast", "image view", "pathology", "image file path", *WORDS[kind])
    numbers = ("abnormality id", "assessment", "subtlety")
    columns: dict[str, Any] = {name: pl.String for name in texts} | {name: pl.Int64 for name in numbers}
    for density in _DENSITY:
        try:
            frame = scan_table(path, columns | {density: pl.Int64}, optional=("image file path",))
        except DataError:
            if density == _DENSITY[-1]:
                raise
        else:
            break
    return frame.rename({density: "density"})


def _words(text: str | None, column: str, kind: str, tally: Counter[str]) -> frozenset[str]:
    if text is None or text == "NA":
        return frozenset()
    found = {SYNONYMS.get(word, word) for word in text.split("-")}
    for word in sorted(found.difference(WORDS[kind][column])):
        tally[f"unknown word {word} in {column} ignored"] += 1
    return frozenset(found.intersection(WORDS[kind][column]))


def _within(value: int | None, low: int, high: int, name: str, tally: Counter[str]) -> int | None:
    if value is None or low <= value <= high:
        return value
    tally[f"{name} {value} is outside {low} to {high}, set to missing"] += 1
    return None
