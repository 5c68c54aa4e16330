"""Using a saved run: evaluate it on labelled samples, predict for new ones. Writes nothing into the run."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from flame_moe.continual import Learner
from flame_moe.continual.identity_cost import IdentityCost, identity_cost
from flame_moe.data.funnel import Funnel
from flame_moe.data.layout import MANIFEST
from flame_moe.data.prepare import prepare
from flame_moe.data.store import Store
from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.files import write_bytes
from flame_moe.recorder import score
from flame_moe.results import Evaluation
from flame_moe.runs import MODEL, Run, insist_on_run, open_store
from flame_moe.schema import Task

WRITERS = (".csv", ".parquet")
AUTO, SURE = "auto", 0.9
_ABOUT = {"id": pl.String, "certainty": pl.Float64}


def evaluate(
    path: str | Path, *, store: Store | str | Path | None = None, split: str = "test", tasks: Sequence[str] = ()
) -> list[Evaluation]:
    """Score a saved run on a split of a store, with intervals.

    Args:
        path: the run folder.
        store: labelled samples; default the run's own store.
        split: train, val or test.
        tasks: default all of the run's that the store has.

    Raises:
        FlameError: if the run or the store cannot be used, or a task is unknown.
    """
    learner = Run.open(path).learner
    chosen = open_store(learner.recipe, store, make=False)
    rows = []
    for name in tasks or [name for name in learner.tasks if name in chosen.tasks]:
        task = _task(learner, name)
        indices = chosen.indices(name, split, modalities=task.modalities)
        if len(indices) == 0:
            mend = "Name another split or store."
            raise DataError(f"the {split} split has no labelled sample", where=f"task '{name}'", mend=mend)
        got = learner.predict(chosen, name, indices)
        row = score(task, got, chosen.subjects(indices), learner.recipe.train.bootstrap)
        rows.append(Evaluation(after_stage=len(learner.stages) - 1, task=name, split=split, **row))
    return rows


def identity(path: str | Path, *, store: Store | str | Path | None = None, split: str = "test") -> IdentityCost:
    """How well a saved run chooses the task of a sample by itself, and what that costs.

    Args:
        path: the run folder.
        store: labelled samples; default the run's own store.
        split: train, val or test.

    Raises:
        FlameError: if run or store cannot be used, or the model was not learned with identity = true.
    """
    learner = Run.open(path).learner
    return identity_cost(learner, open_store(learner.recipe, store, make=False), split)


def predict(
    path: str | Path,
    data: str | Path,
    *,
    tasks: Sequence[str] = (),
    split: str | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> pl.DataFrame:
    """Score samples with a saved run: those of a store, or raw records in the layout of the run's source.

    Args:
        path: the run folder.
        data: a store, or a folder of raw records; labels are not needed. Raw records are prepared in a temporary
            folder with the run's own options and scaled with the statistics of its training data.
        tasks: default all of the run's; "auto" alone chooses for each sample the stage and family it belongs to, and
            answers their tasks (see `flame_moe.continual.identity`).
        split: of a store; default all samples.
        out: where to write the table, as .csv or .parquet; a file that is there is replaced.
        say: told in a sentence for each rule of the source by which raw records were left out, and so not scored.

    Returns:
        One row per sample and output: id, task, output (a class, label or value), probability (null for regression),
        value (natural units, null for classification). A binary task has one row per sample, for its positive class.
        With "auto" also stage, family and certainty, the probability of this choice.

    Raises:
        FlameError: if run, data, task or file ending cannot be used.
    """
    if out is not None and Path(out).suffix not in WRITERS:
        raise DataError(
            f"cannot write '{Path(out).suffix}' files", where=str(out), mend="Name a .csv or .parquet file."
        )
    learner = Learner.load(insist_on_run(path) / MODEL)
    auto = tuple(tasks) == (AUTO,) and AUTO not in learner.tasks
    wanted = [_task(learner, name).name for name in ((() if auto else tasks) or learner.tasks)]
    with tempfile.TemporaryDirectory(prefix="flame-predict-") as scratch:
        store = _store_to_score(learner, Path(data), Path(scratch) / "store")
        if say is not None and store.path.parent == Path(scratch):
            for step in Funnel.parse(store.manifest["funnel"]).steps:
                if step.dropped:
                    say(f"{step.dropped:,} of {step.before:,} records are not scored, by the rule: {step.text}")
        if auto:
            frames = _predict_auto(learner, store, split, say)
        else:
            among = store.indices(None, split)
            frames = [frame for name in wanted if (frame := _predict_task(learner, store, name, among)) is not None]
    if not frames:
        raise DataError("no sample has a modality that the tasks read", where=str(data))
    table = pl.concat(frames)
    if out is not None:
        buffer = io.BytesIO()
        if Path(out).suffix == ".csv":
            table.write_csv(buffer)
        else:
            table.write_parquet(buffer)
        write_bytes(out, buffer.getvalue())
    return table


def _task(learner: Learner, name: str) -> Task:
    if name not in learner.tasks:
        raise RecipeError(f"the model has no task '{name}'", mend=nearest(name, learner.tasks))
    return learner.tasks[name]


def _store_to_score(learner: Learner, data: Path, scratch: Path) -> Store:
    if not data.exists():
        raise DataError("there is nothing to score", where=str(data), mend="Give a store, or a folder of raw records.")
    if (data / MANIFEST).is_file():
        return Store.open(data)
    config = learner.recipe.data
    return prepare(config.source, data, scratch, options=config.options, tasks=config.tasks, require_labels=False)


def _predict_auto(
    learner: Learner, store: Store, split: str | None, say: Callable[[str], None] | None
) -> list[pl.DataFrame]:
    """Every sample answered by the tasks of the group that it belongs to."""
    read = sorted({name for task in learner.tasks.values() for name in task.modalities} & set(store.modalities))
    indices = store.indices(None, split, modalities=read)
    choice = learner.choose(store, indices)
    sure = choice.certainty.max(axis=1)
    if say is not None and (sure < SURE).any():
        doubtful = int((sure < SURE).sum())
        say(f"{doubtful:,} of {len(sure):,} samples do not tell their task with a certainty of {SURE}; see 'certainty'")
    frames = []
    for g, group in enumerate(learner.groups):
        rows = choice.group == g
        about = pl.DataFrame({"id": store.ids(indices[rows]), "certainty": sure[rows]}, schema=_ABOUT)
        about = about.with_columns(pl.lit(group.stage).alias("stage"), pl.lit(group.family).alias("family"))
        for name in group.tasks:
            frame = _predict_task(learner, store, name, indices[rows])
            if frame is not None:
                frames.append(frame.join(about, on="id", how="left", maintain_order="left"))
    return frames


def _predict_task(learner: Learner, store: Store, name: str, among: NDArray[np.int64]) -> pl.DataFrame | None:
    task = learner.tasks[name]
    for modality in task.modalities:
        if modality not in store.modalities:
            mend = "Score data that were prepared like the training data."
            raise DataError(f"the store has no modality '{modality}'", where=f"task '{name}', {store.path}", mend=mend)
    indices = among[np.logical_or.reduce([store.present(m)[among] for m in task.modalities])]
    if len(indices) == 0:
        return None
    got = learner.predict(store, name, indices)
    values = got.values[:, None] if got.values.ndim == 1 else got.values
    outputs = task.classes[1:] if task.kind == "binary" else task.classes
    empty, filled = np.full(values.size, None, dtype=object), values.ravel()
    regression = task.kind == "regression"
    return pl.DataFrame(
        {
            "id": np.repeat(np.array(got.ids, dtype=object), len(outputs)),
            "task": [name] * values.size,
            "output": list(outputs) * len(values),
            "probability": pl.Series(empty if regression else filled, dtype=pl.Float64),
            "value": pl.Series(filled if regression else empty, dtype=pl.Float64),
        },
        schema_overrides={"id": pl.String},
    )
