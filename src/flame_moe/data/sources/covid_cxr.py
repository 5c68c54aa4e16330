"""Chest X-rays of patients with COVID-19 with what was known of them: truly paired picture and table.

The openly licensed rows of the COVID-19 image data collection (Cohen, Morrison and Dao, arXiv:2003.11597, 2020), read
from `metadata.csv` and a `.npz` file with `images` in the same order. A sample is a picture, its subject the patient.
Far too small to learn from: it shows that pictures and tables of the same patient go through together.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._arrays import (
    check_pictures,
    find_arrays,
    picture_modality,
    picture_shape,
    read_arrays,
    seen,
    smaller,
)
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import collect, need_table, scan_table
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

_WHAT = "the COVID-19 image data collection"
_VALUES: tuple[tuple[str, str], ...] = (
    ("offset", "days since symptoms or admission"),
    ("age", "years"),
    ("temperature", "degrees C"),
    ("pO2_saturation", "% or mmHg, as recorded"),
    ("neutrophil_count", "10^9/L"),
    ("lymphocyte_count", "10^9/L"),
)


class CovidCxrOptions(Description):
    """How the set is read.

    Attributes:
        shrink: how many times smaller pictures are made, by means of squares.
        in_icu: what a picture taken in intensive care is for the task: `no_label`, because the answer is known, or
            `keep` its label.
        seed: decides the split; with 43 patients not every seed leaves both answers in every split.
    """

    shrink: Annotated[int, Field(ge=1)] = 4
    in_icu: Literal["no_label", "keep"] = "no_label"
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: CovidCxrOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """A picture and a table, one task."""
    shape = picture_shape(find_arrays(raw, ("images",), _WHAT), "images", options.shrink)
    table = Modality(
        name="clinical",
        kind="table",
        features=len(_VALUES) + 1,
        channels=(*(name for name, _ in _VALUES), "male"),
        units=(*(unit for _, unit in _VALUES), "1 = male"),
        description="what was recorded with the picture",
        scaling="quantile",
    )
    return (picture_modality("picture", shape, "chest X-ray, front view"), table), (_TASK,)


def read(raw: Path | None, options: CovidCxrOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the pictures.

    Raises:
        DataError: if a file, column or array is missing or they do not fit each other.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend=f"Give the folder of {_WHAT}.")
    table, path = work.note(need_table(raw, "metadata", _WHAT)), work.note(find_arrays(raw, ("images",), _WHAT))
    texts = ("patientid", "sex", "went_icu", "in_icu")
    columns: dict[str, Any] = dict.fromkeys(texts, pl.String) | {name: pl.Float64 for name, _ in _VALUES}
    frame = collect(scan_table(table, columns, optional=("went_icu", "in_icu")), table)
    pictures = read_arrays(path, ("images",))["images"]
    check_pictures(pictures, None, 0, f"{path}: images")
    if len(pictures) != frame.height:
        what = f"there are {len(pictures)} pictures and {frame.height} rows"
        raise DataError(what, where=f"{path} and {table}", mend="Give the files that belong together.")
    funnel.start(frame.height, "pictures with a row")
    for i, row in enumerate(frame.iter_rows(named=True)):
        parts = {"picture": seen(smaller(pictures[i], options.shrink))} | _clinical(row)
        yield Sample(f"picture{i:03d}", str(row["patientid"]), parts, _targets(row, options, funnel))


def split(options: CovidCxrOptions) -> SplitSpec:
    """70/10/20 by patient."""
    return SplitSpec(seed=options.seed)


def _clinical(row: dict[str, Any]) -> dict[str, Observation]:
    """Nothing of the course: no intensive care, intubation, survival, notes."""
    male = {"M": 1.0, "F": 0.0}.get(row["sex"], np.nan)
    cells = [np.nan if row[name] is None else row[name] for name, _ in _VALUES]
    values = np.array([[*cells, male]], dtype=np.float64)
    observed = ~np.isnan(values)
    if not observed.any():
        return {}
    return {"clinical": Observation(np.where(observed, values, 0.0).astype(np.float32), None, observed)}


def _targets(row: dict[str, Any], options: CovidCxrOptions, funnel: Funnel) -> dict[str, NDArray[np.float32]]:
    answer = {"Y": 1.0, "N": 0.0}.get(row["went_icu"])
    if answer is None:
        funnel.count("went_icu not recorded, no label")
        return {}
    if row["in_icu"] == "Y" and options.in_icu == "no_label":
        funnel.count("picture taken in intensive care, no label")
        return {}
    return {"went_icu": np.array([answer], dtype=np.float32)}


_TASK = Task(
    name="went_icu",
    kind="binary",
    modalities=("picture", "clinical"),
    classes=("no intensive care", "intensive care"),
    family="outcome",
    description="the patient was in intensive care at any time of this illness",
    caveat="Recorded per patient, so pictures after discharge from intensive care count as positive too; nearly all "
    "pictures are of one hospital.",
)

SOURCE = Source(
    name="covid_cxr",
    summary="Chest X-rays with clinical values of 43 patients with COVID-19: intensive care or not; plumbing only.",
    needs_raw=True,
    options=CovidCxrOptions,
    describe=describe,
    read=read,
    split=split,
)
