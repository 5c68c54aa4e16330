"""From a record as written to a grid of plausible values; every value that is changed or removed is counted."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.sources._physionet2012_records import Record
from flame_moe.data.sources._physionet2012_tables import (
    DESCRIPTORS,
    INDEX,
    MISSING,
    SLIPS,
    VARIABLES,
    Slip,
)

Array = NDArray[np.float64]

_LOW = np.array([variable.low for variable in VARIABLES])
_HIGH = np.array([variable.high for variable in VARIABLES])
_UNITS = {**{d.name: d.unit for d in DESCRIPTORS}, **{v.name: v.unit for v in VARIABLES}}
_SUMMED = np.array([variable.repeats == "sum" for variable in VARIABLES])
_RANGES = {d.name: (d.low, d.high) for d in DESCRIPTORS} | {v.name: (v.low, v.high) for v in VARIABLES}
_DESCRIPTOR_SLIPS = {slip.name: slip for slip in SLIPS if slip.name not in INDEX}
REPEATED = "repeated (time, variable) pairs merged: Urine summed, others averaged"


class Stay(NamedTuple):
    """A cleaned record.

    Attributes:
        id: RecordID.
        descriptors: Age, Gender, Height, ICUType and admission Weight; missing ones are left out.
        hours: (L,) since admission, strictly increasing; minutes without a plausible value are left out.
        values: (L, V) in the order of the table of variables, NaN where not observed.
    """

    id: str
    descriptors: dict[str, float]
    hours: Array
    values: Array


def clean(record: Record, tally: Counter[str]) -> Stay:
    """Mend the slips of unit, set impossible values to missing and merge repeats.

    Args:
        record: as written.
        tally: what was done, counted by sentence; added to.

    Example:
        >>> record = Record("7", {"Age": 60.0}, [60, 60], [INDEX["pH"], INDEX["HR"]], [735.0, 0.0], True, "7.txt")
        >>> stay = clean(record, Counter())
        >>> float(stay.values[0, INDEX["pH"]]), bool(np.isnan(stay.values[0, INDEX["HR"]]))
        (7.35, True)
    """
    variables = np.array(record.variables, dtype=np.int64)
    minutes = np.array(record.minutes, dtype=np.int64)
    values = _mend(np.array(record.values, dtype=np.float64), variables, tally)
    tally[REPEATED] += len(variables) - len(np.unique(minutes * len(VARIABLES) + variables))
    plausible = (values >= _LOW[variables]) & (values <= _HIGH[variables])
    for index, value in zip(variables[~plausible].tolist(), values[~plausible].tolist(), strict=True):
        tally[_removal(VARIABLES[index].name, value)] += 1
    hours, grid = _grid(minutes[plausible], variables[plausible], values[plausible])
    return Stay(record.id, _descriptors(record.descriptors, tally), hours, grid)


def _mend(values: Array, variables: NDArray[np.int64], tally: Counter[str]) -> Array:
    """Values with the unambiguous slips of unit undone."""
    suspects = np.flatnonzero((values < _LOW[variables]) | (values > _HIGH[variables]))
    for position in suspects.tolist():
        for slip in SLIPS:
            if INDEX.get(slip.name) == variables[position]:
                values[position] = _undo(slip, float(values[position]), tally)
    return values


def _undo(slip: Slip, value: float, tally: Counter[str]) -> float:
    if not slip.low <= value <= slip.high:
        return value
    tally[slip.text] += 1
    # Rounded to the digits that are written in the files: 735 becomes 7.35 and not its neighbour in binary.
    return round(value * slip.factor + slip.offset, 4)


def _removal(name: str, value: float) -> str:
    if value == MISSING:
        return f"{name} written as -1, the set's sign for missing"
    low, high = _RANGES[name]
    return f"{name} outside {low:g} to {high:g} {_UNITS[name]}, set to missing"


def _grid(minutes: NDArray[np.int64], variables: NDArray[np.int64], values: Array) -> tuple[Array, Array]:
    """One row per minute that has a value, one column per variable."""
    moments, rows = np.unique(minutes, return_inverse=True)
    shape = (len(moments), len(VARIABLES))
    cells = rows * shape[1] + variables
    total = np.bincount(cells, weights=values, minlength=shape[0] * shape[1]).reshape(shape)
    count = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    merged = np.where(_SUMMED, total, total / np.maximum(count, 1))
    return moments / 60.0, np.where(count > 0, merged, np.nan)


def _descriptors(written: dict[str, float], tally: Counter[str]) -> dict[str, float]:
    kept: dict[str, float] = {}
    for name, value in written.items():
        slip = _DESCRIPTOR_SLIPS.get(name)
        mended = value if slip is None else _undo(slip, value, tally)
        low, high = _RANGES[name]
        if low <= mended <= high:
            kept[name] = mended
        elif name != "Weight":
            # The Weight of 00:00 is also a measurement and was counted there.
            tally[_removal(name, mended)] += 1
    return kept
