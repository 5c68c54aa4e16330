"""What the readers of a folder share: where things are, which samples there are, what is counted."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.slices import Watch, read_slices
from flame_moe.data.sources._folder_rules import ModalityRule, SamplesRule, TimedRule
from flame_moe.data.sources._folder_times import Origins, hours_since, moments
from flame_moe.data.tables import SUFFIXES, collect, column_names, scan_table
from flame_moe.data.work import Work
from flame_moe.errors import DataError

Get = Callable[[str], Observation | None]
Slices = dict[str, slice]
TIMES = ".times"
HOURS = {"seconds": 1 / 3600, "minutes": 1 / 60, "hours": 1.0, "days": 24.0}


@dataclass
class Place:
    """One modality of a folder while it is read.

    Attributes:
        raw: the folder.
        name: of the modality.
        samples: the rule of the table of samples.
        ids: of all samples.
        window: hours of the whole file.
        origins: of the samples, where the table of samples has them.
        work, tally: steps, and what is counted.
    """

    raw: Path
    name: str
    samples: SamplesRule
    ids: Collection[str]
    window: float
    origins: Origins | None
    work: Work
    tally: Counter[str] = field(default_factory=Counter)

    def count(self, text: str, n: int) -> None:
        if n:
            self.tally[f"{self.name}: {text}"] += n

    def known(self, found: Iterable[str], where: Path) -> set[str]:
        """Those of these ids that samples have; the others are counted or refused."""
        given = set(found)
        unknown = given - set(self.ids)
        if unknown and self.samples.unknown == "refuse":
            what = f"the id '{min(unknown)}' and {len(unknown) - 1} more are not in the table of samples"
            raise DataError(what, where=str(where), mend="Add them, or set unknown = 'count' under [samples].")
        self.count("id that is not in the table of samples, left out", len(unknown))
        return given - unknown


def existing(raw: Path, name: str, where: str) -> Path:
    """A file or folder of the description.

    Raises:
        DataError: if it is not there.
    """
    path = raw / name
    if not path.exists():
        near = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        mend = f"There is: {', '.join(near[:12])}." if near else "Check the path."
        raise DataError(f"'{name}' is not there", where=where, mend=mend)
    return path


def is_table(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def read_table(path: Path, types: Mapping[str, Any], optional: Collection[str] = ()) -> pl.LazyFrame:
    """Columns of a table, NaN as null.

    Raises:
        DataError: also if the columns seem to be separated by something else than commas.
    """
    refuse_no_table(path)
    return _numbers(scan_table(path, types, optional=list(optional)), types)


def refuse_no_table(path: Path) -> None:
    """Refuse what is no table of columns separated by commas.

    Raises:
        DataError: if the file is another, or its columns seem to be separated by something else.
    """
    if not is_table(path):
        raise DataError("the file is no table", where=str(path), mend=f"Tables end in {', '.join(SUFFIXES)}.")
    names = column_names(path)
    for mark, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and mark in names[0]:
            raise DataError(f"the columns are separated by {word}", where=str(path), mend="Save the table with commas.")


def _numbers(frame: pl.LazyFrame, types: Mapping[str, Any]) -> pl.LazyFrame:
    """NaN as null."""
    numbers = [name for name, kind in types.items() if kind == pl.Float64]
    return frame.with_columns(pl.col(numbers).fill_nan(None)) if numbers else frame


def timed_rows(rule: TimedRule, place: Place, types: Mapping[str, Any]) -> pl.DataFrame:
    """Rows of a table by sample and time: columns `_id`, `_time` (share of the window) and those of `types`.

    Rows of unknown samples are left out; times that are missing or outside the window are refused or left out.
    """
    path = existing(place.raw, str(rule.file), place.name)
    id, window = rule.id or place.samples.id, rule.window or place.window
    wanted, time = {id: pl.String, **types}, [pl.lit(0.0).alias("_time")]
    if rule.time is not None and rule.unit == "datetime":
        wanted[rule.time] = written_as(path, rule.time)
        time = moments(rule.time, wanted[rule.time])
    elif rule.time is not None:
        wanted[rule.time] = pl.Float64
        time = [(pl.col(rule.time) * HOURS[rule.unit] / window).alias("_time")]

    def each(rows: pl.LazyFrame) -> pl.LazyFrame:
        return _numbers(rows, wanted).select(*types, *time, _id=pl.col(id))

    def make(watch: Watch) -> Iterator[pl.DataFrame]:
        refuse_no_table(path)
        return read_slices(path, wanted, each, watch)

    settings = {"columns": {name: str(kind) for name, kind in wanted.items()}, "window": window, "unit": rule.unit}
    frame = collect(place.work.step(place.name, [path], settings, make), path)
    refuse_empty_ids(frame["_id"], path, id)
    frame = frame.filter(pl.col("_id").is_in(sorted(place.known(frame["_id"].unique(), path))))
    if "_moment" in frame.columns:
        assert place.origins is not None
        since = hours_since(frame, place.origins, str(rule.time), str(path)) / window
        frame = frame.with_columns(since.alias("_time")).drop("_moment", "_zoned", "_written")
    good = pl.col("_time").is_between(0.0, 1.0).fill_null(False)
    bad = frame.filter(~good)
    if len(bad) and rule.outside == "refuse":
        share = bad["_time"][0]
        shown = "missing" if share is None else f"{share * window:g} h"
        first = f"the first, of '{bad['_id'][0]}', is {shown}"
        what = f"{len(bad)} of {len(frame)} times are not in 0 to {window:g} h; {first}"
        raise DataError(what, where=str(path), mend="Set window or unit, or outside = 'drop' to leave them out.")
    place.count(f"row with a time that is missing or not in 0 to {window:g} h, left out", len(bad))
    # Every column takes part in the order: a step is streamed to the disk in no order of its own.
    return frame.filter(good).sort("_id", "_time", *types, nulls_last=True)


def written_as(path: Path, column: str) -> pl.DataType | type[pl.DataType]:
    """How a table holds dates and times: as such in Parquet, else as text."""
    if path.suffix == ".parquet":
        for name, kind in pl.read_parquet_schema(path).items():
            if name.strip().lower() == column.lower() and kind in (pl.Datetime, pl.Date):
                return kind
    return pl.String


def refuse_empty_ids(ids: pl.Series, path: Path, column: str) -> None:
    if ids.null_count():
        what = f"{ids.null_count()} rows have no id in column '{column}'"
        raise DataError(what, where=str(path), mend="Fill the cells, or remove the rows.")


def refuse_repeated_ids(ids: pl.Series, path: Path, column: str) -> None:
    if ids.n_unique() < len(ids):
        twice = ids.filter(ids.is_duplicated()).sort()[0]
        what = f"the id '{twice}' is there more than once in column '{column}'"
        raise DataError(what, where=str(path), mend="Keep one row of each sample.")


def slices(ids: pl.Series) -> Slices:
    """Rows of each id of a sorted column."""
    if not len(ids):
        return {}
    starts = np.flatnonzero((ids != ids.shift(1)).fill_null(True).to_numpy()).tolist()
    return {ids[a]: slice(a, b) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)}


def open_arrays(rule: ModalityRule, place: Place) -> tuple[Any, set[str], Path]:
    """An array file, and the samples that it has an array of."""
    path = existing(place.raw, str(rule.file), place.name)
    place.work.note(path)
    arrays = load_arrays(path)
    return arrays, place.known((key for key in arrays if not key.endswith(TIMES)), path), path


def load_arrays(path: Path) -> Any:
    """An array file, opened: reads an array when it is asked for.

    Raises:
        DataError: if it is none.
    """
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise DataError("the file is no array file", where=str(path), mend="Write it with numpy.savez.") from None


def get_array(arrays: Any, key: str, path: Path) -> NDArray[Any]:
    try:
        return np.asarray(arrays[key])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise DataError(f"the array '{key}' is damaged or holds objects", where=str(path)) from None


def array_shape(raw: Path, rule: ModalityRule, name: str) -> tuple[int, ...]:
    """Shape of the first array of an array file."""
    path = existing(raw, str(rule.file), name)
    arrays = load_arrays(path)
    first = next((key for key in arrays if not key.endswith(TIMES)), None)
    if first is None:
        raise DataError("the array file is empty", where=str(path))
    return get_array(arrays, first, path).shape


def observation(values: NDArray[Any], times: NDArray[np.float32] | None = None) -> Observation | None:
    """Values with NaN as not observed; rows without a value are left out, None where nothing is left."""
    observed = ~np.isnan(values)
    rows = observed.any(axis=1)
    if not rows.any():
        return None
    kept = np.where(observed, values, 0.0).astype(np.float32)[rows]
    return Observation(kept, None if times is None else times[rows], observed[rows])
