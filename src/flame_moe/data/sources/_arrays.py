"""Sets of pictures in one `.npz` file: found, checked before a picture is used, and made smaller."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.errors import DataError, nearest
from flame_moe.schema import Modality

Pixels = NDArray[np.uint8]

_BROKEN = (OSError, EOFError, ValueError, zipfile.BadZipFile)


def find_arrays(raw: Path | None, needed: tuple[str, ...], what: str) -> Path:
    """The file itself if `raw` is one, else the only `.npz` file in the folder that holds the arrays.

    Args:
        raw: folder or file.
        needed: names of arrays.
        what: where to get it, for the message.

    Raises:
        DataError: if there is none, several, or an array is missing.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend=f"Give the folder of {what}.")
    if raw.is_file():
        names = _names(raw)
        for name in needed:
            if name not in names:
                raise DataError(f"the array '{name}' is missing", where=str(raw), mend=nearest(name, names))
        return raw
    found = [path for path in sorted(raw.glob("*.npz")) if set(needed) <= _names(path)]
    if len(found) != 1:
        said = f"there are {len(found)} .npz files with arrays {', '.join(needed)}, not one"
        raise DataError(said, where=str(raw), mend=f"Give the file itself; it is part of {what}.")
    return found[0]


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """Those of the arrays that are there, by name.

    Raises:
        DataError: if the file is damaged.
    """
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in names if name in arrays}
    except _BROKEN as error:
        raise DataError(f"the file cannot be read ({type(error).__name__})", where=str(path)) from None


def check_pictures(pictures: NDArray[Any], labels: NDArray[Any] | None, classes: int, where: str) -> None:
    """Refuses what are no 8-bit pictures with a class each, where there are labels.

    Raises:
        DataError: naming the array and what is wrong.
    """
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4):
        what = f"pictures are {pictures.dtype} of shape {pictures.shape}"
        raise DataError(what, where=where, mend="Give uint8 of shape (n, height, width).")
    if labels is None:
        return
    if len(labels) != len(pictures):
        raise DataError(f"{len(pictures)} pictures have {len(labels)} labels", where=where, mend="Give one label each.")
    if len(labels) and not np.isin(labels, np.arange(classes)).all():
        bad = labels[~np.isin(labels, np.arange(classes))][0]
        raise DataError(f"a label is {bad}, not one of {classes} classes", where=where)


def picture_shape(path: Path, name: str, shrink: int = 1) -> tuple[int, int, int]:
    """(height, width, channels) of the pictures in an array, from its header alone, made smaller by `shrink`.

    Raises:
        DataError: if they are no pictures or cannot be divided.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape = header(file)[0]
    except (*_BROKEN, KeyError) as error:
        raise DataError(f"the file cannot be read ({type(error).__name__})", where=str(path)) from None
    if len(shape) not in (3, 4) or shape[1] % shrink or shape[2] % shrink:
        what = f"pictures of shape {tuple(shape[1:])} cannot be made smaller by {shrink}"
        raise DataError(what, where=f"{path}: {name}", mend="Choose a divisor of both sides.")
    return shape[1] // shrink, shape[2] // shrink, shape[3] if len(shape) == 4 else 1


def smaller(picture: Pixels, shrink: int) -> Pixels:
    """Means of squares of `shrink` by `shrink` pixels."""
    if shrink == 1:
        return picture
    height, width = picture.shape[0] // shrink, picture.shape[1] // shrink
    blocks = picture.reshape(height, shrink, width, shrink, -1).astype(np.float32).mean(axis=(1, 3))
    return np.rint(blocks).astype(np.uint8)


def seen(picture: Pixels) -> Observation:
    """A single picture at time 0."""
    return Observation(picture.reshape(1, -1), np.zeros(1, dtype=np.float32))


def picture_modality(name: str, shape: tuple[int, int, int], description: str) -> Modality:
    """An image modality of that shape."""
    features = shape[0] * shape[1] * shape[2]
    return Modality(name=name, kind="image", features=features, shape=shape, description=description)


def twins(pictures: Pixels, others: Pixels, above: float) -> NDArray[np.bool_]:
    """(n,) whether a picture correlates above a limit, pixel by pixel, with any of the others."""
    if len(others) == 0:
        return np.zeros(len(pictures), dtype=bool)
    known = _unit(others)
    return np.concatenate([(_unit(part) @ known.T > above).any(axis=1) for part in _parts(pictures)])


def _parts(pictures: Pixels, rows: int = 1024) -> Iterator[Pixels]:
    for start in range(0, max(len(pictures), 1), rows):
        yield pictures[start : start + rows]


def _unit(pictures: Pixels) -> NDArray[np.float32]:
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.maximum(norm, np.float32(1e-6))


def _names(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except _BROKEN:
        raise DataError("the file is no .npz, or damaged", where=str(path), mend="Fetch it again.") from None
