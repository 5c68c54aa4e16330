"""PhysioNet 2012: the first 48 hours of 7,600 adult intensive-care stays, from the files as published.

The set of the PhysioNet/Computing in Cardiology Challenge 2012 (Silva, Moody, Scott, Celi and Mark, Computing in
Cardiology 39:245-248, 2012): one text file per stay with lines `Time,Parameter,Value`, and outcomes in
`Outcomes-<set>.txt`. Read from folders `set-a`, `set-b` or the archives `set-a.tar.gz`, `set-b.tar.gz` in place, or
from a folder that holds record files itself; without an outcomes file the samples have no labels and can be scored.

    vitals    series: heart rate, pressures, respiration, saturation, temperature, Glasgow coma scale
    labs      series: chemistry, blood count, blood gases, liver, troponins
    support   series: inspired oxygen, ventilation, urine, weight
    static    table: age, sex, height, weight, unit of care
    summary   table: statistics of every variable over the 48 hours, derived quantities, severity points

The set has no patient identifier, so a record is its own subject: a patient with two stays may be in two splits.
It comes from the hospital of MIMIC-II and is no external test of a model trained on MIMIC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._physionet2012_clean import Stay, clean
from flame_moe.data.sources._physionet2012_records import locate, read_outcomes, read_records
from flame_moe.data.sources._physionet2012_summary import summarise, summary_columns
from flame_moe.data.sources._physionet2012_tables import GROUPS, MISSING, UNITS_OF_CARE, VARIABLES, WINDOW_HOURS
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

LONG_STAY_DAYS = 7
YEAR_DAYS = 365
_COLUMNS = {group: np.array([i for i, v in enumerate(VARIABLES) if v.group == group]) for group in GROUPS}
_STATIC: tuple[tuple[str, str], ...] = (
    ("age", "years"),
    ("male", "1 = male"),
    ("height", "cm"),
    ("weight", "kg"),
    *((unit, "1 = yes") for unit in UNITS_OF_CARE.values()),
)


class Physionet2012Options(Description):
    """How the set is read.

    Attributes:
        sets: which of the published sets; not used for a folder that holds record files itself.
        summary: whether to make the summary table, which the tasks then read too.
        by_unit: also offer mortality separately for each unit of care: four related domains.
        seed: decides the split.
    """

    sets: Annotated[tuple[Literal["a", "b", "c"], ...], Field(min_length=1)] = ("a", "b")
    summary: bool = True
    by_unit: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: Physionet2012Options) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Three series, one or two tables; six tasks, or ten with `by_unit`."""
    modalities = [_series(group) for group in GROUPS]
    modalities.append(_table("static", _STATIC, "age, sex, height, weight and unit of care at admission"))
    if options.summary:
        modalities.append(_table("summary", summary_columns(), "statistics of the 48 h, derived quantities, scores"))
    names = tuple(m.name for m in modalities)
    tasks = [Task.parse({**task, "modalities": names}, where=f"tasks.{task['name']}") for task in _TASKS]
    if options.by_unit:
        tasks += [_unit_task(tasks[0], unit) for unit in UNITS_OF_CARE.values()]
    return tuple(modalities), tuple(tasks)


