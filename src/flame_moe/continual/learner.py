"""The stage protocol: learn a stage, predict, save, load, and learn another stage on a model that was saved."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from flame_moe.continual import saving
from flame_moe.continual.admission import insist_on_samples, resolve_task, unlike
from flame_moe.continual.identity import Choice, Encoders, Group, choose, fit_groups
from flame_moe.continual.methods import StageContext, concludes, make_method
from flame_moe.continual.rounds import Progress, Saved, compress, train
from flame_moe.continual.stages import LearnedStage, count_trainable
from flame_moe.continual.warm import Fingerprint, WarmStart, choose_source, fingerprint, start_warm
from flame_moe.data.loader import Loader
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.pretrained import starting_weights
from flame_moe.data.store import Store
from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.nn.losses import class_weights
from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig, Modality, Recipe, Stage, Task
from flame_moe.training.checkpoint import hash_tensors
from flame_moe.training.engine import Prediction, predict
from flame_moe.training.monitor import Monitor
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import seed_torch
from flame_moe.training.state import put


class Learner:
    """A model, the method by which it learns, and everything needed to go on learning later.

    Attributes:
        recipe: what it was made from.
        model: the network.
        preprocessor: statistics of the training data each modality and task was first learned on.
        stages: what was learned so far, in order.
        groups: what the training samples of each stage look like, kept with identity = true (see `choose`).
        variants: after a stage with select = "per_task": a learner per task, at that task's own best epoch.

    Example:
        learner = Learner(recipe)
        learner.learn(store, recipe.stages[0])
        learner.save("model")
        later = Learner.load("model")
        later.learn(store, Stage(tasks=("readmission",)))
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.method = make_method(recipe.method)
        # The shared experts are drawn here, before any stage: without a seed of their own no run would repeat.
        seed_torch(recipe.seed, "experts")
        self.model = Flame(recipe.model)
        self.preprocessor = Preprocessor({}, {})
        self.stages: list[LearnedStage] = []
        self.groups: list[Group] = []
        self.variants: dict[str, Learner] = {}

    @property
    def tasks(self) -> dict[str, Task]:
        """Tasks learned so far."""
        return self.model.tasks

    def cursor(self, task: str) -> int:
        """The stage at whose weights a task is read.

        Raises:
            RecipeError: if the task was not learned.
        """
        for stage in self.stages:
            if task in stage.tasks:
                return stage.index
        raise RecipeError(f"the model has no task '{task}'", mend=nearest(task, self.tasks))

    def resolve(self, store: Store, stage: Stage) -> tuple[list[Task], list[Modality]]:
        """The tasks of a stage as the recipe wants them, and the modalities they read; changes nothing.

        Raises:
            FlameError: if a task or modality does not exist, was learned before, or does not fit what is known.
        """
        tasks = [resolve_task(self.recipe, store, name) for name in stage.tasks]
        for task in tasks:
            if task.name in self.tasks:
                raise RecipeError(f"task '{task.name}' was learned in stage {self.cursor(task.name)}", where="stages")
            insist_on_samples(store, task)
        names = list(dict.fromkeys(name for task in tasks for name in task.modalities))
        self._insist_on_modalities(store, names)
        return tasks, [store.modalities[name] for name in names]

    def learn(
        self,
        store: Store,
        stage: Stage,
        *,
        monitor: Monitor | None = None,
        state_folder: Path | None = None,
        before_commit: Callable[[Learner], None] | None = None,
        earlier: Mapping[str, Store] | None = None,
    ) -> LearnedStage:
        """Learn the next stage: add what it needs, train, keep the epoch that validates best, commit.

        Args:
            store: samples of the stage's tasks. Modalities known from before keep their first statistics.
            stage: which tasks.
            monitor: who is told of progress.
            state_folder: where to save the state after every epoch; if it holds one, training goes on from there.
            before_commit: called when the model is trained but not yet compressed.
            earlier: task of an earlier stage -> the store of its samples, for methods that read some of them again;
                default `store`.

        Raises:
            FlameError: before anything changes, if the stage does not fit; during training, on a non-finite loss.
                Whatever ends a stage early, the learner is afterwards what it was before.
        """
        tasks, modalities = self.resolve(store, stage)
        self.method.rounds(len(self.stages), stage.settings(self.recipe.train).epochs)
        again = self._earlier({name: (earlier or {}).get(name, store) for name in self.tasks})
        before = (copy.deepcopy((self.model, self.method)), self.preprocessor, list(self.stages), self.variants)
        try:
            context, progress = self._train(store, stage, tasks, modalities, again, monitor or Monitor(), state_folder)
            commits, changes = progress.commits, progress.changes
            if not progress.compressed:
                if before_commit is not None:
                    before_commit(self)
                commits, changes = compress(self.method, context)
            commits = [*commits, *self.method.commit(self.model, context.stage)]
            prints = self._fingerprints(store, stage.tasks) if self.recipe.method.warm_start else {}
            groups = fit_groups(self._encoders(), store, tasks, context.stage) if self.recipe.identity else []
        except BaseException:
            (self.model, self.method), self.preprocessor, self.stages, self.variants = before
            raise
        record = replace(self.stages[-1], commits=tuple(commits), changes=tuple(changes))
        self.stages[-1] = replace(record, fingerprints=prints)
        self.groups += groups
        return self.stages[-1]

    def _train(
        self,
        store: Store,
        stage: Stage,
        tasks: list[Task],
        modalities: list[Modality],
        earlier: Mapping[str, Problem],
        monitor: Monitor,
        state_folder: Path | None,
    ) -> tuple[StageContext, Progress]:
        """Everything of a stage but its commit."""
        began = time.perf_counter()
        base = "" if state_folder is None else hash_tensors(self.model.state_dict())
        index, config = len(self.stages), stage.settings(self.recipe.train)
        new = [m for m in modalities if m.name not in self.model.modalities]
        self._adopt(store, new, tasks)
        problems = {task.name: self._problem(store, task, index) for task in tasks}
        seed_torch(self.recipe.seed, "initial", index)
        names = [m.name for m in modalities]
        self.method.add(self.model, index, tasks, names, new)
        for modality in new:
            if modality.pretrained is not None:
                self.model.start_from(modality.name, starting_weights(modality.pretrained, modality.name))
        warm = self._start_warm(store, index, tasks) if self.recipe.method.warm_start else ()
        self.method.begin(self.model, index, stage.tasks, names)
        context = self._context(index, stage.tasks, names, [m.name for m in new], problems, earlier)
        # What was added is on the processor, what trained before may not be.
        self.model.to(next(self.model.parameters()).device)
        self.method.prepare(context)
        trainable = count_trainable(self.model)
        fitted, progress = train(
            self.method, context, config, saved=Saved(state_folder, index, stage.tasks, base), monitor=monitor
        )
        record = LearnedStage(
            index,
            stage.tasks,
            tuple(names),
            tuple(m.name for m in new),
            trainable,
            len(fitted.history),
            fitted.best_epoch,
            time.perf_counter() - began,
            tuple(fitted.history),
            warm=warm,
        )
        self.stages.append(record)
        variants = {task: self._variant(weights, context, progress) for task, weights in fitted.per_task.items()}
        self.variants = variants
        self.method.conclude(context)
        return context, progress

    def predict(self, store: Store, task: str, indices: ArrayLike, batch_size: int | None = None) -> Prediction:
        """What the model says of some samples of a store for one task, read at the task's own cursor."""
        cursor, description = self.cursor(task), self.tasks[task]
        self._insist_on_modalities(store, description.modalities)
        size = batch_size or max(self.recipe.train.batch_size, 256)
        loader = Loader(store, self.preprocessor, description, np.asarray(indices), size)
        return predict(self.model, loader.batches(None), description, cursor, self._scale(description))

    def choose(self, store: Store, indices: ArrayLike) -> Choice:
        """The group of `groups` that each sample belongs to, by what it has and looks like; see `continual.identity`.

        Raises:
            DataError: if the model keeps nothing to choose by, or a sample has no modality that any task reads.
        """
        if not self.groups:
            mend = "Learn with identity = true in the recipe, or name the task."
            raise DataError("the model keeps nothing to choose a task by", where="identity", mend=mend)
        self._insist_on_modalities(store, self.model.modalities)
        return choose(self.groups, self.tasks, self._encoders(), store, indices)

    def with_method(self, method: MethodConfig, store: Store | None = None) -> Learner:
        """A copy that goes on by another method; after the first stage all methods stand at the same model.

        Args:
            method: the other method.
            store: samples of the first stage, for methods that conclude something from them.

        Raises:
            FlameError: after more than one stage, for an unknown method, or without samples that it needs.
        """
        if len(self.stages) > 1:
            what = f"{len(self.stages)} stages were learned by '{self.method.name}'; methods part after the first"
            raise RecipeError(what, mend="Take a learner that has learned one stage.")
        twin = copy.deepcopy(self)
        twin.recipe = self.recipe.model_copy(update={"method": method})
        twin.method = make_method(method)
        if self.stages and (concludes(twin.method) or method.warm_start):
            if store is None:
                raise DataError(
                    f"the method '{method.name}' concludes from the first stage's samples", mend="Give them."
                )
            first = self.stages[0]
            problems = {name: twin._problem(store, twin.tasks[name], 0) for name in first.tasks}
            twin.method.conclude(twin._context(0, first.tasks, first.modalities, first.new_modalities, problems, {}))
        if twin.stages:
            twin.stages[0] = replace(twin.stages[0], commits=tuple(twin.method.commit(twin.model, 0)))
        if self.stages and method.warm_start and store is not None:
            twin.stages[0] = replace(twin.stages[0], fingerprints=twin._fingerprints(store, self.stages[0].tasks))
        return twin

    def save(self, folder: str | Path) -> Path:
        """Write the model atomically: safetensors and a JSON manifest (see `continual.saving`)."""
        return saving.save(self, folder)

    @classmethod
    def load(cls, folder: str | Path) -> Learner:
        """Read what `save` wrote, strictly; nothing in the file is executed.

        Raises:
            CheckpointError: if it is missing, damaged, of another version, or does not fit the model it describes.
        """
        return saving.load(cls, folder)

    def _encoders(self) -> Encoders:
        born = {name: stage.index for stage in self.stages for name in stage.new_modalities}
        return Encoders(self.model, self.preprocessor, born)

    def _fingerprints(self, store: Store, tasks: Iterable[str]) -> dict[str, Fingerprint]:
        every = [(self.tasks[name], self.cursor(name)) for name in tasks]
        return {
            task.name: fingerprint(self.model, self.preprocessor, store, task, task, task.modalities, cursor)
            for task, cursor in every
        }

    def _start_warm(self, store: Store, index: int, tasks: list[Task]) -> tuple[WarmStart, ...]:
        known = {name: each for stage in self.stages for name, each in stage.fingerprints.items()}
        cursors = {name: self.cursor(name) for name in known}
        starts = [choose_source(self.model, self.preprocessor, store, task, known, cursors) for task in tasks]
        start_warm(self.model, index, starts, cursors)
        return tuple(starts) if index > 0 else ()

    def _insist_on_modalities(self, store: Store, names: Iterable[str]) -> None:
        """Refuse a store in which a modality that the model knows is something else."""
        for name in names:
            known, here = self.model.modalities.get(name), store.modalities.get(name)
            change = None if known is None or here is None else unlike(known, here)
            if change is not None:
                mend = "Give it another name, or prepare it as before."
                raise DataError(f"modality '{name}' {change}", where=str(store.path), mend=mend)

    def _adopt(self, store: Store, new: list[Modality], tasks: list[Task]) -> None:
        """Take the statistics of new modalities and tasks from the store; known ones keep theirs."""
        fitted = Preprocessor.from_store(store)
        scalers = {m.name: fitted.scalers[m.name] for m in new}
        labels = {task.name: fitted.labels[task.name] for task in tasks}
        self.preprocessor = Preprocessor(
            {**self.preprocessor.scalers, **scalers}, {**self.preprocessor.labels, **labels}
        )

    def _context(
        self,
        index: int,
        tasks: Iterable[str],
        modalities: Iterable[str],
        new: Iterable[str],
        problems: Mapping[str, Problem],
        earlier: Mapping[str, Problem],
    ) -> StageContext:
        cursors = {name: stage.index for stage in self.stages for name in stage.tasks} | dict.fromkeys(tasks, index)
        names = (tuple(tasks), tuple(modalities), tuple(new))
        size, seed = self.recipe.train.batch_size, self.recipe.seed
        return StageContext(self.model, index, *names, problems, earlier, cursors, size, seed)

    def _earlier(self, stores: Mapping[str, Store]) -> dict[str, Problem]:
        """Problems of earlier tasks on the training samples that the method may read again."""
        found = {}
        for name, store in stores.items():
            if not (self.method.rereads or name in self.method.memory):
                continue
            lost = f"the method '{self.method.name}' reads samples of '{name}' again, and the store lacks "
            if name not in store.tasks:
                raise DataError(f"{lost}the task", where=str(store.path), mend="Give the store of the task.")
            problem = self._problem(store, self.tasks[name], self.cursor(name))
            if not self.method.rereads:
                place = dict(zip(store.ids(problem.train.indices), problem.train.indices, strict=True))
                missing = [i for i in self.method.memory[name] if i not in place]
                if missing:
                    raise DataError(f"{lost}sample '{missing[0]}'", where=str(store.path), mend="Give the old store.")
                kept = np.array([place[i] for i in self.method.memory[name]], dtype=np.int64)
                problem = replace(problem, train=replace(problem.train, indices=kept))
            found[name] = problem
        return found

    def _problem(self, store: Store, task: Task, cursor: int) -> Problem:
        size = self.recipe.train.batch_size
        train, val = (
            Loader(store, self.preprocessor, task, store.indices(task.name, split, modalities=task.modalities), n)
            for split, n in (("train", size), ("val", max(size, 256)))
        )
        weight = None
        if task.kind != "regression":
            weight = class_weights(task, torch.as_tensor(self.preprocessor.class_counts(task.name)).float())
        return Problem(task, cursor, train, val, self._scale(task), weight)

    def _scale(self, task: Task) -> Any:
        return self.preprocessor.target_scale(task.name) if task.kind == "regression" else None

    def _variant(self, weights: Mapping[str, torch.Tensor], context: StageContext, progress: Progress) -> Learner:
        twin = copy.deepcopy(self)
        put(twin.model, weights)
        own = replace(context, model=twin.model)
        twin.method.conclude(own)
        if not progress.compressed:
            twin.method.compress(own)
        twin.method.commit(twin.model, len(twin.stages) - 1)
        return twin
