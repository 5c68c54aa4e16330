"""eICU-CRD: 200,859 unit stays in 208 hospitals of the United States, or the demo of it, from the tables as published.

The eICU Collaborative Research Database 2.0 (Pollard, Johnson, Raffa, Celi, Mark and Badawi, Scientific Data 5:180178,
2018). What was known `hours` after admission to the unit predicts what comes later. A modality whose tables are not in
the folder is left out of the store; only the table `patient` is needed.

    vitals         series: vitalPeriodic, vitalAperiodic
    labs           series: lab, at the minute of the draw, if the result was known
    respiratory    series: respiratoryCharting
    fluids         series: intakeOutput
    events         codes: diagnosis, treatment, medication, lab, admissionDx, infusiondrug, pastHistory
    notes          timed: note, as embedded documents
    static         table: patient, hospital
    apache         table: apacheApsVar
    yaib_series    series: hourly means of Yet Another ICU Benchmark, where they are there

Columns that tell the outcome are never read as features: discharge columns of `patient`, `apachePatientResult`,
`apachePredVar`, `activeupondischarge`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources import _eicu_events, _eicu_notes, _eicu_series, _eicu_static
from flame_moe.data.sources._eicu_cohort import outcomes, read_patients, select
from flame_moe.data.sources._eicu_options import STAY, EicuOptions, Release, Tally, release
from flame_moe.data.sources._eicu_parts import Part, Reading, observations
from flame_moe.data.sources._eicu_tasks import tasks_of
from flame_moe.data.sources._eicu_yaib import yaib_folder, yaib_labels, yaib_modality, yaib_outcomes, yaib_series
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import collect
from flame_moe.data.work import Work
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

BLOCK = 4096
"""Stays that are held in memory at a time."""

_ALWAYS = ("vitals", "labs")
"""Modalities that every patient of a unit has, so that their absence is a gap of the release."""

Describe = Callable[[Release, EicuOptions], Modality | None]
Build = Callable[[Reading, Modality], Part]
_PARTS: dict[str, tuple[Describe, Build, str]] = {
    "vitals": (_eicu_series.vitals_modality, _eicu_series.vitals, "vitalPeriodic and vitalAperiodic"),
    "labs": (_eicu_series.labs_modality, _eicu_series.labs, "lab"),
    "respiratory": (_eicu_series.respiratory_modality, _eicu_series.respiratory, "respiratoryCharting"),
    "fluids": (_eicu_series.fluids_modality, _eicu_series.fluids, "intakeOutput"),
    "events": (_eicu_events.events_modality, _eicu_events.events, "of all event types"),
    "notes": (_eicu_notes.notes_modality, _eicu_notes.notes, "note"),
    "static": (_eicu_static.static_modality, _eicu_static.static, "patient"),
    "apache": (_eicu_static.apache_modality, _eicu_static.apache, "apacheApsVar"),
}
_SINGLE = ("vitalPeriodic", "vitalAperiodic", *(kind.table for kind in _eicu_events.KINDS.values()))


def describe(raw: Path | None, options: EicuOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Modalities whose tables are there; three tasks, and up to five of YAIB."""
    place = release(_given(raw))
    modalities = list(_modalities(place, options).values())
    folder = yaib_folder(place, _given(raw), options)
    hourly = None if folder is None else yaib_modality(folder, options)
    if hourly is not None:
        modalities.append(hourly)
    labels = () if folder is None else tuple(yaib_labels(folder, options))
    return tuple(modalities), tasks_of(options, tuple(m.name for m in modalities), labels)


