"""How many training batches of a task a commit has to look at: what a truncated update loses on validation samples.

    python -m benchmarks.sampled RECIPE.toml STORE

Learns the recipe's first two stages (of a recipe with one, a third of its tasks and then the others), three epochs
each, and cuts the second stage's updates with moments of so many batches of each task, drawn three times: the error of
the outputs on all validation samples, relative to what the update does, mean over weights; and what the mean validation
loss of the stage's tasks becomes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flame_moe.continual.learner import Learner
from flame_moe.continual.methods import base
from flame_moe.continual.methods.base import StageContext
from flame_moe.continual.moments import Moment, gather
from flame_moe.continual.sensitivity import squared_gradients
from flame_moe.continual.spectra import energy_of
from flame_moe.continual.truncation import Mode, Plan, Truncated, truncate
from flame_moe.data.store import Store
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.schema import Recipe, Stage
from flame_moe.training.engine import validate

EPOCHS, DRAWS = 3, 3
BATCHES = (1, 2, 4, 8, 24)
RANKS = (4, 16)
MODES: tuple[Mode, ...] = ("activation", "loss")


class Cut(NamedTuple):
    """What a way of cutting loses on validation samples: of the outputs, and the mean loss of the stage's tasks."""

    error: float
    loss: float


def stages_of(recipe: Recipe) -> list[Stage]:
    """Two stages of the recipe."""
    first, both = recipe.stages[0], recipe.stages[:2]
    if len(both) == 1:
        if len(first.tasks) < 2:
            raise SystemExit(f"recipe '{recipe.name}' has one stage with one task: give one that learns two stages.")
        third = max(1, len(first.tasks) // 3)
        both = tuple(first.model_copy(update={"tasks": t}) for t in (first.tasks[:third], first.tasks[third:]))
    return [stage.model_copy(update={"epochs": EPOCHS}) for stage in both]


class Trial:
    """The second stage of a learner just before its commit."""

    def __init__(self, learner: Learner, store: Store) -> None:
        record = learner.stages[-1]
        self.model, self.stage = learner.model, record.index
        problems = {name: learner._problem(store, learner.tasks[name], self.stage) for name in record.tasks}
        self.context: StageContext = learner._context(self.stage, record.tasks, record.modalities, [], problems, {})
        self.parts = {
            name: part
            for name, part in growables(self.model)
            if isinstance(part, StackedMatrix) and part.delta is not None and part.delta.any()
        }
        self.deltas = {name: d.detach().clone() for name, part in self.parts.items() if (d := part.delta) is not None}
        batches = (batch for problem in problems.values() for batch in problem.val.batches(None))
        self.val = gather(self.model, batches, self.stage, self.deltas)

    def cut(self, mode: Mode, rank: int, batches: int, seed: int) -> Cut:
        """Cut with moments, and for `loss` gradients, of so many batches of each task."""
        base.SAMPLED, base.LEAST = 0, batches
        context = replace(self.context, seed=seed)
        moments = gather(self.model, (batch for _, batch in context.sampled("truncation")), self.stage, self.deltas)
        squares = squared_gradients(context, self.parts) if mode == "loss" else {}
        with torch.no_grad():
            found = truncate(self.deltas, Plan(mode=mode, rank=rank), moments, squares=squares)
            return Cut(self._error(found), self._loss(found))

    def whole(self) -> float:
        """Mean validation loss with the update as it was trained."""
        return self._mean(self.model)

    def _error(self, found: Mapping[str, Truncated]) -> float:
        errors = []
        for name, delta in self.deltas.items():
            moment = self.val.get(name)
            if moment is None or moment.one_hot:
                continue
            part = found[name].part
            kept = torch.zeros_like(delta) if part is None else part if isinstance(part, Tensor) else part.dense()
            errors.append((_energy(delta - kept.view_as(delta), moment) / _energy(delta, moment)) ** 0.5)
        return float(np.mean(errors))

    def _loss(self, found: Mapping[str, Truncated]) -> float:
        model = copy.deepcopy(self.model)
        parts = dict(growables(model))
        for name, got in found.items():
            part = parts[name]
            assert isinstance(part, StackedMatrix)
            part.compress(got.part)
        return self._mean(model)

    def _mean(self, model: Flame) -> float:
        return float(np.mean([validate(model, problem)["loss"] for problem in self.context.problems.values()]))


def _energy(change: Tensor, moment: Moment) -> float:
    """Mean over the inputs of what a change of a stack of matrices does to its outputs, squared."""
    each = zip(moment.seen, change.reshape(-1, *change.shape[-2:]).double(), moment.second, strict=True)
    return float(sum(float(n) * energy_of(matrix, second) for n, matrix, second in each) / moment.seen.sum())


def main(path: str, place: str) -> None:
    torch.set_num_threads(1)
    recipe, store = Recipe.load(path), Store.open(place)
    first, second = stages_of(recipe)
    learner = Learner(recipe)
    learner.learn(store, first)

    def before_commit(learner: Learner) -> None:
        trial = Trial(learner, store)
        print(f"tasks {', '.join(second.tasks)}; validation loss with the whole update {trial.whole():.5f}")
        print("rank  mode        " + "".join(f"{n:>5} of each task " for n in BATCHES))
        for rank in RANKS:
            for mode in MODES:
                cells = []
                for n in BATCHES:
                    cuts = [trial.cut(mode, rank, n, seed) for seed in range(DRAWS)]
                    error, loss = (float(np.mean(values)) for values in zip(*cuts, strict=True))
                    cells.append(f"  {error:.4f}  {loss:.5f}")
                print(f"{rank:<6}{mode:<12}" + "".join(cells), flush=True)

    learner.learn(store, second, before_commit=before_commit)


if __name__ == "__main__":
    main(*sys.argv[1:])
