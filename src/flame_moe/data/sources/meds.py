"""MEDS: any data set in the Medical Event Data Standard, with its own labels and splits.

The standard (Medical-Event-Data-Standard, version 0.4): `data/**/*.parquet` with one row per event (subject_id, time,
code, numeric_value), a subject's rows in one file; `labels/TASK/**/*.parquet` with one row per prediction (subject_id,
prediction_time and boolean_value, categorical_value, float_value or integer_value);
`metadata/subject_splits.parquet` with train, tuning and held_out, which become train, val and test.

A sample is a subject at a prediction time. Its inputs are the events up to then, at most `history_days` old. Without a
mapping file they are one modality of kind codes; a mapping file (see docs/sources/meds.md) makes series, event types
and a static table of them. A data set without labels gives one sample per subject, at its last event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.slices import Watch
from flame_moe.data.sources._meds_files import (
    Labels,
    event_slices,
    events,
    find_labels,
    read_labels,
    read_splits,
    shards,
)
from flame_moe.data.sources._meds_history import History, by_subject
from flame_moe.data.sources._meds_mapping import Mapping, TaskRule, load_mapping, route
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import collect
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError, nearest
from flame_moe.schema import Modality, Task

_VERSION = 1
_KEPT = ("subject", "time", "modality", "slot", "sign", "id", "low", "high")
_KINDS = {"boolean_value": "binary", "categorical_value": "multiclass"}


class MedsOptions(Description):
    """How a data set is read.

    Attributes:
        mapping: a TOML file that says what codes become; a relative path is looked for below the raw folder first.
        labels: the folder of labels, looked for in the same way.
        tasks: which of the tasks there; default all.
        history_days: how far back before the prediction time events are taken; times are counted from there.
        last: at most this many steps of each modality, the latest.
        strict: only events before the prediction time, not those at it.
        seed: decides the split where the data set does not.
    """

    mapping: str | None = None
    labels: str = "labels"
    tasks: tuple[str, ...] | None = None
    history_days: Annotated[float, Field(gt=0)] = 365.0
    last: Annotated[int, Field(ge=1)] = 512
    strict: bool = False
    seed: Annotated[int, Field(ge=0)] = 0


class Prediction(NamedTuple):
    """A sample to be made: when, and its labels."""

    time: int
    id: str
    targets: dict[str, NDArray[np.float32]]


def describe(raw: Path | None, options: MedsOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Modalities of the mapping and a task per folder of labels."""
    folder = _folder(raw)
    mapping = _mapping(folder, options)
    modalities = mapping.modalities
    said = {rule.name: rule for rule in mapping.tasks}
    found = find_labels(_below(folder, options.labels), options.tasks)
    for name in said:
        if found and name not in {labels.task for labels in found}:
            mend = nearest(name, (labels.task for labels in found))
            raise DataError(f"the mapping describes an unknown task '{name}'", where=options.mapping, mend=mend)
    names = tuple(m.name for m in modalities)
    return modalities, tuple(_task(labels, said.get(labels.task), names) for labels in found if labels.column)


