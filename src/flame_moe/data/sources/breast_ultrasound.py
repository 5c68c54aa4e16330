"""Breast ultrasound pictures (BUSI): normal, benign and malignant.

Al-Dhabyani, Gomaa, Khaled and Fahmy, Data in Brief 28:104863, 2020, read from one `.npz` file with arrays `images`,
`labels` (0 normal, 1 benign, 2 malignant), `filenames` and `groups`. Many pictures are near-duplicates of others;
`groups` joins those, and a group is a subject, so that near-duplicates are in one split.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Sample
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
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.schema import Modality, Task

_NEEDED = ("images", "groups")
_CLASSES = ("normal", "benign", "malignant")


class BreastUltrasoundOptions(Description):
    """How the file is read.

    Attributes:
        shrink: how many times smaller pictures are made, by means of squares.
        seed: decides the split.
    """

    shrink: Annotated[int, Field(ge=1)] = 2
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: BreastUltrasoundOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """One picture, three tasks."""
    shape = picture_shape(find_arrays(raw, _NEEDED, "BUSI"), "images", options.shrink)
    return (picture_modality("picture", shape, "ultrasound of the breast"),), _TASKS


def read(raw: Path | None, options: BreastUltrasoundOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the pictures.

    Raises:
        DataError: if arrays are missing, damaged, or hold no pictures with a class each.
    """
    path = work.note(find_arrays(raw, _NEEDED, "BUSI"))
    arrays = read_arrays(path, (*_NEEDED, "labels"))
    pictures, groups = arrays["images"], arrays["groups"].ravel()
    labels = arrays["labels"].ravel() if "labels" in arrays else None
    check_pictures(pictures, labels, len(_CLASSES), f"{path}: images")
    funnel.start(len(pictures), "pictures in the file")
    classes: dict[int, set[int]] = {}
    for i, (picture, group) in enumerate(zip(pictures, groups, strict=True)):
        targets = {} if labels is None else _targets(int(labels[i]))
        if labels is not None:
            classes.setdefault(int(group), set()).add(int(labels[i]))
        yield Sample(f"picture{i:04d}", f"group{group}", {"picture": seen(smaller(picture, options.shrink))}, targets)
    funnel.count("groups of near-duplicates with different labels", sum(len(found) > 1 for found in classes.values()))


def _targets(label: int) -> dict[str, NDArray[np.float32]]:
    values = {"finding": label, "lesion": int(label > 0)} | ({"malignant": int(label == 2)} if label > 0 else {})
    return {name: np.array([value], dtype=np.float32) for name, value in values.items()}


def split(options: BreastUltrasoundOptions) -> SplitSpec:
    """70/10/20 by group of near-duplicates."""
    return SplitSpec(seed=options.seed)


_CAVEAT = "Callipers are burnt into some pictures of lesions, and the set does not name the women."
_TASKS = (
    Task(
        name="finding",
        kind="multiclass",
        modalities=("picture",),
        classes=_CLASSES,
        family="finding",
        description="normal, benign or malignant",
        caveat=_CAVEAT,
    ),
    Task(
        name="lesion",
        kind="binary",
        modalities=("picture",),
        classes=("normal", "lesion"),
        family="finding",
        description="any lesion, benign or malignant",
        caveat=_CAVEAT,
    ),
    Task(
        name="malignant",
        kind="binary",
        modalities=("picture",),
        classes=("benign", "malignant"),
        family="finding",
        description="malignant among lesions; normal pictures have no label",
        caveat=_CAVEAT,
    ),
)

SOURCE = Source(
    name="breast_ultrasound",
    summary="Breast ultrasound (BUSI): normal, benign, malignant; near-duplicates kept in one split.",
    needs_raw=True,
    options=BreastUltrasoundOptions,
    describe=describe,
    read=read,
    split=split,
)
