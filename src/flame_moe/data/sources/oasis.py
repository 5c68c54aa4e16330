"""OASIS-1 and OASIS-2: brain measures from MRI, demographics and cognition of adults with and without dementia.

The Open Access Series of Imaging Studies, cross-sectional (Marcus et al., Journal of Cognitive Neuroscience 19:1498,
2007) and longitudinal (Marcus et al., Journal of Cognitive Neuroscience 22:2677, 2010): the tables
`oasis_cross-sectional.csv` and `oasis_longitudinal.csv`, either or both. One sample is one MRI session.

    demographics    table: age, sex, education, socio-economic status
    mri             table: intracranial volume, whole-brain fraction, atlas scaling
    cognition       table: Mini-Mental State Examination

Many people of the cross-sectional table are also in the longitudinal one, under another id, with the same session. They
are found by what does not depend on the diagnosis, and left out of the cross-sectional part, so that nobody is in two
splits.
CDR and Group are labels and never inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources._oasis_tables import Session, read_sessions, same_session
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import find_table
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError
from flame_moe.schema import Modality, Task

TABLES = {"cross_sectional": "oasis_cross-sectional", "longitudinal": "oasis_longitudinal"}
MODALITIES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "demographics": (
        "age, sex, education and socio-economic status",
        (
            ("age", "years"),
            ("male", "1 = male"),
            ("education", "level, 1 (below high school) to 5 (beyond college)"),
            ("ses", "Hollingshead, 1 (highest) to 5 (lowest)"),
        ),
    ),
    "mri": (
        "volumes of the head and brain from T1 MRI",
        (("etiv", "cm3"), ("nwbv", "fraction of intracranial volume"), ("asf", "factor")),
    ),
    "cognition": ("Mini-Mental State Examination", (("mmse", "points, 0 to 30"),)),
}


class OasisOptions(Description):
    """How the tables are read.

    Attributes:
        sets: which of the two tables to use, where they are there.
        cognition: whether the diagnosis task reads the MMSE, which is close to its label.
        seed: decides the split; by default one that deals some of the few who convert to every split.
    """

    sets: Annotated[tuple[Literal["cross_sectional", "longitudinal"], ...], Field(min_length=1)] = (
        "cross_sectional",
        "longitudinal",
    )
    cognition: bool = False
    seed: Annotated[int, Field(ge=0)] = 4


def describe(raw: Path | None, options: OasisOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Three tables; `diagnosis`, and `converts` where the longitudinal table is there."""
    modalities = tuple(_modality(name, *parts) for name, parts in MODALITIES.items())
    reads = tuple(MODALITIES) if options.cognition else ("demographics", "mri")
    tasks = [Task.parse({**_DIAGNOSIS, "modalities": reads}, where="tasks.diagnosis")]
    if "longitudinal" in _places(raw, options):
        tasks.append(Task.parse({**_CONVERTS, "modalities": tuple(MODALITIES)}, where="tasks.converts"))
    return modalities, tuple(tasks)


