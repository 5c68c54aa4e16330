"""Drafting `flame.toml`: what a folder seems to hold, as a commented file to be read and corrected.

Guesses come from names and from the first rows; nothing is fitted. Columns that look like outcomes are never proposed
as inputs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from flame_moe.data.sources._folder_files import HEADERS, PICTURES, TEXTS, VOLUMES, files_by_id
from flame_moe.data.sources._folder_place import TIMES, get_array, load_arrays
from flame_moe.data.sources._folder_times import WRITTEN, Origins, hours_since, moments
from flame_moe.data.tables import SUFFIXES, collect, column_names, scan_table
from flame_moe.data.waveforms import waveform_leads
from flame_moe.errors import DataError

_HEAD, _PROSE = 2000, 30
_ID = re.compile(
    r"(^|_)(id|key|stay|visit|admission|encounter|exam|accession|record|sample|patient|subject)($|_|id)", re.I
)
_KEY = re.compile(r"(^|_)id$", re.I)
"""What is called so is no measurement, though it may be a number."""
_PERSON = re.compile(r"(subject|patient|person|mrn|pid)", re.I)
_TIME = re.compile(r"(^|_)(time|hours?|minutes?|offset|day|t)($|_)", re.I)
_SPLIT = re.compile(r"^(split|fold|part|partition|set)$", re.I)
_LABEL = re.compile(
    r"(label|target|outcome|died|dead|death|mort|expire|surviv|readmi|diagnos|class|grade|stage|los|length_of_stay|sepsis)",
    re.I,
)
_STARTS = re.compile(r"(admi|in_?time|start|begin|index|arriv|origin|base)", re.I)
_ELSEWHEN = re.compile(r"(birth|dob|death|died|dod|disch|store|end|stop|out)", re.I)
"""Moments at which a sample does not begin, and which no measurement is of."""
_UNIT = {"minute": "minutes", "day": "days", "second": "seconds"}


@dataclass(frozen=True)
class Glance:
    """A table at a glance: its first rows as text, which columns are numbers, and which dates and times."""

    name: str
    path: Path
    head: pl.DataFrame
    numeric: tuple[str, ...]
    moments: tuple[str, ...]

    def texts(self, *without: str | None) -> list[str]:
        others = {*self.numeric, *self.moments, *without}
        return [c for c in self.head.columns if c not in others]

    def unique(self, column: str) -> bool:
        """Whether the column is a key of the whole table."""
        ids = collect(scan_table(self.path, {column: pl.String}), self.path)[column]
        return ids.null_count() == 0 and ids.n_unique() == len(ids)


def draft(raw: Path) -> str:
    """The text of a description of the folder.

    Raises:
        DataError: if there is no table with one row per sample.
    """
    tables = [_glance(raw, path) for path in sorted(raw.rglob("*")) if path.name.lower().endswith(SUFFIXES)]
    tables = [
        table for table in tables if len(table.head) and not any(part[0] == "." for part in table.name.split("/"))
    ]
    samples, id = _samples(raw, tables)
    person = next((c for c in samples.head.columns if c != id and _PERSON.search(c)), None)
    split = next((c for c in samples.head.columns if _SPLIT.match(c)), None)
    labels = [c for c in samples.head.columns if c not in (id, person, split) and _is_label(samples, c)]
    origins = _origins(samples, id)
    others = [table for table in tables if table is not samples]
    blocks = [_static(samples, (id, person, split, *labels))]
    blocks += [_table(table, samples, id, origins) for table in others]
    blocks += [_folder(raw, path) for path in sorted(raw.iterdir()) if path.is_dir()]
    blocks += [_arrays(path) for path in sorted(raw.glob("*.npz"))]
    windows = [window for table in others if (window := _window(table, id, origins))]
    origin = origins.column if origins and any('unit = "datetime"' in block for block in blocks) else None
    lines = [
        "# Drafted by `flame init`: read every line, correct what is guessed wrong, and delete what you do not want.",
        "# No input may hold anything that is known only after the moment of prediction.",
        "# Hours from the origin of a sample to the moment of prediction"
        + (": as far as the data reach, so shorten it where you predict earlier." if windows else "."),
        f"window = {max(windows, default=24)}",
        "",
        "[samples]",
        f"file = {_text(samples.name)}  # one row per sample",
        f"id = {_text(id)}",
        _column("subject", person, "the person, who is in one split only; default: each sample is its own"),
        _column("split", split, "train, val or test; default: 70/10/20 by subject"),
        _column("origin", origin, "the date and time that counts as 0, for modalities whose unit is datetime"),
        'unknown = "count"  # ids that only a modality has: count or refuse',
    ]
    tasks = [_task(samples, column) for column in labels]
    if not tasks:
        tasks = ['# No column looked like an outcome.\n# [tasks.NAME]\n# kind = "binary"\n# column = "COLUMN"']
    return "\n".join([*lines, *("\n" + block for block in [*blocks, *tasks] if block)]) + "\n"


def _column(key: str, name: str | None, what: str) -> str:
    return f"{'' if name else '# '}{key} = {_text(name or 'COLUMN')}  # {what}"


def _glance(raw: Path, path: Path) -> Glance:
    names = [name.strip() for name in column_names(path)]
    frame = collect(scan_table(path, dict.fromkeys(names, pl.String)).head(_HEAD), path)
    given = {name: cells for name in names if len(cells := frame[name].drop_nulls())}
    numeric = tuple(n for n, cells in given.items() if cells.cast(pl.Float64, strict=False).null_count() == 0)
    moments = tuple(n for n, cells in given.items() if cells.str.contains(WRITTEN).all())
    return Glance(path.relative_to(raw).as_posix(), path, frame, numeric, moments)


def _samples(raw: Path, tables: list[Glance]) -> tuple[Glance, str]:
    """The table with one row per sample and its key: the key that most other tables have too."""
    found: list[tuple[tuple[int, bool, bool, int], Glance, str]] = []
    for table in tables:
        for column in table.head.columns:
            if table.unique(column):
                shared = sum(column in other.head.columns for other in tables)
                score = (shared, bool(_ID.search(column)), any(_is_label(table, c) for c in table.head.columns), 0)
                found.append(((*score[:3], len(table.head.columns)), table, column))
    if not found:
        mend = "Add a table with one row per sample: its id, its subject and its labels."
        raise DataError("no table has a column of unique ids", where=str(raw), mend=mend)
    _, table, column = max(found, key=lambda item: item[0])
    return table, column


def _is_label(table: Glance, column: str) -> bool:
    return bool(_LABEL.search(column)) and column not in table.moments and table.head[column].n_unique() > 1


def _origins(samples: Glance, id: str) -> Origins | None:
    """When each sample seems to begin; None if no column says so."""
    columns = [c for c in samples.moments if not _ELSEWHEN.search(c)]
    if not columns:
        return None
    column = next((c for c in columns if _STARTS.search(c)), columns[0])
    frame = _moments(samples, id, column).filter(pl.col("_moment").is_not_null())
    return Origins(column, dict(zip(frame["_id"], frame["_moment"], strict=True)), bool(frame["_zoned"].any()))


def _moments(table: Glance, id: str, column: str) -> pl.DataFrame:
    """Columns `_id`, and `_moment`, `_zoned` and `_written` (see `moments`) of the whole table."""
    frame = collect(scan_table(table.path, {id: pl.String, column: pl.String}), table.path)
    return frame.select(pl.col(id).alias("_id"), *moments(column, pl.String))


def _static(samples: Glance, without: Iterable[str | None]) -> str:
    columns = [c for c in samples.numeric if c not in set(without) and not _KEY.search(c)]
    if not columns:
        return ""
    return _block("static", "table", [f"file = {_text(samples.name)}", f"columns = {_list(columns)}"])


def _table(table: Glance, samples: Glance, id: str, origins: Origins | None) -> str:
    """A block for a table beside that of the samples; a comment where it has no id."""
    own = id if id in table.head.columns else next((c for c in table.head.columns if _ID.search(c)), None)
    if own is None:
        return f"# {table.name}: no column of ids was recognised."
    if own != id and not samples.head[id].is_in(table.head[own].drop_nulls().implode()).any():
        return f"# {table.name}: no column with the ids of the samples was recognised."
    time = _time(table, own, origins)
    lines = [f"file = {_text(table.name)}", *([] if own == id else [f"id = {_text(own)}"])]
    nothing = (_KEY, _PERSON, _LABEL)
    numbers = [c for c in table.numeric if c not in (own, time) and not any(p.search(c) for p in nothing)]
    texts = table.texts(own, time)
    if time is None and numbers and table.unique(own):
        return _block(_name(table), "table", [*lines, f"columns = {_list(numbers)}"])
    lines += _timing(table, time)
    written = [c for c in texts if table.head[c].str.len_chars().fill_null(0).sum() > _PROSE * len(table.head)]
    if written:
        more = [f"text = {_text(written[0])}", 'encoder = "ngrams"']
        return _block(_name(table), "text", [*lines, *more])
    if texts and len(numbers) == 1:
        found = collect(scan_table(table.path, {texts[0]: pl.String}).unique().drop_nulls(), table.path)
        names = sorted(found[texts[0]])
        form = [f"channel = {_text(texts[0])}", f"value = {_text(numbers[0])}", f"channels = {_list(names[:60])}"]
        return _block(_name(table), "series", [*lines, *form])
    if numbers:
        return _block(_name(table), "series", [*lines, f"columns = {_list(numbers)}"])
    if texts:
        return _block(_name(table), "codes", [*lines, f"code = {_text(texts[0])}"])
    return ""


def _time(table: Glance, own: str, origins: Origins | None) -> str | None:
    """The column of times: numbers that are called so, else moments, which only say something beside an origin."""
    number = next((c for c in table.numeric if c != own and _TIME.search(c)), None)
    if number is not None or origins is None:
        return number
    return min(table.moments, key=lambda c: bool(_ELSEWHEN.search(c)), default=None)


def _unit(table: Glance, time: str) -> str:
    if time in table.moments:
        return "datetime"
    return next((unit for word, unit in _UNIT.items() if word in time.lower()), "hours")


def _timing(table: Glance, time: str | None) -> list[str]:
    if time is None and table.moments:
        what = f"{table.moments[0]} has dates, but no column of the samples says from when to count"
        return [f"# {what} (origin): everything is at the origin"]
    if time is None:
        return ['# time = "COLUMN"  # no column of times was recognised: everything is at the origin']
    return [
        f"time = {_text(time)}",
        f"unit = {_text(_unit(table, time))}  # of the times: hours, minutes, seconds, days or datetime",
        'outside = "drop"  # times before 0 or after the window are left out and counted; or refuse',
    ]


def _window(table: Glance, id: str, origins: Origins | None) -> int:
    """Hours up to the latest time, 0 if the table has none."""
    time = _time(table, id, origins)
    if time is None or id not in table.head.columns:
        return 0
    unit = _unit(table, time)
    if unit == "datetime":
        assert origins is not None
        frame = _moments(table, id, time).filter(pl.col("_id").is_in(list(origins.known)))
        times = hours_since(frame, origins, time, str(table.path))
    else:
        times = collect(scan_table(table.path, {time: pl.Float64}), table.path)[time]
    factor = {"minutes": 60.0, "days": 1 / 24, "seconds": 3600.0}.get(unit, 1.0)
    return max(0, math.ceil(max(times.drop_nulls().to_list(), default=0) / factor))


def _folder(raw: Path, folder: Path) -> str:
    """A block for a folder with a file per sample, empty if it is none."""
    lines = [f"folder = {_text(folder.relative_to(raw).as_posix())}"]
    found: list[tuple[tuple[str, ...], str, Callable[[Path], list[str]]]] = [
        (HEADERS, "waveform", _leads),
        (VOLUMES, "volume", lambda _: ["size = [32, 32, 32]", "block = [8, 8, 8]"]),
        (PICTURES, "image", lambda _: ["shape = [64, 64, 1]  # height, width, 1 grey or 3 colours"]),
        (TEXTS, "text", lambda _: ['encoder = "ngrams"']),
    ]
    for endings, kind, more in found:
        try:
            first = next(iter(files_by_id(folder, endings).values()))[0]
        except DataError:
            continue
        return _block(re.sub(r"\W+", "_", folder.name.lower()), kind, [*lines, *more(first)])
    return ""


def _leads(header: Path) -> list[str]:
    names, _, rate = waveform_leads(header)
    return [
        f"leads = {_list(names)}",
        f"rate = {min(rate, 100):g}  # samples per second after resampling",
        "seconds = 10",
    ]


def _arrays(path: Path) -> str:
    arrays = load_arrays(path)
    first = next((key for key in arrays if not key.endswith(TIMES)), None)
    if first is None:
        return ""
    array = get_array(arrays, first, path)
    kind = "image" if array.dtype == "uint8" else "table" if array.ndim == 1 else "patches"
    more = [f"shape = {_list((*array.shape, 1)[:3])}"] if kind == "image" else []
    note = ['# kind = "waveform" or "timed" if the steps are samples of a signal, or vectors at times']
    return _block(re.sub(r"\W+", "_", path.stem.lower()), kind, [f"file = {_text(path.name)}", *more, *note])


def _task(samples: Glance, column: str) -> str:
    values = sorted(samples.head[column].drop_nulls().unique())
    plain = {v.lower() for v in values}
    number = column in samples.numeric
    binary = plain <= {"0", "1", "0.0", "1.0", "true", "false"} or (len(values) == 2 and not number)
    kind = "binary" if binary else "regression" if number and len(values) > 10 else "multiclass"
    lines = [f"kind = {_text(kind)}", f"column = {_text(column)}"]
    if kind != "regression" and not plain <= {"0", "1", "0.0", "1.0", "true", "false"}:
        lines.append(f"classes = {_list(values)}  # for a binary task: the negative one first")
    name = re.sub(r"\W+", "_", column.lower()).strip("_")
    return "\n".join([f"[tasks.{name if name[:1].isalpha() else f't_{name}'}]", *lines, 'description = ""'])


def _name(table: Glance) -> str:
    stem = table.path.name.lower()
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    return re.sub(r"\W+", "_", stem).strip("_")


def _block(name: str, kind: str, lines: Iterable[str]) -> str:
    return "\n".join([f"[modalities.{name if name[:1].isalpha() else f'm_{name}'}]", f"kind = {_text(kind)}", *lines])


def _text(value: str | None) -> str:
    return json.dumps(value, ensure_ascii=False)


def _list(values: Iterable[object]) -> str:
    return json.dumps([v if isinstance(v, int) else str(v) for v in values], ensure_ascii=False)
