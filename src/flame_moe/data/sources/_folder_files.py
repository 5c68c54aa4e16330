"""Modalities of a folder with a file or an array per sample: pictures, volumes, texts, waveforms, arrays."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.imaging import read_picture, read_volume, score_volume
from flame_moe.data.sources._folder_place import (
    HOURS,
    TIMES,
    Get,
    Place,
    existing,
    get_array,
    observation,
    open_arrays,
    slices,
    timed_rows,
)
from flame_moe.data.sources._folder_rules import (
    ImageRule,
    ModalityRule,
    SeriesRule,
    TableRule,
    TextRule,
    TimedRule,
    VolumeRule,
    WaveformRule,
)
from flame_moe.data.sources._folder_times import array_hours
from flame_moe.data.text import read_texts
from flame_moe.data.waveforms import fill_gaps, read_waveform, resample
from flame_moe.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".bmp", ".tif", ".tiff")
VOLUMES = (".nii.gz", ".nii")
TEXTS = (".txt",)
HEADERS = (".hea",)
BLOCK = 512
"""Samples whose texts are read together."""


def files_by_id(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """ID.ending and ID/*.ending of a folder, in alphabetical order.

    Raises:
        DataError: if there is no such file.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in inside:
            ending = next((e for e in endings if file.name.lower().endswith(e)), None)
            if ending is not None:
                found[path.name if path.is_dir() else file.name[: -len(ending)]].append(file)
    if not found:
        what = f"the folder holds no file that ends in {', '.join(endings)}"
        raise DataError(what, where=str(folder), mend="Name the files after the sample ids.")
    return found


def _files(rule: ModalityRule, place: Place, endings: Sequence[str]) -> dict[str, list[Path]]:
    folder = existing(place.raw, str(rule.folder), place.name)
    found = files_by_id(folder, endings)
    known = place.known(found, folder)
    return {id: files for id, files in found.items() if id in known}


def _one(files: Mapping[str, Sequence[Path]], id: str) -> Path:
    if len(files[id]) > 1:
        what = f"'{id}' has {len(files[id])} files: {files[id][0].name}, {files[id][1].name}"
        raise DataError(what, where=str(files[id][0].parent), mend="Keep one.")
    return files[id][0]


def pictures(rule: ImageRule, place: Place) -> Get:
    """Pictures of a folder, all at the origin, or of a table with paths and times."""
    if rule.folder is not None:
        files = _files(rule, place, PICTURES)
        times = {id: np.zeros(len(paths), dtype=np.float32) for id, paths in files.items()}
    else:
        frame = timed_rows(rule, place, {rule.path: pl.String})
        place.count("row without a path, left out", frame[rule.path].null_count())
        frame = frame.drop_nulls(rule.path)
        rows = slices(frame["_id"])
        files = {
            id: [existing(place.raw, name, place.name) for name in frame[rule.path][at]] for id, at in rows.items()
        }
        times = {id: frame["_time"][at].to_numpy().astype(np.float32) for id, at in rows.items()}

    def get(id: str) -> Observation | None:
        if id not in files:
            return None
        return Observation(np.stack([read_picture(path, rule.shape) for path in files[id]]), times[id])

    return get


def volumes(rule: VolumeRule, place: Place) -> Get:
    """Blocks of a volume, right to left innermost, each a vector."""
    files = _files(rule, place, VOLUMES)

    def get(id: str) -> Observation | None:
        return Observation(_blocks(read_volume(_one(files, id), rule.size), rule.block)) if id in files else None

    return get


def volume_arrays(rule: VolumeRule, place: Place) -> Get:
    """Arrays (X, Y, Z) from left to right, back to front and bottom to top: like volumes of files."""
    opened, known, path = open_arrays(rule, place)

    def get(id: str) -> Observation | None:
        if id not in known:
            return None
        voxels, where = get_array(opened, id, path), f"{path}: '{id}'"
        if voxels.dtype.kind not in "fiub" or voxels.ndim != 3 or 0 in voxels.shape:
            raise DataError(f"the array is {voxels.dtype} {voxels.shape}, no volume (X, Y, Z)", where=where)
        scored = score_volume(voxels.astype(np.float32), np.array(rule.spacing), rule.size, where)
        return Observation(_blocks(scored, rule.block))

    return get


def _blocks(volume: NDArray[np.float32], block: tuple[int, int, int]) -> NDArray[np.float32]:
    """(X, Y, Z) -> (blocks, block voxels)."""
    x, y, z = (s // b for s, b in zip(volume.shape, block, strict=True))
    cut = volume.reshape(x, block[0], y, block[1], z, block[2]).transpose(4, 2, 0, 1, 3, 5)
    return cut.reshape(x * y * z, -1)


def text_files(rule: TextRule, place: Place) -> Get:
    """Text files, all at the origin, in alphabetical order; a blank one is nothing."""
    files = _files(rule, place, TEXTS)
    found: dict[str, Observation] = {}
    names = list(files)
    for start in range(0, len(names), BLOCK):
        ids = names[start : start + BLOCK]
        written = [(id, text) for id in ids for text in map(_text, files[id])]
        kept = [(id, text) for id, text in written if text.strip()]
        place.count("blank text file, left out", len(written) - len(kept))
        values, owner = read_texts([text for _, text in kept], rule.options, place.work.vectors)
        for id, rows in slices(pl.Series([kept[i][0] for i in owner], dtype=pl.String)).items():
            found[id] = Observation(values[rows], np.zeros(rows.stop - rows.start, dtype=np.float32))
    return found.get


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        mend = "Convert it, for example with iconv -f WINDOWS-1252 -t UTF-8."
        raise DataError("the file is not UTF-8 text", where=str(path), mend=mend) from None


def records(rule: WaveformRule, place: Place) -> Get:
    """WFDB records."""
    if not rule.leads:
        mend = "Name those of the records, in the order wanted."
        raise DataError("the key 'leads' is missing", where=f"modalities.{place.name}", mend=mend)
    files = _files(rule, place, HEADERS)

    def get(id: str) -> Observation | None:
        if id not in files:
            return None
        read = read_waveform(_one(files, id), rule.leads, rule.rate, rule.seconds)
        place.count("missing sample of a waveform, filled from its neighbours", read.filled)
        return Observation(read.values)

    return get


def arrays(rule: ModalityRule, place: Place) -> Get:
    """Arrays of an array file by sample id; times, where the kind has them, are in ID.times and in the rule's unit."""
    opened, known, path = open_arrays(rule, place)

    def get(id: str) -> Observation | None:
        if id not in known:
            return None
        where = f"{path}: '{id}'"
        values = _steps(get_array(opened, id, path), rule, where)
        if isinstance(rule, WaveformRule):
            filled = fill_gaps(values, rule.leads, where)
            place.count("missing sample of a waveform, filled from its neighbours", filled.filled)
            return Observation(resample(filled.values, rule.rate, rule.rate, rule.seconds))
        times = _array_times(opened, id, rule, place, path, len(values)) if isinstance(rule, TimedRule) else None
        if isinstance(rule, (SeriesRule, TableRule)):
            return observation(values.astype(np.float64), times)
        return Observation(values if isinstance(rule, ImageRule) else values.astype(np.float32), times)

    return get


def _steps(values: NDArray[Any], rule: ModalityRule, where: str) -> NDArray[Any]:
    """(steps, features): one picture per step, one step of a table, a plain vector as one step or one lead."""
    if values.dtype.kind not in "fiub":
        raise DataError(f"the array is of type {values.dtype}, no numbers", where=where)
    if isinstance(rule, ImageRule):
        size = math.prod(rule.shape)
        if values.dtype != np.uint8 or values.size == 0 or values.size % size:
            raise DataError(f"the array is {values.dtype} {values.shape}, no uint8 pictures {rule.shape}", where=where)
        return values.reshape(-1, size)
    if isinstance(rule, TableRule):
        return values.reshape(1, -1)
    if values.ndim == 1:
        return values[:, None] if isinstance(rule, WaveformRule) else values[None]
    if values.ndim != 2:
        raise DataError(f"the array has shape {values.shape}, not (steps, features)", where=where)
    return values


def _array_times(opened: Any, id: str, rule: TimedRule, place: Place, path: Path, steps: int) -> NDArray[np.float32]:
    if f"{id}{TIMES}" not in opened:
        return np.zeros(steps, dtype=np.float32)
    window = rule.window or place.window
    given, where = get_array(opened, f"{id}{TIMES}", path), f"{path}: '{id}{TIMES}'"
    if rule.unit == "datetime":
        assert place.origins is not None
        if id not in place.origins.known:
            what = f"sample '{id}' has no time in column '{place.origins.column}', from which its times are counted"
            raise DataError(what, where=where, mend="Fill the cell, or leave the array out.")
        times = array_hours(given, place.origins.known[id], where) / window
    elif given.dtype.kind not in "fiu":
        mend = "Set unit = 'datetime' if they are dates and times."
        raise DataError(f"the times are {given.dtype}, no numbers", where=where, mend=mend)
    else:
        times = given.astype(np.float64) * HOURS[rule.unit] / window
    if not ((times >= 0) & (times <= 1)).all():
        what = f"times of '{id}' are not in 0 to {window:g} h"
        raise DataError(what, where=str(path), mend="Set window or unit, or cut the arrays.")
    return times.astype(np.float32)
