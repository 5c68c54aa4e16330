"""A folder of your own: tables, arrays, pictures, texts and waveforms, described in a short file `flame.toml`.

`flame.toml` names one table of samples (ids, subjects, labels) and, for each modality, a file or folder and the columns
in it; docs/sources/folder.md has every key. `flame init FOLDER` looks at a folder and drafts the file.

Values are in the units of the tables: nothing is converted but times, which are counted in hours from the sample's
origin and divided by the window. What is to be predicted must lie after everything that a modality holds. Only the
owner of the data can know that; what is refused is a label that is among the inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import Field

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources import _folder_files as files
from flame_moe.data.sources import _folder_tables as tables
from flame_moe.data.sources._folder_init import draft
from flame_moe.data.sources._folder_place import (
    Get,
    Place,
    array_shape,
    existing,
    is_table,
    read_table,
    refuse_empty_ids,
    refuse_repeated_ids,
    written_as,
)
from flame_moe.data.sources._folder_rules import (
    CodesRule,
    FolderFile,
    ImageRule,
    ModalityRule,
    PatchesRule,
    SamplesRule,
    SeriesRule,
    TableRule,
    TaskRule,
    TextRule,
    VectorsRule,
    VolumeRule,
    WaveformRule,
    load_folder_file,
)
from flame_moe.data.sources._folder_times import Origins, checked, moments
from flame_moe.data.sources.base import Source, SplitSpec
from flame_moe.data.tables import collect, column_names
from flame_moe.data.text import text_modality
from flame_moe.data.work import Work
from flame_moe.description import Description
from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.files import write_text
from flame_moe.schema import Modality, Task


class FolderOptions(Description):
    """How a folder is read.

    Attributes:
        file: the description, below the folder.
        seed: decides the split where the table of samples has none.
    """

    file: str = "flame.toml"
    seed: Annotated[int, Field(ge=0)] = 0


def describe(raw: Path | None, options: FolderOptions) -> tuple[tuple[Modality, ...], tuple[Task, ...]]:
    """Modalities and tasks as the description says them; array files and models are asked for their width."""
    described, rules = load_folder_file(raw, options.file)
    assert raw is not None
    where = str(raw / options.file)
    _refuse_labels_as_inputs(described, rules, where)
    modalities = tuple(
        Modality.parse({"name": name, **_shape(name, rule, raw)}, where=f"{where}: modalities.{name}")
        for name, rule in rules.items()
    )
    return modalities, tuple(_task(name, rule, tuple(rules), where) for name, rule in described.tasks.items())


def read(raw: Path | None, options: FolderOptions, funnel: Funnel, work: Work) -> Iterator[Sample]:
    """Stream the samples in the order of their table, and count what is left out.

    Raises:
        DataError: with file, column and id, if something is missing, malformed, repeated or out of its window.
    """
    described, rules = load_folder_file(raw, options.file)
    assert raw is not None
    work.note(raw / options.file)
    tally: Counter[str] = Counter()
    frame = _samples(raw, described, work, tally)
    ids = frame["_id"].to_list()
    known, origins = set(ids), _origins(raw, described.samples, frame)
    getters: dict[str, Get] = {}
    for name, rule in rules.items():
        getters[name] = reader(rule)(
            rule, Place(raw, name, described.samples, known, described.window, origins, work, tally)
        )
    targets = {name: _targets(name, rule, frame) for name, rule in described.tasks.items()}
    kept = 0
    for i, (id, subject, split) in enumerate(zip(ids, frame["_subject"], frame["_split"], strict=True)):
        parts: dict[str, Observation] = {}
        for name, get in getters.items():
            if (part := get(id)) is not None:
                parts[name] = part
        if parts:
            kept += 1
            labels = {name: rows[i] for name, rows in targets.items() if not np.isnan(rows[i]).any()}
            yield Sample(id, subject, parts, labels, split)
    funnel.start(len(ids), f"rows of {described.samples.file}")
    funnel.rule("has at least one modality", kept)
    for text in sorted(tally):
        funnel.count(text, tally[text])


def split(options: FolderOptions) -> SplitSpec:
    """70/10/20 by subject, where the table of samples has no split."""
    return SplitSpec(seed=options.seed)


def write_draft(raw: Path, out: Path | None = None, *, overwrite: bool = False) -> Path:
    """Draft the description of a folder; returns where it was written.

    Raises:
        DataError: if there is no such folder, no table with one row per sample, or a description already.
    """
    if not raw.is_dir():
        raise DataError("there is no such folder", where=str(raw), mend="Check the path.")
    path = raw / FolderOptions().file if out is None else out
    if path.exists() and not overwrite:
        raise DataError("there is a description already", where=str(path), mend="Use --overwrite to replace it.")
    return write_text(path, draft(raw))


def reader(rule: ModalityRule) -> Callable[[Any, Place], Get]:
    """What reads a modality: by its kind, and by whether it lies in a table, in an array file or in a folder.

    Raises:
        RecipeError: if the kind cannot lie there.
    """
    form = "folder" if rule.folder is not None else "table" if is_table(Path(str(rule.file))) else "arrays"
    if form == "arrays" and not str(rule.file).endswith(".npz"):
        raise RecipeError("the file is neither a table nor an array file (.npz)", where=str(rule.file))
    found = _READERS.get((rule.kind, form))
    if found is None:
        can = sorted(place for kind, place in _READERS if kind == rule.kind)
        what = f"a modality of kind '{rule.kind}' cannot be read from a {form.removesuffix('s')}"
        raise RecipeError(what, where=str(rule.file or rule.folder), mend=f"It can be in: {', '.join(can)}.")
    return found


_READERS: dict[tuple[str, str], Callable[[Any, Place], Get]] = {
    ("series", "table"): tables.series,
    ("series", "arrays"): files.arrays,
    ("table", "table"): tables.table,
    ("table", "arrays"): files.arrays,
    ("timed", "table"): tables.vectors,
    ("timed", "arrays"): files.arrays,
    ("codes", "table"): tables.codes,
    ("text", "table"): tables.texts,
    ("text", "folder"): files.text_files,
    ("image", "table"): files.pictures,
    ("image", "folder"): files.pictures,
    ("image", "arrays"): files.arrays,
    ("volume", "folder"): files.volumes,
    ("volume", "arrays"): files.volume_arrays,
    ("patches", "arrays"): files.arrays,
    ("waveform", "folder"): files.records,
    ("waveform", "arrays"): files.arrays,
}


def _refuse_labels_as_inputs(described: FolderFile, rules: dict[str, ModalityRule], where: str) -> None:
    label_of = {column.lower(): task for task, rule in described.tasks.items() for column in rule.labels}
    for name, rule in rules.items():
        if isinstance(rule, TableRule) and rule.file == described.samples.file:
            for column in rule.columns:
                if column.lower() in label_of:
                    what = f"the column '{column}' is the label of task '{label_of[column.lower()]}'"
                    raise RecipeError(what, where=f"{where}: modalities.{name}", mend="Take it out of the inputs.")


def _shape(name: str, rule: ModalityRule, raw: Path) -> dict[str, Any]:
    """What the description of a modality holds beside its name."""
    reader(rule)
    plain: dict[str, Any] = {"kind": rule.kind, "description": rule.description}
    if isinstance(rule, SeriesRule):
        return plain | _channels(rule.names, rule.units) | {"scaling": rule.scaling}
    if isinstance(rule, (TableRule, VectorsRule)):
        names = rule.columns
        if not names and is_table(Path(str(rule.file))):
            raise RecipeError("the key 'columns' is missing", where=f"modalities.{name}", mend="Name the columns.")
        units = rule.units if isinstance(rule, TableRule) else ()
        sized = _channels(names, units) if names else {"features": array_shape(raw, rule, name)[-1]}
        return plain | sized | {"scaling": rule.scaling}
    if isinstance(rule, CodesRule):
        return plain | {"features": 2, "types": rule.types, "vocabulary": rule.vocabulary}
    if isinstance(rule, TextRule):
        return text_modality(name, rule.options, rule.description).plain()
    if isinstance(rule, ImageRule):
        return plain | {"features": math.prod(rule.shape), "shape": rule.shape}
    if isinstance(rule, VolumeRule):
        return plain | {"kind": "patches", "features": math.prod(rule.block), "scaling": "standard"}
    if isinstance(rule, WaveformRule):
        sized = _channels(rule.leads, ()) if rule.leads else {"features": (*array_shape(raw, rule, name), 1)[1]}
        return plain | sized | {"rate": rule.rate}
    assert isinstance(rule, PatchesRule)
    return plain | {"features": array_shape(raw, rule, name)[-1], "scaling": rule.scaling}


def _channels(names: tuple[str, ...], units: tuple[str, ...]) -> dict[str, Any]:
    return {"features": len(names), "channels": names, "units": units}


def _task(name: str, rule: TaskRule, modalities: tuple[str, ...], where: str) -> Task:
    plain = {
        "name": name,
        "kind": rule.kind,
        "classes": rule.outputs,
        "modalities": rule.modalities or modalities,
        "family": rule.family,
        "loss": rule.loss,
        "description": rule.description or f"column {', '.join(rule.labels)} of the table of samples",
        "caveat": rule.caveat,
    }
    task = Task.parse(plain, where=f"{where}: tasks.{name}")
    if rule.kind in ("multilabel", "regression") and len(task.classes) != len(rule.labels):
        what = f"{len(task.classes)} classes for {len(rule.labels)} columns"
        raise RecipeError(what, where=f"{where}: tasks.{name}", mend="Give one name per column, or none.")
    for modality in task.modalities:
        if modality not in modalities:
            mend = nearest(modality, modalities)
            raise RecipeError(f"unknown modality '{modality}'", where=f"{where}: tasks.{name}", mend=mend)
    return task


def _samples(raw: Path, described: FolderFile, work: Work, tally: Counter[str]) -> pl.DataFrame:
    """Columns `_id`, `_subject`, `_split` and those of the labels as text; labels may all be missing."""
    rule = described.samples
    path = work.note(existing(raw, rule.file, "samples"))
    labels = sorted({column for task in described.tasks.values() for column in task.labels})
    there = {name.strip().lower() for name in column_names(path)} if is_table(path) else set()
    lacking = [name for name in labels if name.lower() not in there]
    if lacking and len(lacking) < len(labels):
        raise DataError(f"the column '{lacking[0]}' is missing", where=str(path), mend=nearest(lacking[0], there))
    if lacking:
        tally[f"table without the columns of labels ({', '.join(lacking)}): no labels"] += 1
    columns = {rule.id, *(name for name in (rule.subject, rule.split) if name)}
    types: dict[str, Any] = dict.fromkeys([*sorted(columns), *labels], pl.String)
    found = read_table(path, types | ({rule.origin: written_as(path, rule.origin)} if rule.origin else {}), labels)
    frame = collect(found, path)
    refuse_empty_ids(frame[rule.id], path, rule.id)
    refuse_repeated_ids(frame[rule.id], path, rule.id)
    if rule.subject:
        refuse_empty_ids(frame[rule.subject], path, rule.subject)
    return frame.with_columns(
        _id=pl.col(rule.id),
        _subject=pl.col(rule.subject or rule.id),
        _split=pl.col(rule.split) if rule.split else pl.lit(None, dtype=pl.String),
    )


def _origins(raw: Path, rule: SamplesRule, frame: pl.DataFrame) -> Origins | None:
    if rule.origin is None:
        return None
    found = frame.select("_id", *moments(rule.origin, frame.schema[rule.origin]))
    zoned = checked(found, rule.origin, str(raw / rule.file))
    there = found.drop_nulls("_moment")
    return Origins(rule.origin, dict(zip(there["_id"], there["_moment"], strict=True)), bool(zoned))


def _targets(name: str, rule: TaskRule, frame: pl.DataFrame) -> NDArray[np.float32]:
    """(samples, target width), NaN where there is no label."""
    columns = [
        [_number(text, name, rule, id) for text, id in zip(frame[c], frame["_id"], strict=True)] for c in rule.labels
    ]
    return np.array(columns, dtype=np.float32).T


def _number(text: str | None, name: str, rule: TaskRule, id: str) -> float:
    """A label as it is stored: a class by its name or its position, a truth value, a number."""
    if text is None:
        return math.nan
    where = f"task '{name}', sample '{id}'"
    if rule.kind in ("binary", "multiclass") and text in rule.outputs:
        return float(rule.outputs.index(text))
    if rule.kind in ("binary", "multilabel") and text.lower() in ("true", "false"):
        return float(text.lower() == "true")
    try:
        number = float(text)
    except ValueError:
        known = "" if rule.kind == "regression" else nearest(text, rule.outputs)
        raise DataError(f"the label '{text}' is no {_WORD[rule.kind]}", where=where, mend=known or None) from None
    limit = {"binary": 2, "multilabel": 2, "multiclass": len(rule.outputs)}.get(rule.kind)
    if limit is not None and not math.isnan(number) and number not in range(limit):
        raise DataError(f"the label '{text}' is no {_WORD[rule.kind]}", where=where, mend=f"Give 0 to {limit - 1}.")
    return number


_WORD = {"binary": "class", "multiclass": "class", "multilabel": "0 or 1", "regression": "number"}

SOURCE = Source(
    name="folder",
    summary="A folder of your own, described in a short file flame.toml that `flame init` drafts.",
    needs_raw=True,
    options=FolderOptions,
    describe=describe,
    read=read,
    split=split,
)
