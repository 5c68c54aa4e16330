"""Digits: 1,797 real handwritten digits of 8 x 8 pixels, bundled with scikit-learn; no download.

A small real set on which everything can be tried in seconds. Each image becomes five modalities that see different
parts of it, so that which modalities a task reads, and which are missing, matters:

    patches   four 4 x 4 quadrants, in reading order
    rows      ink of the odd rows only (1, 3, 5, 7), a sequence of four row vectors
    columns   ink of the even columns only (0, 2, 4, 6), a sequence of four column vectors
    strokes   a pen that scans the image row by row: times of the pixels with ink (irregular, as many steps as there
              are inked pixels, thinned at random), their column, row and intensity; intensity not always observed
    shape     a table of coarse statistics: ink, centroid, spread, slant, symmetry, holes, extent

Data: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits", the 1,797 digits of 13 writers that
were not used in training there; scikit-learn's `load_digits`. The set does not name the writers, so every image is
its own subject: splits are by image, not by writer, and scores are optimistic for a new writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage
from sklearn.datasets import load_digits

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.schema import Fraction, Modality, Task

Image = NDArray[np.float32]

CLASSES = tuple(str(d) for d in range(10))
LOOPED = (0, 6, 8, 9)
PARTS = {
    "loop": (0, 6, 8, 9),
    "top_bar": (5, 7),
    "straight": (1, 4, 7),
    "curve": (2, 3, 5, 6, 8, 9, 0),
    "foot": (2,),
}
SHAPE = ("ink", "centre_x", "centre_y", "spread_x", "spread_y", "slant", "symmetry", "holes", "width", "height")
GRID_Y, GRID_X = np.mgrid[0:8, 0:8].astype(np.float32)
FULL = np.float32(16.0)


class DigitsOptions(Description):
    """How the digits are made into samples.

    Attributes:
        missing: chance that a modality of a sample is missing; one always stays.
        seed: decides what is missing, what the pen skips, and the split.
    """

    missing: Fraction = 0.15
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: DigitsOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Five modalities and seven tasks."""
    return _MODALITIES, _TASKS


def read(raw: Path | None, options: DigitsOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """The 1,797 digits, one sample each."""
    digits = load_digits()
    images, labels = digits.images.astype(np.float32), digits.target
    generator = np.random.default_rng(options.seed)
    names = [m.name for m in _MODALITIES]
    funnel.start(len(images), "digits bundled with scikit-learn")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        everything = {
            "patches": Observation(image.reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)),
            "rows": Observation(image[1::2]),
            "columns": Observation(np.ascontiguousarray(image[:, 0::2].T)),
            "strokes": _strokes(image, generator),
            "shape": _shape(image),
        }
        absent = generator.random(len(names)) < options.missing
        absent[generator.integers(len(names))] = False
        kept = {name: everything[name] for name, gone in zip(names, absent, strict=True) if not gone}
        for name, gone in zip(names, absent, strict=True):
            funnel.count(f"modality {name} removed on purpose (option missing = {options.missing:g})", int(gone))
        yield Sample(f"digit{index:04d}", f"image{index:04d}", kept, _targets(image, int(label)))


def split(options: DigitsOptions) -> SplitSpec:
    """70/10/20 by image."""
    return SplitSpec(seed=options.seed)


def _strokes(image: Image, generator: np.random.Generator) -> Observation:
    """Inked pixels in scanning order; time is the position of the pen, a third are skipped, intensity often unseen."""
    rows, columns = np.nonzero(image > 0)
    seen = generator.random(len(rows)) < 2 / 3
    seen[generator.integers(len(rows))] = True
    rows, columns = rows[seen], columns[seen]
    values = np.stack([columns, rows, image[rows, columns]], axis=1).astype(np.float32)
    observed = np.ones(values.shape, dtype=bool)
    observed[:, 2] = generator.random(len(rows)) < 0.5
    return Observation(values, ((rows * 8 + columns) / 64).astype(np.float32), observed)


