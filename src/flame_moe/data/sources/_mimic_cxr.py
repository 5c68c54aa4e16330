"""Chest X-rays of MIMIC-CXR: pictures or vectors made of them elsewhere, and reports, at the time of the study."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.imaging import read_picture
from flame_moe.data.slices import read_slices
from flame_moe.data.sources._mimic_cohort import HOUR, WINDOW
from flame_moe.data.sources._mimic_events import Reader, Window
from flame_moe.data.sources._mimic_files import METADATA, Release
from flame_moe.data.sources._mimic_notes import vectors
from flame_moe.data.tables import collect, explain
from flame_moe.data.text import TextOptions
from flame_moe.data.work import Work
from flame_moe.errors import DataError

VERSION = 1
_METADATA: dict[str, Any] = {
    "dicom_id": pl.String,
    "subject_id": pl.Int64,
    "study_id": pl.Int64,
    "StudyDate": pl.String,
    "StudyTime": pl.String,
    "ViewPosition": pl.String,
}
Vectors = Callable[[Sequence[str]], dict[str, NDArray[Any]]]
"""Keys subject/study/dicom -> dicom -> pixels or vector; those that are not there are left out."""


def studies(release: Release, stays: pl.DataFrame, work: Work, *, before_hours: float) -> pl.LazyFrame:
    """Pictures taken during the stays: columns order, subject_id, study_id, dicom_id, view, seconds."""
    path = release.tables[METADATA]
    keys = stays.lazy().select("order", "subject_id", "intime", "stay")
    # Written as numbers, so the time of a study at five past midnight begins with neither of its zeros.
    clock = pl.col("StudyTime").str.split(".").list.first().str.zfill(6).str.to_time("%H%M%S")
    taken = pl.col("StudyDate").str.to_date("%Y%m%d").dt.combine(clock)

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        rows = rows.drop_nulls(("StudyDate", "StudyTime")).join(keys, on="subject_id")
        rows = rows.with_columns(
            seconds=(taken - pl.col("intime")).dt.total_seconds(), view=pl.col("ViewPosition").fill_null("")
        )
        inside = pl.col("seconds").is_between(-round(before_hours * HOUR), pl.col("stay").fill_null(WINDOW))
        return rows.filter(inside).select("order", "subject_id", "study_id", "dicom_id", "view", "seconds")

    make = partial(read_slices, path, _METADATA, each, optional=("ViewPosition",))
    return work.step("cxr", [path, *release.core], {"version": VERSION, "before": before_hours}, make)


def pictures(
    name: str,
    frame: pl.LazyFrame,
    views: Sequence[str],
    window: Window,
    most: int,
    load: Vectors,
    tally: Counter[str],
) -> Reader:
    """Reads a modality of kind image or timed: the last `most` pictures of these views of each stay."""

    def read(first: int, end: int) -> dict[int, Observation]:
        found = _part(frame, first, end, window, name)
        timely = found.filter(pl.col("seconds") <= pl.col("end"))
        tally[f"{name}: taken after the prediction time"] += found.height - timely.height
        viewed = timely.filter(pl.col("view").is_in(views)) if views else timely
        tally[f"{name}: another view than {', '.join(views)}"] += timely.height - viewed.height
        kept = viewed.sort("order", "seconds", "dicom_id").group_by("order", maintain_order=True).tail(most)
        tally[f"{name}: not among the last {most} of the stay"] += viewed.height - kept.height
        loaded = load([f"{s}/{t}/{d}" for s, t, d in kept.select("subject_id", "study_id", "dicom_id").iter_rows()])
        parts: dict[int, list[tuple[int, NDArray[Any]]]] = {}
        for order, seconds, dicom in kept.select("order", "seconds", "dicom_id").iter_rows():
            if dicom in loaded:
                parts.setdefault(order, []).append((seconds, loaded[dicom]))
            else:
                tally[f"{name}: named in the metadata, but not there"] += 1
        return {order: _observation(order, rows, window) for order, rows in parts.items()}

    return read


def reports(
    name: str,
    frame: pl.LazyFrame,
    files: Path,
    window: Window,
    delay: float,
    options: TextOptions,
    work: Work,
    tally: Counter[str],
) -> Reader:
    """Reads reports as a modality of kind timed; each is taken to be known `delay` hours after its study."""

    def read(first: int, end: int) -> dict[int, Observation]:
        found = _part(frame, first, end, window, name).sort("order", "seconds", "study_id")
        found = found.unique(("order", "study_id"), keep="first", maintain_order=True)
        found = found.with_columns(pl.col("seconds") + round(delay * HOUR))
        known = found.filter(pl.col("seconds") <= pl.col("end"))
        tally[f"{name}: taken to be written after the prediction time"] += found.height - known.height
        texts = [_report(files, s, t) for s, t in known.select("subject_id", "study_id").iter_rows()]
        known = known.with_columns(text=pl.Series(texts, dtype=pl.String))
        tally[f"{name}: no report file, or a blank one"] += known["text"].null_count()
        return vectors(known.drop_nulls("text"), window, options, work.vectors)

    return read


def picture_loader(files: Path, size: int) -> Vectors:
    """Loads pictures below `files`, as JPEG or DICOM; those that are not there are left out."""

    def load(keys: Sequence[str]) -> dict[str, NDArray[Any]]:
        found = {}
        for key in keys:
            subject, study, dicom = key.split("/")
            folder = _study(files, subject, study)
            paths = [path for suffix in (".jpg", ".dcm") if (path := folder / f"{dicom}{suffix}").is_file()]
            if paths:
                found[dicom] = read_picture(paths[0], (size, size, 1))
        return found

    return load


def vector_width(path: Path) -> int:
    """Length of the vectors in a file of them.

    Raises:
        DataError: if it is no .parquet or .npz file of vectors by `dicom_id`.
    """
    if path.suffix == ".npz":
        return int(_npz(path)[1].shape[1])
    return _parquet(path)[1]


def vector_loader(path: Path) -> Vectors:
    """Loads vectors from a file: .npz with arrays `dicom_id` and `embeddings`, or .parquet with a column `dicom_id`
    and either a column of lists `embedding` or one column of numbers for each feature."""
    if path.suffix == ".npz":
        names, table = _npz(path)
        place = {name: i for i, name in enumerate(names.tolist())}
        return lambda keys: {d: table[place[d]] for key in keys if (d := key.rsplit("/", 1)[1]) in place}
    columns, width = _parquet(path)

    def load(keys: Sequence[str]) -> dict[str, NDArray[Any]]:
        wanted = [key.rsplit("/", 1)[1] for key in keys]
        rows = collect(pl.scan_parquet(path).filter(pl.col("dicom_id").is_in(wanted)), path)
        if columns == ["embedding"]:
            table = np.array(rows["embedding"].to_list(), dtype=np.float32).reshape(rows.height, width)
        else:
            table = rows.select(columns).to_numpy().astype(np.float32)
        return dict(zip(rows["dicom_id"].to_list(), table, strict=True))

    return load


def _part(frame: pl.LazyFrame, first: int, end: int, window: Window, name: str) -> pl.DataFrame:
    rows = frame.filter(pl.col("order").is_between(first, end - 1)).join(window.frame(), on="order")
    return collect(rows, name)


def _observation(order: int, rows: list[tuple[int, NDArray[Any]]], window: Window) -> Observation:
    seconds = np.array([second for second, _ in rows], dtype=np.int64)
    times = window.times(seconds, np.full(len(rows), order))
    return Observation(np.stack([values for _, values in rows]), times)


def _study(files: Path, subject: int | str, study: int | str) -> Path:
    return files / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}"


def _report(files: Path, subject: int, study: int) -> str | None:
    path = _study(files, subject, study).with_suffix(".txt")
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        raise DataError("the report cannot be read", where=str(path), mend="Convert it to UTF-8.") from None


def _npz(path: Path) -> tuple[NDArray[Any], NDArray[np.float32]]:
    mend = "It needs arrays dicom_id (n) of text and embeddings (n, width) of numbers."
    try:
        with np.load(path, allow_pickle=False) as file:
            names, table = file["dicom_id"], file["embeddings"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        raise DataError("this is no file of picture vectors", where=str(path), mend=mend) from None
    if table.ndim != 2 or names.shape != table.shape[:1] or names.dtype.kind != "U" or table.dtype.kind != "f":
        raise DataError("this is no file of picture vectors", where=str(path), mend=mend)
    return names, table.astype(np.float32)


def _parquet(path: Path) -> tuple[list[str], int]:
    """Columns that hold the vectors, and their width."""
    with explain(str(path)):
        schema = pl.read_parquet_schema(path)
    if "dicom_id" not in schema:
        mend = "It needs a column dicom_id of text."
        raise DataError("this is no file of picture vectors", where=str(path), mend=mend)
    if "embedding" in schema:
        first = collect(pl.scan_parquet(path).select("embedding").head(1), path)
        return ["embedding"], len(first.item()) if first.height else 1
    columns = [name for name, kind in schema.items() if kind.is_numeric()]
    if not columns:
        mend = "It needs a column embedding of lists, or one column of numbers for each feature."
        raise DataError("this is no file of picture vectors", where=str(path), mend=mend)
    return columns, len(columns)