def read(raw: Path | None, options: OasisOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the sessions, and count every rule and defect.

    Raises:
        DataError: with file and row, if a table, column or value is missing or malformed.
    """
    tally: Counter[str] = Counter()
    places = _places(raw, options)
    parts = {name: read_sessions(work.note(path), name, tally) for name, path in places.items()}
    for name in options.sets:
        if name not in parts:
            tally[f"table {TABLES[name]} absent: its sessions left out"] += 1
            if name == "longitudinal":
                tally["table oasis_longitudinal absent: task converts left out"] += 1
    sessions = [session for part in parts.values() for session in part]
    funnel.start(len(sessions), "MRI sessions found")
    twins = _twins(parts.get("cross_sectional", []), parts.get("longitudinal", []))
    sessions = [session for session in sessions if session.subject not in twins]
    funnel.rule("is not a person of the cross-sectional table who is in the longitudinal one too", len(sessions))
    kept = 0
    visits = _visits(sessions)
    for session in sessions:
        modalities = _observations(session)
        if not modalities:
            continue
        kept += 1
        yield Sample(session.id, session.subject, modalities, _targets(session, visits[session.subject], tally))
    funnel.rule("has at least one value", kept)
    for text in sorted(tally):
        funnel.count(text, tally[text])


def split(options: OasisOptions) -> SplitSpec:
    """70/10/20 by subject."""
    return SplitSpec(seed=options.seed)


def _places(raw: Path | None, options: OasisOptions) -> dict[str, Path]:
    if raw is None:
        raise DataError("this source needs raw data", mend="Give the folder that holds the OASIS tables.")
    found = {name: find_table(raw, TABLES[name]) for name in TABLES if name in options.sets}
    places: dict[str, Path] = {name: path for name, path in found.items() if path is not None}
    if not places:
        wanted = " or ".join(f"{TABLES[name]}.csv" for name in options.sets)
        raise DataError(f"there is no {wanted}", where=str(raw), mend="Get the tables from oasis-brains.org.")
    return places


def _twins(cross: list[Session], longitudinal: list[Session]) -> set[str]:
    """Cross-sectional subjects with a session that is in the longitudinal table under another id."""
    by_key: dict[tuple[float, float, float], list[Session]] = {}
    for other in longitudinal:
        by_key.setdefault(other.key, []).append(other)
    return {one.subject for one in cross if any(same_session(one, other) for other in by_key.get(one.key, []))}


def _visits(sessions: list[Session]) -> dict[str, list[Session]]:
    visits: dict[str, list[Session]] = {}
    for session in sessions:
        visits.setdefault(session.subject, []).append(session)
    return visits


def _observations(session: Session) -> dict[str, Observation]:
    """What the session has; a modality without a value is left out."""
    found = {}
    for name, (_, channels) in MODALITIES.items():
        values = np.array([[session.values[channel] for channel, _ in channels]])
        observed = ~np.isnan(values)
        if observed.any():
            found[name] = Observation(np.where(observed, values, 0.0).astype(np.float32), None, observed)
    return found


def _targets(session: Session, visits: list[Session], tally: Counter[str]) -> dict[str, NDArray[np.float32]]:
    labels: dict[str, float] = {}
    if np.isnan(session.cdr):
        tally["no CDR, no diagnosis"] += 1
    else:
        labels["diagnosis"] = float(np.searchsorted((0.5, 1.0), session.cdr, side="right"))
    later = [other for other in visits if other.days > session.days]
    if session.group is not None and session.cdr == 0 and later:
        if session.group == "Nondemented":
            labels["converts"] = 0.0
        elif session.group == "Converted" and any(other.cdr > 0 for other in later):
            labels["converts"] = 1.0
    return {name: np.array([value], dtype=np.float32) for name, value in labels.items()}


def _modality(name: str, description: str, channels: tuple[tuple[str, str], ...]) -> Modality:
    return Modality(
        name=name,
        kind="table",
        features=len(channels),
        channels=tuple(channel for channel, _ in channels),
        units=tuple(unit for _, unit in channels),
        description=description,
        scaling="quantile",
    )


_DIAGNOSIS: dict[str, Any] = {
    "name": "diagnosis",
    "kind": "multiclass",
    "classes": ("no dementia", "very mild dementia", "mild or moderate dementia"),
    "family": "diagnosis",
    "description": "Clinical Dementia Rating at the session: 0, 0.5, or 1 and more",
    "caveat": "A rating of 0.5 is the nearest that this set has to mild cognitive impairment, not the same. The MMSE "
    "is close to the rating and is read only with the option cognition. Adults below 60 were mostly not rated and "
    "have no label, so the task is one among older adults.",
}
_CONVERTS: dict[str, Any] = {
    "name": "converts",
    "kind": "binary",
    "classes": ("stays without dementia", "converts"),
    "family": "prognosis",
    "description": "a session with a rating of 0 that is followed by dementia at a later one (Group: Converted)",
    "caveat": "Thirteen people convert: enough to try a model, not to judge one. Time to conversion and length of "
    "follow-up differ between people. A passing rating of 0.5 in the group Nondemented counts as not converting.",
}

SOURCE = Source(
    name="oasis",
    summary="OASIS-1 and OASIS-2: MRI brain measures, demographics, MMSE; dementia rating and conversion.",
    needs_raw=True,
    options=OasisOptions,
    describe=describe,
    read=read,
    split=split,
)
