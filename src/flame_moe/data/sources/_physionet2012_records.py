"""Finding and reading the record and outcome files of the PhysioNet 2012 set, in folders or in archives."""

from __future__ import annotations

import math
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from flame_moe.data.sources._physionet2012_tables import (
    DESCRIPTORS,
    INDEX,
    OUTCOME_COLUMNS,
    WINDOW_HOURS,
)
from flame_moe.errors import DataError, nearest

HEADER = "Time,Parameter,Value"
_RECORD_NAME = re.compile(r"^\d+\.txt$")
_CLOCK = re.compile(r"^(\d{2,3}):([0-5]\d)$")
_WEIGHT = INDEX["Weight"]
_DESCRIPTOR_NAMES = {descriptor.name for descriptor in DESCRIPTORS}


class Record(NamedTuple):
    """One record file as written, nothing cleaned.

    Attributes:
        id: the RecordID inside the file.
        descriptors: Age, Gender, Height, ICUType and the Weight of 00:00, as far as they are there.
        minutes: since admission, one per measurement.
        variables: index into the table of variables, one per measurement.
        values: one per measurement. The Weight of 00:00 is among them: it is a measurement too.
        has_series: whether there is any measurement besides the Weight among the descriptors.
        where: file (and archive) that it was read from.
    """

    id: str
    descriptors: dict[str, float]
    minutes: list[int]
    variables: list[int]
    values: list[float]
    has_series: bool
    where: str


