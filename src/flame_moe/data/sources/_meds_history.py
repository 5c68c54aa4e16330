"""From the events of a subject to the inputs of one prediction: nothing after the prediction time is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation
from flame_moe.data.sources._meds_mapping import Mapping, StaticColumn

_DAY = 86_400_000_000
_YEAR = 365.25 * _DAY
_ALWAYS = np.iinfo(np.int64).min // 2
_FIELDS = ("time", "modality", "slot", "sign", "id", "number")


class Events(NamedTuple):
    """Events in the order of time, those without a time first; all arrays are (n,).

    Attributes:
        time: microseconds since 1970.
        modality, slot, sign, id, number: where each goes and what it says, see `_meds_mapping.Route`.
    """

    time: NDArray[np.int64]
    modality: NDArray[np.int16]
    slot: NDArray[np.int32]
    sign: NDArray[np.int8]
    id: NDArray[np.int64]
    number: NDArray[np.float64]

    def take(self, rows: NDArray[np.bool_] | slice) -> Events:
        time, modality, slot, sign, id, number = self
        return Events(time[rows], modality[rows], slot[rows], sign[rows], id[rows], number[rows])


def by_subject(frame: pl.DataFrame) -> Iterator[tuple[str, Events]]:
    """The events of each subject of a frame that is sorted by subject and time."""
    if not len(frame):
        return
    times = frame["time"].dt.epoch("us").fill_null(_ALWAYS)
    columns = [frame[name].to_numpy() for name in _FIELDS[1:]]
    whole = Events(times.to_numpy(), *columns)
    names = frame["subject"]
    starts = np.flatnonzero((names != names.shift(1)).fill_null(True).to_numpy())
    for start, end in pairwise([*starts.tolist(), len(frame)]):
        yield names[start], whole.take(slice(start, end))


class History:
    """Makes the inputs of predictions.

    Args:
        mapping: what the events are.
        days: how far back events are taken; the statics have no such limit.
        last: at most this many steps of each modality.
        strict: whether an event at the prediction time comes too late.
    """

    def __init__(self, mapping: Mapping, days: float, last: int, strict: bool) -> None:
        self._modalities, self._static = mapping.modalities, mapping.static
        self._window, self._last = round(days * _DAY), last
        self._side: Literal["left", "right"] = "left" if strict else "right"

    def at(self, events: Events, time: int) -> dict[str, Observation]:
        """What is known at a time: modality -> observation, times 0 (window ago) to 1; empty without a recent event."""
        known = events.take(slice(0, int(np.searchsorted(events.time, time, side=self._side))))
        origin = time - self._window
        recent = known.take((known.time >= origin) | (known.time == _ALWAYS))
        parts: dict[str, Observation] = {}
        for place, modality in enumerate(self._modalities):
            if modality.kind == "table":
                continue
            make = self._codes if modality.kind == "codes" else self._series
            made = make(recent.take(recent.modality == place), origin, modality.features)
            if made is not None:
                parts[modality.name] = made
        if parts and self._static:
            values = _static(known.take(known.modality == len(self._modalities) - 1), time, self._static)
            if not np.isnan(values).all():
                parts["static"] = _observation(values[None], None)
        return parts

    def _codes(self, mine: Events, origin: int, features: int) -> Observation | None:
        if (mine.time > _ALWAYS).sum() == 0:
            return None
        mine = mine.take(slice(-self._last, None))
        values = np.stack([mine.slot, mine.id], axis=1).astype(np.int32)
        return Observation(values, self._share(mine.time, origin))

    def _series(self, mine: Events, origin: int, features: int) -> Observation | None:
        """One step per time; values of a channel at one time become their mean."""
        mine = mine.take(mine.time > _ALWAYS)
        if len(mine.time) == 0:
            return None
        times, step = np.unique(mine.time, return_inverse=True)
        total, count = np.zeros((len(times), features)), np.zeros((len(times), features))
        np.add.at(total, (step, mine.slot), mine.number)
        np.add.at(count, (step, mine.slot), 1)
        with np.errstate(invalid="ignore"):
            values = (total / count)[-self._last :]
        return _observation(values, self._share(times[-self._last :], origin))

    def _share(self, times: NDArray[np.int64], origin: int) -> NDArray[np.float32]:
        return (np.maximum(times - origin, 0) / self._window).astype(np.float32)


def _static(known: Events, time: int, columns: tuple[StaticColumn, ...]) -> NDArray[np.float64]:
    """(columns,), NaN where not known."""
    row = np.full(len(columns), np.nan)
    for i, column in enumerate(columns):
        mine = known.take(known.slot == i)
        if column.kind == "flag":
            row[i] = float(mine.sign[-1] > 0) if len(mine.sign) else np.nan if column.opposite else 0.0
        elif len(mine.time) and column.kind == "value":
            row[i] = mine.number[-1]
        elif (mine.time > _ALWAYS).any():
            row[i] = (time - mine.time[mine.time > _ALWAYS][0]) / _YEAR
    return row


def _observation(values: NDArray[np.float64], times: NDArray[np.float32] | None) -> Observation:
    observed = ~np.isnan(values)
    return Observation(np.where(observed, values, 0.0).astype(np.float32), times, observed)