def read(raw: Path | None, options: EicuOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the unit stays, one sample each, and count every rule and defect.

    Raises:
        DataError: with file and column, if a table or a column that is needed is missing, or a value is malformed.
    """
    place = release(_given(raw))
    patients = read_patients(place, work, funnel)
    reading = Reading(place, options, work, select(patients, options, funnel))
    modalities = _modalities(place, options)
    parts = {name: _PARTS[name][1](reading, modality) for name, modality in modalities.items()}
    labels = outcomes(patients, options)
    folder = yaib_folder(place, _given(raw), options)
    hourly = None if folder is None else yaib_modality(folder, options)
    if folder is not None:
        labels = labels.join(yaib_outcomes(folder, reading, funnel), on=STAY, how="left", maintain_order="left")
    if folder is not None and hourly is not None:
        parts["yaib_series"] = yaib_series(reading, hourly, folder)
    targets = {row[STAY]: _targets(row) for row in labels.iter_rows(named=True)}
    _absences(place, options, funnel, modalities)
    tally: Tally = Counter()
    absent: Counter[str] = Counter()
    kept = 0
    for number, stays in enumerate(reading.stays.iter_slices(BLOCK)):
        work.say("stays", number * BLOCK / reading.stays.height)
        found = {name: _observed(part, stays, options, tally) for name, part in parts.items()}
        for stay, subject in stays.select(STAY, "uniquepid").iter_rows():
            present = {name: rows[stay] for name, rows in found.items() if stay in rows}
            if options.event_rules == "code" and "events" in found and "events" not in present:
                continue
            kept += 1
            absent.update(found.keys() - present.keys())
            yield Sample(str(stay), subject, present, targets[stay])
    if options.event_rules == "code" and "events" in parts:
        funnel.rule(f"has {_eicu_events.FEWEST} to {_eicu_events.MOST} events before the prediction", kept)
    _defects(funnel, tally, absent, kept)


def split(options: EicuOptions) -> SplitSpec:
    """70/10/20 by patient (uniquepid)."""
    return SplitSpec(seed=options.seed)


def _given(raw: Path | None) -> Path:
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds the table patient.")
    return raw


def _modalities(place: Release, options: EicuOptions) -> dict[str, Modality]:
    place.need("patient")
    described = {name: describe_part(place, options) for name, (describe_part, _, _) in _PARTS.items()}
    return {name: modality for name, modality in described.items() if modality is not None}


def _observed(part: Part, stays: pl.DataFrame, options: EicuOptions, tally: Tally) -> dict[int, Observation]:
    """One modality of a block of stays, which are neighbours in the order of their numbers."""
    near = part.rows.filter(pl.col(STAY).is_between(stays[STAY][0], stays[STAY][-1]))
    rows = collect(near, part.modality.name).join(stays.select(STAY), on=STAY, how="semi")
    return dict(observations(part.clean(rows, tally), part.modality, options))


def _targets(row: dict[str, float | None]) -> dict[str, NDArray[np.float32]]:
    known = {name: value for name, value in row.items() if name != STAY and value is not None}
    return {name: np.array([value], dtype=np.float32) for name, value in known.items()}


def _absences(place: Release, options: EicuOptions, funnel: Funnel, modalities: dict[str, Modality]) -> None:
    """Tell the funnel what is not in the store, and why."""
    for name, (_, _, tables) in _PARTS.items():
        if name not in modalities and place.find(tables) is None:
            funnel.count(f"table {tables} absent: modality {name} left out")
    for table in _SINGLE:
        if place.find(table) is None:
            funnel.count(f"table {table} absent: its values or events are left out")
    if options.hospital and place.find("hospital") is None:
        funnel.count("table hospital absent: beds and teaching status left out")
    if options.apache and options.hours < _eicu_static.APACHE_HOURS:
        funnel.count(f"apache left out: its 24 h reach beyond the prediction at {options.hours} h")


def _defects(funnel: Funnel, tally: Tally, absent: Counter[str], kept: int) -> None:
    """Tell the funnel what was mended, and which modalities stays lack."""
    for text in sorted(text for text in tally if tally[text]):
        funnel.count(text, tally[text])
    for name, count in sorted(absent.items()):
        funnel.count(f"stay without a usable row in the window: modality {name} absent", count)
        if name in _ALWAYS and 2 * count > kept:
            funnel.count(f"{name} absent in most stays: the table may be a subset, values taken all the same", count)


SOURCE = Source(
    name="eicu",
    summary="eICU-CRD unit stays: vitals, labs, ventilation, fluids, events, APACHE; mortality, readmission, stay.",
    needs_raw=True,
    options=EicuOptions,
    describe=describe,
    read=read,
    split=split,
)