def parse_record(text: str, where: str) -> Record:
    """Read one record in the original layout.

    Args:
        text: lines `Time,Parameter,Value`, time `hh:mm` since admission.
        where: name of the file, for errors.

    Raises:
        DataError: with file and line, if the header, a time, a parameter or a value is wrong, or there is no RecordID.

    Example:
        >>> record = parse_record("Time,Parameter,Value\\n00:00,RecordID,7\\n01:30,HR,80\\n", "7.txt")
        >>> record.id, record.minutes, record.values
        ('7', [90], [80.0])
    """
    lines = text.splitlines()
    if not lines or lines[0].strip() != HEADER:
        found = lines[0].strip() if lines else "nothing"
        raise DataError(f"the first line is '{found}'", where=f"{where}, line 1", mend=f"It must be '{HEADER}'.")
    descriptors: dict[str, float] = {}
    minutes: list[int] = []
    variables: list[int] = []
    values: list[float] = []
    clock: dict[str, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        parts = line.split(",")
        if len(parts) != 3:
            if not line.strip():
                continue
            raise DataError(f"'{line}' is not Time,Parameter,Value", where=f"{where}, line {number}")
        time, name, cell = parts
        minute = clock.get(time)
        if minute is None:
            minute = clock[time] = _minute(time, f"{where}, line {number}")
        value = _number(cell, name, where, number)
        index = INDEX.get(name)
        if index is None and name not in _DESCRIPTOR_NAMES:
            known = nearest(name, [*INDEX, *_DESCRIPTOR_NAMES])
            raise DataError(f"unknown parameter '{name}'", where=f"{where}, line {number}", mend=known)
        if index is None or (index == _WEIGHT and minute == 0 and name not in descriptors):
            descriptors[name] = value
        if index is not None:
            minutes.append(minute)
            variables.append(index)
            values.append(value)
    return _finish(descriptors, minutes, variables, values, where)


def _finish(
    descriptors: dict[str, float], minutes: list[int], variables: list[int], values: list[float], where: str
) -> Record:
    identity = descriptors.pop("RecordID", -1.0)
    if identity < 0 or identity != int(identity):
        raise DataError("the record has no valid RecordID", where=where, mend="Add a line '00:00,RecordID,<number>'.")
    has_series = len(values) > ("Weight" in descriptors)
    return Record(str(int(identity)), descriptors, minutes, variables, values, has_series, where)


def _minute(time: str, where: str) -> int:
    match = _CLOCK.match(time)
    if match is None:
        raise DataError(
            f"'{time}' is not a time", where=where, mend="Write hours and minutes since admission as hh:mm."
        )
    minute = 60 * int(match[1]) + int(match[2])
    if minute > 60 * WINDOW_HOURS:
        raise DataError(
            f"the time {time} is after the first {WINDOW_HOURS:g} hours",
            where=where,
            mend="Leave later measurements out: the tasks predict from the first 48 hours.",
        )
    return minute


def read_records(place: Path) -> Iterator[Record]:
    """Stream the records of a folder of record files or of a `.tar.gz` archive of them, read in place.

    Raises:
        DataError: if there are none, the archive is damaged, a record is malformed, or two have the same RecordID.
    """
    texts = _from_folder(place) if place.is_dir() else _from_archive(place)
    seen: dict[str, str] = {}
    for raw, where in texts:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise DataError("the file is not text", where=where) from None
        record = parse_record(text, where)
        if record.id in seen:
            raise DataError(
                f"record {record.id} is there twice", where=f"{seen[record.id]} and {where}", mend="Remove one."
            )
        seen[record.id] = where
        yield record
    if not seen:
        raise DataError("there are no record files", where=str(place), mend="They are named like 132539.txt.")


def _from_folder(folder: Path) -> Iterator[tuple[bytes, str]]:
    for path in record_files(folder):
        yield path.read_bytes(), str(path)


def record_files(folder: Path) -> list[Path]:
    """The record files directly in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if _RECORD_NAME.match(path.name) and path.is_file())


def _from_archive(archive: Path) -> Iterator[tuple[bytes, str]]:
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None and _RECORD_NAME.match(Path(member.name).name):
                    yield content.read(), f"{archive}: {member.name}"
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        mend = "Fetch the archive again."
        raise DataError(f"the archive cannot be read to its end: {error}", where=str(archive), mend=mend) from None


def locate(raw: Path, sets: Sequence[str]) -> list[tuple[Path, Path | None]]:
    """Where the records and outcomes of each set are: (folder or archive, outcomes file or None).

    A folder that holds record files itself is taken as it is, with every `Outcomes-*.txt` beside them; an extracted
    folder wins over its archive.

    Raises:
        DataError: if the folder, or one of the sets, is not there.
    """
    if not raw.is_dir():
        raise DataError("there is no such folder", where=str(raw), mend="Give the folder that holds set-a and set-b.")
    if record_files(raw):
        outcomes = sorted(raw.glob("Outcomes-*.txt"))
        if len(outcomes) > 1:
            raise DataError("record files lie beside more than one outcomes file", where=str(raw), mend="Keep one.")
        return [(raw, outcomes[0] if outcomes else None)]
    found: list[tuple[Path, Path | None]] = []
    for letter in sets:
        places = [raw / f"set-{letter}", raw / f"set-{letter}.tar.gz"]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            mend = (
                f"Put a folder set-{letter} or an archive set-{letter}.tar.gz there, or leave '{letter}' out of sets."
            )
            raise DataError(f"set {letter} is not there", where=str(raw), mend=mend)
        outcomes_file = raw / f"Outcomes-{letter}.txt"
        found.append((place, outcomes_file if outcomes_file.is_file() else None))
    return found


def read_outcomes(path: Path) -> dict[str, dict[str, float]]:
    """Record id -> outcome column -> value as written (-1 = missing).

    Raises:
        DataError: with file and line, if a column is missing, a cell is not a number, or a record is listed twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError("the outcomes file is not text", where=str(path)) from None
    columns = [name.strip() for name in lines[0].split(",")] if lines else []
    for name in ("RecordID", *OUTCOME_COLUMNS):
        if name not in columns:
            raise DataError(f"the column '{name}' is missing", where=f"{path}, line 1", mend=nearest(name, columns))
    outcomes: dict[str, dict[str, float]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        cells = line.split(",")
        if len(cells) != len(columns):
            raise DataError(f"{len(cells)} cells instead of {len(columns)}", where=where)
        row = {name: _number(cell, name, str(path), number) for name, cell in zip(columns, cells, strict=True)}
        record = str(int(row.pop("RecordID")))
        if record in outcomes:
            raise DataError(f"record {record} is listed twice", where=where, mend="Remove one of the lines.")
        outcomes[record] = _checked(row, where)
    return outcomes


def _number(cell: str, name: str, where: str, line: int) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = f"the value of {name} is '{cell}', not a number"
        raise DataError(what, where=f"{where}, line {line}", mend="Write -1 if it is missing.")
    return value


def _checked(row: dict[str, float], where: str) -> dict[str, float]:
    if row["In-hospital_death"] not in (-1.0, 0.0, 1.0):
        raise DataError(f"In-hospital_death is {row['In-hospital_death']:g}", where=where, mend="It is 0, 1 or -1.")
    return {name: row[name] for name in OUTCOME_COLUMNS}
