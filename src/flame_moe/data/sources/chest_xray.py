"""Chest X-rays of children with and without pneumonia, from a file in the form of MedMNIST.

Kermany et al., Cell 172:1122-1131, 2018; PneumoniaMNIST of Yang et al., MedMNIST v2, Scientific Data 10:41, 2023. The
official splits are kept. Some pictures are in two of them: those are taken out of training, and out of validation where
the other is a test picture. The set does not name the children, so a picture is its own subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
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
    twins,
)
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.schema import SPLITS, Modality, Task

_ARRAYS = tuple(f"{split}_{what}" for split in SPLITS for what in ("images", "labels"))
_NEEDED = ("test_images",)
_CLASSES = ("normal", "pneumonia")


class ChestXrayOptions(Description):
    """How the file is read.

    Attributes:
        twin: correlation of pixels above which two pictures are the same one; 1 keeps all.
    """

    twin: Annotated[float, Field(gt=0.5, le=1.0)] = 0.98


def describe(raw: Path | None, options: ChestXrayOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """One picture, one task."""
    shape = picture_shape(find_arrays(raw, _NEEDED, "MedMNIST"), "test_images")
    return (picture_modality("picture", shape, "chest X-ray, front view"),), (_TASK,)


def read(raw: Path | None, options: ChestXrayOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the pictures of train, val and test.

    Raises:
        DataError: if arrays are missing, damaged, or hold no pictures with a class each.
    """
    path = work.note(find_arrays(raw, _NEEDED, "MedMNIST"))
    arrays = read_arrays(path, _ARRAYS)
    pictures = {split: arrays[f"{split}_images"] for split in SPLITS if f"{split}_images" in arrays}
    labels = {split: arrays[f"{split}_labels"].ravel() for split in pictures if f"{split}_labels" in arrays}
    for split in pictures:
        check_pictures(pictures[split], labels.get(split), len(_CLASSES), f"{path}: {split}_images")
    keep = {split: np.ones(len(pictures[split]), dtype=bool) for split in pictures}
    pairs = [("train", "val"), ("train", "test"), ("val", "test")]
    for split, other in pairs:
        if split in pictures and other in pictures:
            keep[split] &= ~twins(pictures[split], pictures[other], options.twin)
    funnel.start(sum(len(kept) for kept in keep.values()), "pictures in the file")
    left = sum(len(kept) for kept in keep.values())
    for split in [name for name in ("train", "val") if name in pictures]:
        left -= int((~keep[split]).sum())
        funnel.rule(f"{split} picture is not also in a later split", left)
    for split in pictures:
        for i in np.flatnonzero(keep[split]):
            name, label = f"{split}{i:05d}", labels.get(split)
            target = {} if label is None else {"pneumonia": label[i : i + 1].astype(np.float32)}
            yield Sample(name, name, {"picture": seen(pictures[split][i])}, target, split)


def split(options: ChestXrayOptions) -> SplitSpec:
    """Not used: the file fixes the splits."""
    return SplitSpec()


_TASK = Task(
    name="pneumonia",
    kind="binary",
    modalities=("picture",),
    classes=_CLASSES,
    family="finding",
    description="pneumonia, bacterial or viral, as graded by physicians",
    caveat="Children of one hospital; several pictures of a child may be in different official splits, and the set "
    "does not say which.",
)

SOURCE = Source(
    name="chest_xray",
    summary="Chest X-rays of children from a MedMNIST file: pneumonia or not, official splits.",
    needs_raw=True,
    options=ChestXrayOptions,
    describe=describe,
    read=read,
    split=split,
)
