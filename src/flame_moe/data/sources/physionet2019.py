"""PhysioNet 2019: will this stay, quiet in its first day, turn septic? Hourly records of two hospital systems.

The training sets of the PhysioNet/Computing in Cardiology Challenge 2019 (Reyna et al., Critical Care Medicine
48:210-217, 2020): hourly vital signs and laboratory values and, for each hour, `SepsisLabel`, which is 1 from six hours
before the onset of sepsis (Sepsis-3) on. Read from folders `training_setA`, `training_setB` of .psv files as published,
from one Parquet table per hospital (`training_setB.parquet`, column `patient` first), or from a folder that itself
holds .psv files; without the column `SepsisLabel` the samples have no labels and can be scored.

    vitals    series: heart rate, saturation, temperature, pressures, respiration, end-tidal CO2
    labs      series: chemistry, blood count, blood gases, liver, coagulation, inspired oxygen
    static    table: age, sex, unit of care, hours in hospital before the unit

One sample per stay. The inputs are the hours up to `hours` of the stay, the label is what comes after: a stay that is
positive within the window or ends with it is left out and counted. The challenge scored every hour instead; its
utility score is not comparable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._physionet2019_records import Record, locate, read_records
from flame_moe.data.sources._physionet2019_tables import (
    COLUMNS,
    DESCRIPTORS,
    GROUPS,
    HOUR,
    INDEX,
    MEASURED,
    SLIPS,
    STATIC,
    VARIABLES,
)
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

Hours = Annotated[int, Field(ge=1, le=336)]
_MEMBERS = {group: np.array([i for i, v in enumerate(VARIABLES) if v.group == group]) for group in GROUPS}
_HOUR = COLUMNS.index(HOUR)


class Physionet2019Options(Description):
    """How the set is read.

    Attributes:
        sets: which hospitals, "a" and "b"; default those that are there.
        hours: length of the window: inputs are hours 1 to `hours` of the stay, labels what comes after.
        horizons: for each number here also offer sepsis within that many hours after the window.
        long_stay: the task `long_stay` asks whether the stay goes on beyond this hour; above `hours`.
        seed: decides the split.
    """

    sets: Annotated[tuple[Literal["a", "b"], ...], Field(min_length=1)] | None = None
    hours: Hours = 24
    horizons: tuple[Hours, ...] = ()
    long_stay: Hours = 48
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.long_stay <= self.hours:
            raise ValueError(f"long_stay = {self.long_stay} must be above hours = {self.hours}")
        if len(set(self.horizons)) != len(self.horizons):
            raise ValueError("a horizon is named twice")
        return self


def describe(raw: Path | None, options: Physionet2019Options) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Two series and a table; sepsis, sepsis within each horizon, and long stay."""
    window = f"hours 1 to {options.hours} of the stay"
    modalities = [_series(group, window) for group in GROUPS]
    names, units = zip(*STATIC, strict=True)
    modalities.append(
        Modality(
            name="static",
            kind="table",
            features=len(STATIC),
            channels=names,
            units=units,
            description="age, sex, unit of care and hours in hospital before the unit",
            scaling="quantile",
        )
    )
    return tuple(modalities), (
        _sepsis("sepsis", f"at any recorded hour after hour {options.hours}", options),
        *(_sepsis(_within(h), f"within {h} h after hour {options.hours}", options) for h in options.horizons),
        _long_stay(options),
    )