def read(raw: Path | None, options: Physionet2012Options, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the stays, one sample each, and count every rule and defect.

    Raises:
        DataError: with file and line, if a folder, file, column or value is missing or malformed.
    """
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds set-a and set-b.")
    places = locate(raw, options.sets)
    outcomes = [{} if path is None else read_outcomes(work.note(path)) for _, path in places]
    for place, _ in places:
        if place.is_file():
            work.note(place)
    tally: Counter[str] = Counter()
    seen: set[str] = set()
    found = kept = 0
    for (place, _), labels in zip(places, outcomes, strict=True):
        for record in read_records(place):
            if record.id in seen:
                raise DataError(f"record {record.id} is in two sets", where=record.where, mend="Remove one.")
            seen.add(record.id)
            found += 1
            stay = clean(record, tally)
            targets = _targets(stay, labels, options, tally)
            if not record.has_series or len(stay.hours) == 0:
                continue
            kept += 1
            yield Sample(stay.id, stay.id, _modalities(stay, options), targets)
    funnel.start(found, "records found")
    funnel.rule("has at least one plausible measurement after the admission line", kept)
    for text in sorted(tally):
        funnel.count(text, tally[text])


def split(options: Physionet2012Options) -> SplitSpec:
    """70/10/20 by record."""
    return SplitSpec(seed=options.seed)


def _series(group: str) -> Modality:
    members = [VARIABLES[i] for i in _COLUMNS[group]]
    return Modality(
        name=group,
        kind="series",
        features=len(members),
        channels=tuple(v.name for v in members),
        units=tuple(v.unit for v in members),
        description=f"{group} of the first 48 h at their irregular times",
        scaling="quantile",
    )


def _table(name: str, columns: tuple[tuple[str, str], ...], description: str) -> Modality:
    return Modality(
        name=name,
        kind="table",
        features=len(columns),
        channels=tuple(column for column, _ in columns),
        units=tuple(unit for _, unit in columns),
        description=description,
        scaling="quantile",
    )


def _unit_task(mortality: Task, unit: str) -> Task:
    words = unit.replace("_", " ")
    changes = {"name": f"mortality_{unit}", "description": f"death before discharge, stays in the {words} unit only"}
    return Task.parse({**mortality.plain(), **changes}, where=f"tasks.mortality_{unit}")


def _modalities(stay: Stay, options: Physionet2012Options) -> dict[str, Observation]:
    """What the stay has; a modality without a value is left out."""
    parts: dict[str, Observation] = {}
    times = (stay.hours / WINDOW_HOURS).astype(np.float32)
    for group in GROUPS:
        values = stay.values[:, _COLUMNS[group]]
        rows = ~np.isnan(values).all(axis=1)
        if rows.any():
            parts[group] = _observation(values[rows], times[rows])
    static = _static(stay)
    if not np.isnan(static).all():
        parts["static"] = _observation(static[None])
    if options.summary:
        parts["summary"] = _observation(summarise(stay)[None])
    return parts


def _observation(values: NDArray[np.float64], times: NDArray[np.float32] | None = None) -> Observation:
    observed = ~np.isnan(values)
    return Observation(np.where(observed, values, 0.0).astype(np.float32), times, observed)


def _static(stay: Stay) -> NDArray[np.float64]:
    given = stay.descriptors
    plain = [given.get(name, np.nan) for name in ("Age", "Gender", "Height", "Weight")]
    unit = given.get("ICUType")
    return np.array(plain + [np.nan if unit is None else float(unit == number) for number in UNITS_OF_CARE])


def _targets(
    stay: Stay, outcomes: dict[str, dict[str, float]], options: Physionet2012Options, tally: Counter[str]
) -> dict[str, NDArray[np.float32]]:
    """Labels in natural units; -1 is missing and has no entry."""
    row = outcomes.get(stay.id)
    if row is None:
        tally["record without a line of outcomes, no labels"] += 1
        return {}
    known = {name: value for name, value in row.items() if value != MISSING}
    for name in row.keys() - {"Survival"}:
        tally[f"{name} missing (-1), no label"] += name not in known
    tally["In-hospital_death is 1, of all records found"] += row["In-hospital_death"] == 1
    targets = {task: known[column] for task, column in _COLUMN_OF.items() if column in known}
    if "los" in targets:
        targets["long_stay"] = float(targets["los"] > LONG_STAY_DAYS)
    if "mortality" in targets:
        targets["year_mortality"] = float(targets["mortality"] == 1 or 0 <= row["Survival"] <= YEAR_DAYS)
    unit = UNITS_OF_CARE.get(int(stay.descriptors.get("ICUType", 0)))
    if options.by_unit and unit is not None and "mortality" in targets:
        targets[f"mortality_{unit}"] = targets["mortality"]
    return {name: np.array([value], dtype=np.float32) for name, value in targets.items()}


_COLUMN_OF = {"mortality": "In-hospital_death", "los": "Length_of_stay", "saps": "SAPS-I", "sofa": "SOFA"}
_SCORE_CAVEAT = (
    "The hospital computed it from the first 24 h, mostly of variables that are inputs here: learning it is largely "
    "recovering a formula, and SOFA also counts vasopressors, which are not inputs."
)
_TASKS: tuple[dict[str, object], ...] = (
    {
        "name": "mortality",
        "kind": "binary",
        "classes": ("survived", "died"),
        "family": "outcome",
        "description": "death before discharge from hospital",
        "caveat": "Only stays of at least 48 h are in the set; deaths after discharge count as survival.",
    },
    {
        "name": "year_mortality",
        "kind": "binary",
        "classes": ("no death known", "died"),
        "family": "outcome",
        "description": "death in hospital or within a year of admission to the unit",
        "caveat": "Survival of -1 (outlived the follow-up, or unknown) counts as no death known.",
    },
    {
        "name": "los",
        "kind": "regression",
        "classes": ("days",),
        "family": "stay",
        "description": "days from admission to the unit to discharge from hospital or death",
        "caveat": "Heavy-tailed (median 10, up to 171 days): read ranks and absolute error rather than R2. "
        "A death ends a stay, so a short stay is not always a good one.",
    },
    {
        "name": "long_stay",
        "kind": "binary",
        "classes": ("up to 7 days", "more than 7 days"),
        "family": "stay",
        "description": "stay of more than 7 days from admission to the unit",
        "caveat": "Early deaths count as short stays.",
    },
    {
        "name": "saps",
        "kind": "regression",
        "classes": ("points",),
        "family": "severity",
        "description": "SAPS-I score of the first 24 h",
        "caveat": _SCORE_CAVEAT,
    },
    {
        "name": "sofa",
        "kind": "regression",
        "classes": ("points",),
        "family": "severity",
        "description": "SOFA score of the first 24 h",
        "caveat": _SCORE_CAVEAT,
    },
)

SOURCE = Source(
    name="physionet2012",
    summary="7,600 adult intensive-care stays, first 48 h: vitals, laboratory, support, static; six tasks.",
    needs_raw=True,
    options=Physionet2012Options,
    describe=describe,
    read=read,
    split=split,
)
