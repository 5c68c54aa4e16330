"""MNIST: handwritten digits, their four quadrants as four image modalities.

LeCun, Cortes and Burges, from one `.npz` file with arrays `x_train`, `y_train`, `x_test`, `y_test` (28 x 28 pixels). A
prefix of the training digits is used, every tenth of it for validation, and a prefix of the test digits: the order of
the set is mixed, so a prefix is a fair sample. The file does not name the writers; a digit is its own subject.
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
)
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

Count = Annotated[int, Field(ge=10)]

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
QUADRANTS = {"upper_left": (0, 0), "upper_right": (0, 1), "lower_left": (1, 0), "lower_right": (1, 1)}
LOOPED = (0, 6, 8, 9)


class MnistOptions(Description):
    """How much is read.

    Attributes:
        samples: digits from the start of the training set; every tenth is for validation.
        test: digits from the start of the test set.
    """

    samples: Count = 10_000
    test: Count = 2_000


def describe(raw: Path | None, options: MnistOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Four quadrants, four tasks."""
    path = find_arrays(raw, _ARRAYS, "MNIST")
    height, width, channels = picture_shape(path, "x_train", 2)
    if channels != 1:
        raise DataError(f"pictures have {channels} channels, not 1", where=f"{path}: x_train")
    shape = (height, width, channels)
    return tuple(picture_modality(n, shape, f"{n.replace('_', ' ')} quarter of the digit") for n in QUADRANTS), _TASKS


def read(raw: Path | None, options: MnistOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream training, validation and test digits.

    Raises:
        DataError: if arrays are missing, damaged, or hold no pictures with a class each.
    """
    path = work.note(find_arrays(raw, _ARRAYS, "MNIST"))
    arrays = read_arrays(path, _ARRAYS)
    found = sum(len(arrays[name]) for name in ("x_train", "x_test"))
    parts = [("train", options.samples), ("test", options.test)]
    for part, _ in parts:
        check_pictures(arrays[f"x_{part}"], arrays[f"y_{part}"], 10, f"{path}: x_{part}")
    funnel.start(found, "digits in the file")
    taken = {part: min(limit, len(arrays[f"x_{part}"])) for part, limit in parts}
    funnel.rule(f"among the first {options.samples} of training or {options.test} of test", sum(taken.values()))
    for part, count in taken.items():
        for i in range(count):
            split = "val" if part == "train" and i % 10 == 9 else part
            yield _sample(f"{part}{i:05d}", arrays[f"x_{part}"][i], int(arrays[f"y_{part}"][i]), split)


def split(options: MnistOptions) -> SplitSpec:
    """Not used: the file fixes the test set, and the order of the digits the rest."""
    return SplitSpec()


def _sample(name: str, digit: np.ndarray, label: int, split: str) -> Sample:
    height, width = digit.shape[0] // 2, digit.shape[1] // 2
    parts = {
        quadrant: seen(digit[row * height : (row + 1) * height, column * width : (column + 1) * width])
        for quadrant, (row, column) in QUADRANTS.items()
    }
    values = {"digit": label, "odd": label % 2, "large": label >= 5, "loops": label in LOOPED}
    return Sample(name, name, parts, {task: np.array([v], dtype=np.float32) for task, v in values.items()}, split)


def _task(name: str, classes: tuple[str, ...], description: str, caveat: str = "") -> Task:
    return Task(
        name=name,
        kind="binary" if len(classes) == 2 else "multiclass",
        modalities=tuple(QUADRANTS),
        classes=classes,
        family="identity",
        description=description,
        caveat=caveat,
    )


_TASKS = (
    _task("digit", tuple(str(d) for d in range(10)), "which digit it is"),
    _task("odd", ("even", "odd"), "whether the digit is odd"),
    _task("large", ("0 to 4", "5 to 9"), "whether the digit is at least 5"),
    _task(
        "loops",
        ("open", "closed"),
        "whether the digit has a closed loop: 0, 6, 8 or 9",
        "Follows from the digit, not from the picture: a 4 closed by hand counts as open.",
    ),
)

SOURCE = Source(
    name="mnist",
    summary="MNIST: four quadrants of handwritten digits as four image modalities, four tasks.",
    needs_raw=True,
    options=MnistOptions,
    describe=describe,
    read=read,
    split=split,
)