def _shape(image: Image) -> Observation:
    """Coarse statistics of the image; slant is not observed where the ink has no vertical spread."""
    ink = image.sum()
    weight = image / ink
    x, y = float((weight * GRID_X).sum()), float((weight * GRID_Y).sum())
    dx, dy = GRID_X - x, GRID_Y - y
    var_x, var_y = float((weight * dx**2).sum()), float((weight * dy**2).sum())
    slanted = var_y > 1e-6
    symmetry = 1.0 - float(np.abs(image - image[:, ::-1]).sum() / (2 * ink))
    inked = image > FULL / 4
    values = np.array(
        [
            ink,
            x,
            y,
            np.sqrt(var_x),
            np.sqrt(var_y),
            slant_of(image) if slanted else 0.0,
            symmetry,
            _holes(inked),
            np.ptp(np.flatnonzero(inked.any(axis=0))) + 1,
            np.ptp(np.flatnonzero(inked.any(axis=1))) + 1,
        ],
        dtype=np.float32,
    )
    observed = np.ones(len(SHAPE), dtype=bool)
    observed[SHAPE.index("slant")] = slanted
    return Observation(values[None], None, observed[None])


def slant_of(image: Image) -> float:
    """Columns that the ink moves to the right per row upwards: -cov(x, y) / var(y), intensity-weighted."""
    weight = image / image.sum()
    dx, dy = GRID_X - (weight * GRID_X).sum(), GRID_Y - (weight * GRID_Y).sum()
    return float(-(weight * dx * dy).sum() / (weight * dy**2).sum())


def _holes(inked: NDArray[np.bool_]) -> int:
    """Background regions (4-connected) that do not reach the border."""
    _, regions = ndimage.label(~np.pad(inked, 1))
    return int(regions) - 1


def _targets(image: Image, label: int) -> dict[str, NDArray[np.float32]]:
    values: dict[str, list[float]] = {
        "digit": [label],
        "odd": [label % 2],
        "large": [label >= 5],
        "loops": [label in LOOPED],
        "parts": [label in digits for digits in PARTS.values()],
        "ink": [float(image.sum() / FULL)],
        "slant": [slant_of(image)],
    }
    return {name: np.array(value, dtype=np.float32) for name, value in values.items()}


_MODALITIES = (
    Modality(name="patches", kind="patches", features=16, description="four 4 x 4 quadrants of pixel intensity"),
    Modality(name="rows", kind="patches", features=8, description="pixel rows 1, 3, 5, 7"),
    Modality(name="columns", kind="patches", features=8, description="pixel columns 0, 2, 4, 6"),
    Modality(
        name="strokes",
        kind="series",
        features=3,
        channels=("column", "row", "intensity"),
        description="two thirds of the inked pixels in scanning order, intensity half observed",
    ),
    Modality(
        name="shape",
        kind="table",
        features=len(SHAPE),
        channels=SHAPE,
        description="coarse statistics of the whole image",
    ),
)

_TASKS = (
    Task(
        name="digit",
        kind="multiclass",
        modalities=("rows", "columns", "shape"),
        classes=CLASSES,
        family="identity",
        description="which digit it is",
    ),
    Task(
        name="odd",
        kind="binary",
        modalities=("rows", "columns"),
        classes=("even", "odd"),
        family="identity",
        description="whether the digit is odd",
    ),
    Task(
        name="large",
        kind="binary",
        modalities=("patches", "strokes"),
        classes=("0 to 4", "5 to 9"),
        family="identity",
        description="whether the digit is at least 5",
    ),
    Task(
        name="loops",
        kind="binary",
        modalities=("patches", "shape"),
        classes=("open", "closed"),
        family="form",
        description="whether the digit has a closed loop: 0, 6, 8 or 9",
        caveat="Follows from the digit, not from the image: a 4 closed by hand counts as open.",
    ),
    Task(
        name="parts",
        kind="multilabel",
        modalities=("columns", "strokes"),
        classes=tuple(PARTS),
        family="form",
        description="which parts the digit is drawn from",
        caveat="Follows from the digit, not from the image.",
    ),
    Task(
        name="ink",
        kind="regression",
        modalities=("strokes", "columns"),
        classes=("ink",),
        family="writing",
        description="ink of the whole image in full pixels",
        caveat="Computed from the image; its modalities see half of the columns and part of the pixels.",
    ),
    Task(
        name="slant",
        kind="regression",
        modalities=("rows", "strokes"),
        classes=("slant",),
        family="writing",
        description="columns that the ink moves to the right per row upwards",
        caveat="Computed from the image; its modalities see half of the rows and part of the pixels.",
    ),
)

SOURCE = Source(
    name="digits",
    summary="1,797 real handwritten digits bundled with scikit-learn: five modalities, seven tasks, no download.",
    needs_raw=False,
    options=DigitsOptions,
    describe=describe,
    read=read,
    split=split,
)