def read(raw: Path | None, options: Physionet2019Options, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the stays, one sample each, and count every rule and defect.

    Raises:
        DataError: with file and line, if a folder, file, column or value is missing or malformed.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds training_setA or training_setB.")
    tally: Counter[str] = Counter()
    kept = dict.fromkeys(_rules(options), 0)
    seen: set[str] = set()
    for place in locate(raw, options.sets):
        if place.is_file():
            work.note(place)
        for record in read_records(place):
            if record.id in seen:
                raise DataError(f"patient {record.id} is there twice", where=record.where, mend="Remove one.")
            seen.add(record.id)
            tally["hours found, in all stays"] += len(record.values)
            if record.septic is None:
                tally["stay without SepsisLabel, no labels"] += 1
            elif record.septic.any():
                tally["stay that turns septic at some hour, of all stays found"] += 1
            parts: dict[str, Observation] = {}
            for rule, holds in _judge(record, options, parts, tally):
                if not holds:
                    break
                kept[rule] += 1
            else:
                yield Sample(record.id, record.id, parts, _targets(record, options, tally))
    funnel.start(len(seen), "stays found")
    for rule, n in kept.items():
        funnel.rule(rule, n)
    for text in sorted(tally):
        funnel.count(text, tally[text])


def split(options: Physionet2019Options) -> SplitSpec:
    """70/10/20 by patient."""
    return SplitSpec(seed=options.seed)


def _rules(options: Physionet2019Options) -> tuple[str, str, str]:
    return (
        f"is not septic (label 0) in hours 1 to {options.hours}",
        f"goes on after hour {options.hours}, so that something is left to predict (not asked without labels)",
        f"has a plausible measurement in hours 1 to {options.hours}",
    )


def _judge(
    record: Record, options: Physionet2019Options, parts: dict[str, Observation], tally: Counter[str]
) -> Iterator[tuple[str, bool]]:
    """Each rule and whether it holds; `parts` is filled on the way, from the hours of the window alone."""
    quiet, goes_on, measured = _rules(options)
    hours = record.values[:, _HOUR]
    inside = hours <= options.hours
    yield quiet, record.septic is None or not record.septic[inside].any()
    yield goes_on, record.septic is None or hours[-1] > options.hours
    parts |= _modalities(record.values[inside], options.hours, tally)
    yield measured, any(group in parts for group in GROUPS)


def _modalities(values: NDArray[np.float64], window: int, tally: Counter[str]) -> dict[str, Observation]:
    """What the stay has; an hour without a value and a modality without an hour are left out."""
    if len(values) == 0:
        return {}
    cells = _clean(values, tally)
    times = (values[:, _HOUR] / window).astype(np.float32)
    parts: dict[str, Observation] = {}
    for group, members in _MEMBERS.items():
        part = cells[:, members]
        rows = ~np.isnan(part).all(axis=1)
        if rows.any():
            parts[group] = _observation(part[rows], times[rows])
    static = _static(values)
    if not np.isnan(static).all():
        parts["static"] = _observation(static[None])
    return parts


def _clean(values: NDArray[np.float64], tally: Counter[str]) -> NDArray[np.float64]:
    """(hours, variables): slips moved where they belong, implausible values NaN, both counted."""
    cells = np.full((len(values), len(VARIABLES)), np.nan)
    cells[:, [INDEX[name] for name in MEASURED]] = values[:, : len(MEASURED)]
    for slip in SLIPS:
        column = cells[:, INDEX[slip.name]]
        hit = (column >= slip.low) & (column <= slip.high)
        if hit.any():
            tally[slip.text] += int(hit.sum())
            moved = column[hit] / slip.divisor
            cells[hit, INDEX[slip.name]] = np.nan
            cells[hit, INDEX[slip.target]] = moved
    outside = (cells < _LOW) | (cells > _HIGH)
    for at in np.flatnonzero(outside.any(axis=0)):
        variable = VARIABLES[at]
        text = f"{variable.name} outside {variable.low:g} to {variable.high:g} {variable.unit}, set to missing"
        tally[text] += int(outside[:, at].sum())
    cells[outside] = np.nan
    return cells


# Published columns are 32-bit floats: a limit such as 0.2 must not refuse the same number written with fewer bits.
_LOW = np.array([v.low - 1e-6 * abs(v.low) for v in VARIABLES])
_HIGH = np.array([v.high + 1e-6 * abs(v.high) for v in VARIABLES])


def _static(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The descriptors of the first hour of the window; the published ones do not change within a stay."""
    age, male, medical, surgical, admitted = (values[0, COLUMNS.index(name)] for name in DESCRIPTORS)
    return np.array([age, male, medical, surgical, -admitted])


def _observation(values: NDArray[np.float64], times: NDArray[np.float32] | None = None) -> Observation:
    observed = ~np.isnan(values)
    return Observation(np.where(observed, values, 0.0).astype(np.float32), times, observed)


def _targets(record: Record, options: Physionet2019Options, tally: Counter[str]) -> dict[str, NDArray[np.float32]]:
    """Labels from the hours after the window."""
    if record.septic is None:
        return {}
    hours = record.values[:, _HOUR]
    onset = float(hours[record.septic][0]) if record.septic.any() else np.inf
    found = {"sepsis": np.isfinite(onset)}
    found |= {_within(h): onset <= options.hours + h for h in options.horizons}
    if np.isfinite(onset) and hours[-1] <= options.long_stay:
        tally["record that ends soon after sepsis, no label for long_stay"] += 1
    else:
        found["long_stay"] = hours[-1] > options.long_stay
    return {name: np.array([value], dtype=np.float32) for name, value in found.items()}


def _within(hours: int) -> str:
    return f"sepsis_within_{hours}h"


def _series(group: str, window: str) -> Modality:
    members = [VARIABLES[i] for i in _MEMBERS[group]]
    return Modality(
        name=group,
        kind="series",
        features=len(members),
        channels=tuple(v.name for v in members),
        units=tuple(v.unit for v in members),
        description=f"{group} of {window}, hour by hour",
        scaling="quantile",
    )


def _sepsis(name: str, when: str, options: Physionet2019Options) -> Task:
    return Task(
        name=name,
        kind="binary",
        modalities=(*GROUPS, "static"),
        classes=("no sepsis", "sepsis"),
        family="sepsis",
        description=f"SepsisLabel becomes 1 {when}; the label is 1 from 6 h before onset (Sepsis-3) on",
        caveat=f"Only stays that are not positive by hour {options.hours} and go on after it. A stay that ends without "
        "sepsis counts as no sepsis. Onset is derived from orders of cultures and antibiotics, which follow suspicion.",
    )


def _long_stay(options: Physionet2019Options) -> Task:
    return Task(
        name="long_stay",
        kind="binary",
        modalities=(*GROUPS, "static"),
        classes=(f"up to {options.long_stay} h", f"more than {options.long_stay} h"),
        family="stay",
        description=f"the record goes on beyond hour {options.long_stay} of the stay",
        caveat="Records end within about 10 h of the first positive label, so stays that turn septic and end before "
        "that hour have no label; death and discharge are not told apart.",
    )


SOURCE = Source(
    name="physionet2019",
    summary="Hourly intensive-care records of two hospital systems: sepsis after a quiet first day; two tasks.",
    needs_raw=True,
    options=Physionet2019Options,
    describe=describe,
    read=read,
    split=split,
)