def read(raw: Path | None, options: MedsOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the samples shard by shard, and count every rule and defect.

    Raises:
        DataError: if files, columns or values are missing or malformed, a subject is in two shards, or a prediction
            has two different labels.
    """
    folder = _folder(raw)
    mapping = _mapping(folder, options)
    if options.mapping is not None:
        work.note(_below(folder, options.mapping))
    files = shards(folder)
    tally: Counter[str] = Counter()
    todo = _predictions(folder, files, mapping, options, tally, work)
    found = sum(map(len, todo.values()))
    splits = read_splits(folder, work)
    if splits is not None:
        todo = {subject: rows for subject, rows in todo.items() if subject in splits}
    listed = sum(map(len, todo.values()))
    history = History(mapping, options.history_days, options.last, options.strict)
    met: set[str] = set()
    there = kept = 0
    for number, file in enumerate(files):
        frame = _shard(number, file, mapping, set(todo), tally, work)
        for subject, happened in by_subject(frame):
            if subject in met:
                what = f"subject {subject} is in two event files"
                raise DataError(what, where=str(file), mend="MEDS keeps a subject in one file.")
            met.add(subject)
            for prediction in todo[subject]:
                there += 1
                parts = history.at(happened, prediction.time)
                if parts:
                    kept += 1
                    split = None if splits is None else splits[subject]
                    yield Sample(prediction.id, subject, parts, prediction.targets, split)
    funnel.start(found, "predictions: pairs of subject and prediction time")
    if splits is not None:
        funnel.rule("the subject is in metadata/subject_splits.parquet", listed)
    funnel.rule("the subject has an event that the mapping uses", there)
    funnel.rule(f"has one in the {options.history_days:g} days before the prediction time", kept)
    for text in sorted(tally):
        funnel.count(text, tally[text])


def split(options: MedsOptions) -> SplitSpec:
    """70/10/20 by subject, where the data set has no splits of its own."""
    return SplitSpec(seed=options.seed)


def _folder(raw: Path | None) -> Path:
    if raw is None or not raw.is_dir():
        where = None if raw is None else str(raw)
        raise DataError("this source needs a folder", where=where, mend="Give the folder that holds data/.")
    return raw


def _below(folder: Path, path: str) -> Path:
    return folder / path if (folder / path).exists() or not Path(path).exists() else Path(path)


def _mapping(folder: Path, options: MedsOptions) -> Mapping:
    return load_mapping(None if options.mapping is None else _below(folder, options.mapping))


def _task(labels: Labels, said: TaskRule | None, modalities: tuple[str, ...]) -> Task:
    rule = said or TaskRule(name=labels.task)
    kind = rule.kind or _KINDS.get(labels.column or "", "regression")
    classes = rule.classes or labels.classes or (("no", "yes") if kind == "binary" else (labels.task,))
    plain = {
        "name": labels.task,
        "kind": kind,
        "modalities": modalities,
        "classes": classes,
        "family": rule.family,
        "description": rule.description or f"{labels.column} of the label files of '{labels.task}'",
        "caveat": rule.caveat,
    }
    return Task.parse(plain, where=f"tasks.{labels.task}")


def _predictions(
    folder: Path, files: list[Path], mapping: Mapping, options: MedsOptions, tally: Counter[str], work: Work
) -> dict[str, list[Prediction]]:
    """Subject -> predictions in the order of time."""
    targets: dict[tuple[str, int], dict[str, NDArray[np.float32]]] = {}
    _, tasks = describe(folder, options)
    described = {task.name: task for task in tasks}
    for labels in find_labels(_below(folder, options.labels), options.tasks):
        for file in labels.files:
            work.note(file)
        frame = read_labels(labels.files)
        values = frame[labels.column].to_list() if labels.column else [None] * len(frame)
        for subject, time, value in zip(frame["subject"], frame["time"].dt.epoch("us"), values, strict=True):
            known = targets.setdefault((subject, time), {})
            if value is None:
                tally[f"prediction without a value of '{labels.task}', no label"] += 1
                continue
            label = np.array([_number(value, described[labels.task], labels)], dtype=np.float32)
            if labels.task in known:
                if known[labels.task] != label:
                    where = f"task '{labels.task}', subject {subject}"
                    raise DataError("one prediction time has two different labels", where=where, mend="Keep one.")
                tally[f"label of '{labels.task}' given twice, the same"] += 1
            known[labels.task] = label
    if not targets:
        targets = {key: {} for key in _last_events(files, mapping)}
        tally["no labels: one sample per subject, at its last event"] += len(targets)
    todo: dict[str, list[Prediction]] = {}
    for subject, time in sorted(targets):
        stamp = np.datetime64(time, "us").astype("datetime64[s]" if time % 1_000_000 == 0 else "datetime64[us]")
        todo.setdefault(subject, []).append(Prediction(time, f"{subject}@{stamp}", targets[subject, time]))
    return todo


def _number(value: Any, task: Task, labels: Labels) -> float:
    """A label as it is stored: classes by their position."""
    if labels.column != "categorical_value":
        return float(value)
    if value not in task.classes:
        raise DataError(f"unknown class '{value}'", where=f"task '{task.name}'", mend=nearest(str(value), task.classes))
    return float(task.classes.index(str(value)))


def _last_events(files: list[Path], mapping: Mapping) -> Iterator[tuple[str, int]]:
    for file in files:
        frame = events(file, mapping.columns, numbers=False).group_by("subject").agg(pl.col("time").max())
        for subject, time in collect(frame.with_columns(pl.col("time").dt.epoch("us")), file).iter_rows():
            if time is not None:
                yield subject, time


def _shard(
    number: int, file: Path, mapping: Mapping, subjects: set[str], tally: Counter[str], work: Work
) -> pl.DataFrame:
    """The events of these subjects that go somewhere, in order, with implausible numbers left out and counted."""
    modalities = mapping.modalities
    numeric = [i for i, m in enumerate(modalities) if m.kind == "series"]
    static = [c.kind == "value" for c in mapping.static]
    numbers = bool(numeric) or any(static)
    there = events(file, mapping.columns, numbers=numbers).select(pl.col("code").unique())
    codes = collect(there, file)["code"].drop_nulls()
    routes = route(codes, mapping).lazy()
    wanted = pl.LazyFrame({"subject": sorted(subjects)}, schema={"subject": pl.String})

    def each(given: pl.LazyFrame) -> pl.LazyFrame:
        joined = given.join(wanted, on="subject", how="semi").join(routes, on="code", how="inner")
        return joined.select(*_KEPT, number=pl.col("number") * pl.col("factor") + pl.col("offset"))

    def make(watch: Watch) -> Iterator[pl.DataFrame]:
        return event_slices(file, mapping.columns, each, watch, numbers=numbers)

    settings = {"mapping": mapping.plain(), "subjects": sorted(subjects), "version": _VERSION}
    frame = collect(work.step(f"events-{number}", [file], settings, make), file)
    needs = pl.col("modality").is_in(numeric)
    if any(static):
        values = [i for i, is_value in enumerate(static) if is_value]
        needs |= (pl.col("modality") == len(modalities) - 1) & pl.col("slot").is_in(values)
    lacking = needs & (pl.col("number").is_null() | pl.col("number").is_nan())
    outside = needs & ~lacking & ~pl.col("number").is_between(pl.col("low"), pl.col("high"))
    judged = frame.with_columns(lacking=lacking, outside=outside)
    _tally(judged.filter("outside"), modalities, "outside its plausible range, left out", tally)
    _tally(judged.filter("lacking"), modalities, "without a number, left out", tally)
    return judged.filter(~pl.col("lacking") & ~pl.col("outside")).sort(
        "subject", "time", "modality", "slot", "id", "number", nulls_last=False
    )


def _tally(frame: pl.DataFrame, modalities: tuple[Modality, ...], text: str, tally: Counter[str]) -> None:
    for modality, slot, n in frame.group_by("modality", "slot").len().iter_rows():
        tally[f"{modalities[modality].channels[slot]} {text}"] += n


SOURCE = Source(
    name="meds",
    summary="Any data set in the Medical Event Data Standard (MEDS), with its own labels and splits.",
    needs_raw=True,
    options=MedsOptions,
    describe=describe,
    read=read,
    split=split,
)
