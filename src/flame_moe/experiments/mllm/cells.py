"""What is computed once and kept: one method on one stream with one setting, order and seed."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flame_moe.errors import NonFiniteError
from flame_moe.files import replacing_folder
from flame_moe.mllm.methods import METHODS
from flame_moe.mllm.run import RESULTS, learn_stream
from flame_moe.mllm.shelf import Shelf
from flame_moe.mllm.stream.tiers import TIERS, Stream, open_stream
from flame_moe.results import Results
from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint

_KIND, _VERSION = "flame-moe-answers", 1
_RIGHT, _FAILED = "right", "failed.json"
Setting = tuple[tuple[str, float], ...]
"""Keys of settings and their values."""
Right = dict[tuple[int, str], NDArray[np.bool_]]
"""(after which stage, task) -> which test samples were answered exactly."""


@dataclass(frozen=True)
class Place:
    """Where a comparison reads and writes.

    Attributes:
        stream: name of the stream.
        out: folder of cells and tables.
        cache: of base models.
        raw, model: as in `flame_moe.mllm.stream.tiers.open_stream`.
        changes: of the stream's settings, for every method.
        accelerator: where methods learn; it decides rounding alone and is no part of a cell's name.
    """

    stream: str
    out: str
    cache: str
    raw: str | None = None
    model: str | None = None
    changes: Setting = ()
    accelerator: str = "cpu"

    @property
    def told(self) -> list[object]:
        """Everything that decides what is learned, but for method, setting, order, seed and code."""
        tier = TIERS[self.stream]
        model = None if tier.config is None else tier.config.plain()
        return [self.stream, tier.tasks, tier.counts, tier.settings.plain(), model, self.raw is not None, self.changes]

    @property
    def shelf(self) -> Shelf:
        """Of the experts that the cells have trained alone."""
        return Shelf(Path(self.out) / "experts", json.dumps([*self.told, self.accelerator]))

    def open(self, order: str) -> Stream:
        """The stream, opened once per process and order."""
        return _opened(self, order)


@cache
def _opened(place: Place, order: str) -> Stream:
    raw, model = (None if path is None else Path(path) for path in (place.raw, place.model))
    return open_stream(place.stream, order, Path(place.cache), raw=raw, model=model)


@dataclass(frozen=True)
class Cell:
    """One method with one setting, order and seed; a folder that is whole or not there."""

    place: Place
    method: str
    setting: Setting
    order: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where it is kept; the name holds a digest of everything that decides it but the code."""
        told = json.dumps([*self.place.told, self.setting])
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return Path(self.place.out) / "cells" / f"{self.method}-{digest}-{self.order}-seed{self.seed}"

    def work(self) -> None:
        """Learn the stream and keep what was measured; `failed.json` instead, where a loss is no number."""
        torch.set_num_threads(1)
        stream = self.place.open(self.order)
        try:
            changes = {**dict(self.place.changes), **dict(self.setting)}
            outcome = learn_stream(
                stream,
                self.method,
                seed=self.seed,
                changes=changes,
                accelerator=self.place.accelerator,
                shelf=self.place.shelf,
            )
        except NonFiniteError as error:
            with replacing_folder(self.folder) as work:
                (work / _FAILED).write_text(json.dumps({"error": str(error)}) + "\n", encoding="utf-8")
            return
        with replacing_folder(self.folder) as work:
            outcome.results.save(work / RESULTS)
            tensors = {f"{stage}|{task}": right for (stage, task), right in outcome.right.items()}
            save_checkpoint(work / _RIGHT, tensors, {}, kind=_KIND, version=_VERSION)

    @property
    def choice(self) -> str:
        """Setting of what the method's grid chooses among, or of what was given for it instead, in words."""
        fixed = [(key, value) for key, value in self.place.changes if key in METHODS[self.method].grid]
        return written((*fixed, *self.setting))

    @property
    def failure(self) -> str | None:
        """Why there are no results, if there are none."""
        file = self.folder / _FAILED
        return str(json.loads(file.read_text(encoding="utf-8"))["error"]) if file.is_file() else None

    def results(self) -> Results:
        """What was measured."""
        return Results.load(self.folder / RESULTS)

    def right(self) -> Right:
        """Which test samples were answered exactly."""
        tensors = load_checkpoint(self.folder / _RIGHT, kind=_KIND, version=_VERSION)[0]
        places = {name: name.split("|", 1) for name in tensors}
        return {(int(stage), task): tensors[name].numpy() for name, (stage, task) in places.items()}

    def validation(self) -> float:
        """Mean exact match on validation after the last stage; a cell that failed is below every other."""
        if self.failure is not None:
            return -np.inf
        results = self.results()
        found = [results.final(task.name, "val") for task in results.tasks]
        return float(np.mean([row.metrics["accuracy"] for row in found if row is not None]))


def grid(method: str, fixed: Collection[str] = ()) -> list[Setting]:
    """The settings among which validation chooses; one empty setting where there is nothing to choose.

    Args:
        method: name.
        fixed: keys that are not to be chosen.
    """
    choice = {key: values for key, values in METHODS[method].grid.items() if key not in fixed}
    axes = [[(key, float(value)) for value in values] for key, values in choice.items()]
    return [tuple(chosen) for chosen in itertools.product(*axes)]


def written(setting: Setting) -> str:
    """A setting in words.

    Example:
        >>> written((("rate", 0.4), ("top_k", 2.0)))
        'rate = 0.4, top_k = 2'
    """
    return ", ".join(f"{key} = {value:g}" for key, value in setting) or "none to choose"
