"""What is computed once and kept: the first stage of each seed, and a cell for each entry, setting and seed.

A cell is a folder that is whole or not there:

    results.json   everything measured, in the documented format: the whole matrix R, sizes, times, drift
    predictions/   test predictions of every task after every stage
    failed.json    instead of both, where training ended in a loss that is no number
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flame_moe.continual import Learner
from flame_moe.continual.methods import Setting
from flame_moe.data.store import Store
from flame_moe.errors import NonFiniteError
from flame_moe.experiments.streams.entries import Entry, digest
from flame_moe.files import replacing_folder
from flame_moe.recorder import Recorder
from flame_moe.results import PRIMARY, Results
from flame_moe.schema import Recipe
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint

_KIND, _VERSION = "flame-moe-stream-predictions", 1
_RESULTS, _PREDICTIONS, _FAILED, _MODEL = "results.json", "predictions", "failed.json", "model"
Predictions = dict[tuple[int, str], NDArray[np.float64]]
"""(after which stage, task) -> probabilities or values of the test samples."""


@dataclass(frozen=True)
class FirstStage:
    """The first stage of a stream with one seed; every method goes on from it."""

    stream: Recipe
    store: str
    out: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its model is kept."""
        return Path(self.out) / "stage0" / f"seed{self.seed}"

    def work(self) -> None:
        """Learn it."""
        torch.set_num_threads(1)
        recipe = self.stream.model_copy(update={"seed": self.seed, "compare": ()})
        learner, store = Learner(recipe), Store.open(self.store)
        recorder = _recorder(recipe, store)
        recorder.learn(learner, store, recipe.stages[0])
        with replacing_folder(self.folder) as work:
            learner.save(work / _MODEL)
            recorder.results().save(work / _RESULTS)

    def learner(self) -> Learner:
        """The model, from disk."""
        return Learner.load(self.folder / _MODEL)

    @property
    def peak_bytes(self) -> int | None:
        """Of learning it."""
        return Results.load(self.folder / _RESULTS).stages[0].peak_bytes


@dataclass(frozen=True)
class Cell:
    """One entry of the table with one setting and one seed."""

    entry: Entry
    setting: Setting
    first: FirstStage

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        name = f"{self.entry.name}-{digest(self.entry, self.setting)}-seed{self.first.seed}"
        return Path(self.first.out) / "cells" / name

    def work(self) -> None:
        """Learn the stages after the first, measuring after each, and keep what was seen."""
        torch.set_num_threads(1)
        recipe = self.entry.recipe(self.first.stream, self.setting, self.first.seed)
        store = Store.open(self.first.store)
        learner = self.first.learner().with_method(recipe.method, store)
        learner.recipe = recipe
        recorder = _recorder(recipe, store)
        recorder.after_stage(learner, self.first.peak_bytes)
        try:
            for stage in recipe.stages[1:]:
                recorder.learn(learner, store, stage)
        except NonFiniteError as error:
            with replacing_folder(self.folder) as work:
                (work / _FAILED).write_text(json.dumps({"error": str(error)}) + "\n", encoding="utf-8")
            return
        with replacing_folder(self.folder) as work:
            recorder.results().save(work / _RESULTS)
            tensors = {f"{s}|{task}": torch.from_numpy(p) for (s, task), p in (recorder.predictions or {}).items()}
            save_checkpoint(work / _PREDICTIONS, tensors, {}, kind=_KIND, version=_VERSION)

    @property
    def done(self) -> bool:
        """Whether it need not be computed again."""
        return self.folder.exists()

    @property
    def failure(self) -> str | None:
        """Why there are no results, if there are none."""
        file = self.folder / _FAILED
        return str(json.loads(file.read_text(encoding="utf-8"))["error"]) if file.is_file() else None

    def results(self) -> Results:
        """What was measured."""
        return Results.load(self.folder / _RESULTS)

    def predictions(self) -> Predictions:
        """What was predicted for the test samples."""
        tensors = load_checkpoint(self.folder / _PREDICTIONS, kind=_KIND, version=_VERSION)[0]
        places = {name: name.split("|", 1) for name in tensors}
        return {(int(stage), task): tensors[name].numpy() for name, (stage, task) in places.items()}

    def validation(self) -> float:
        """Mean over tasks of the primary metric on the validation split after the last stage; the test split is not
        looked at. A metric that does not exist counts as 0; a cell that failed is below every other."""
        if self.failure is not None:
            return -np.inf
        results = self.results()
        values = []
        for task in results.tasks:
            final = results.final(task.name, "val")
            value = np.nan if final is None else final.metrics[PRIMARY[task.kind]]
            values.append(float(np.nan_to_num(value)))
        return float(np.mean(values))


def best(cells: list[Cell]) -> Cell:
    """The cell that validates best; the first of equals."""
    return max(cells, key=lambda cell: cell.validation())


def _recorder(recipe: Recipe, store: Store) -> Recorder:
    recorder = Recorder(recipe, stores=dict.fromkeys([t for stage in recipe.stages for t in stage.tasks], store))
    recorder.predictions = {}
    return recorder
