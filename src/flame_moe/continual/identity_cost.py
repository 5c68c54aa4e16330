"""What it costs not to be told the task: how often the right group is chosen, and each task's metric either way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flame_moe.continual.identity import Group
from flame_moe.continual.learner import Learner
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from flame_moe.schema import Task
from flame_moe.training.metrics import PRIMARY, evaluate_predictions
from flame_moe.training.seeding import generator

RESAMPLES, MARGIN = 200, 0.1


@dataclass(frozen=True)
class TaskCost:
    """One task on one split.

    Attributes:
        task, n: which, and how many labelled samples.
        accuracy: share of them for which the task's group was chosen.
        metric: name of the primary metric of the task's kind.
        known, chosen: its value when the task is told, and when it is not.
    """

    task: str
    n: int
    accuracy: float
    metric: str
    known: float
    chosen: float


@dataclass(frozen=True)
class IdentityCost:
    """All groups that have labelled samples in a split.

    Attributes:
        split: which.
        groups: their names.
        accuracy: mean over groups of the share of its samples for which it was chosen.
        interval: 95 %, percentile bootstrap over subjects.
        confusion: (groups, groups) shares; row: the group that is right, column: the one that was chosen.
        tasks: see there.
    """

    split: str
    groups: tuple[str, ...]
    accuracy: float
    interval: tuple[float, float]
    confusion: NDArray[np.float64]
    tasks: tuple[TaskCost, ...]

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1.0 / len(self.groups)

    @property
    def told_apart(self) -> bool:
        """Whether at least a tenth of what guessing gets wrong is got right, at the lower end of the interval.

        Of many samples even a choice of no use is better than guessing, beyond doubt and by nothing.
        """
        return self.interval[0] > self.chance + MARGIN * (1.0 - self.chance)

    @property
    def sentence(self) -> str:
        """The finding in words."""
        if len(self.groups) == 1:
            return "There is one group, so nothing to choose."
        said = (
            f"{self.accuracy:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f}; guessing gives {self.chance:.3f})"
        )
        if not self.told_apart:
            return f"The groups cannot be told apart by their samples: accuracy {said}. Name the task."
        return f"The right group is chosen with a mean accuracy of {said}."


def identity_cost(learner: Learner, store: Store, split: str = "test") -> IdentityCost:
    """Choose for every labelled sample of a split, and compare with being told.

    A sample is right for a group if it has a label for one of its tasks; one that has labels in two groups counts once
    in each. Where another group is chosen, the answer to the task is that of the chosen group's only task of the same
    kind and classes, if there is one, else what is known without looking: the base rate of the training labels.

    Raises:
        DataError: if the model keeps nothing to choose by, or no task has a labelled sample in the split.
    """
    indices = {
        name: found
        for name, task in learner.tasks.items()
        if name in store.tasks and len(found := store.indices(name, split, modalities=task.modalities))
    }
    if not indices:
        raise DataError(f"the {split} split has no labelled sample", where=str(store.path), mend="Name another split.")
    every = np.unique(np.concatenate(list(indices.values())))
    chosen = learner.choose(store, every).group
    of = np.full(len(store), -1)
    of[every] = chosen
    right = {g: each for g, group in enumerate(learner.groups) if len(each := _samples(group, indices))}
    hits = {g: of[each] == g for g, each in right.items()}
    subjects = {g: np.array(store.subjects(each)) for g, each in right.items()}
    return IdentityCost(
        split,
        tuple(learner.groups[g].name for g in right),
        float(np.mean([hit.mean() for hit in hits.values()])),
        _interval(hits, subjects),
        np.array([[float((of[each] == h).mean()) for h in right] for each in right.values()]),
        tuple(_task_cost(learner, store, name, own, of[own]) for name, own in indices.items()),
    )


def _samples(group: Group, indices: dict[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    own = [indices[name] for name in group.tasks if name in indices]
    return np.unique(np.concatenate(own)) if own else np.empty(0, dtype=np.int64)


def _interval(hits: dict[int, NDArray[np.bool_]], subjects: dict[int, NDArray[np.str_]]) -> tuple[float, float]:
    people = np.unique(np.concatenate(list(subjects.values())))
    at = {g: np.searchsorted(people, names) for g, names in subjects.items()}
    random, means = generator(0, "identity"), []
    for _ in range(RESAMPLES):
        times = np.bincount(random.integers(0, len(people), len(people)), minlength=len(people))
        shares = [np.average(hit, weights=w) for g, hit in hits.items() if (w := times[at[g]]).any()]
        means.append(float(np.mean(shares)))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _task_cost(
    learner: Learner, store: Store, name: str, indices: NDArray[np.int64], chosen: NDArray[np.int64]
) -> TaskCost:
    task = learner.tasks[name]
    got = learner.predict(store, name, indices)
    own = next(g for g, group in enumerate(learner.groups) if name in group.tasks)
    values = got.values.copy()
    values[chosen != own] = _base_rate(learner, task)
    for g in np.unique(chosen[chosen != own]):
        alike = [t for t in learner.groups[g].tasks if _same_question(learner.tasks[t], task)]
        if len(alike) == 1:
            some = np.logical_or.reduce([store.present(m)[indices] for m in learner.tasks[alike[0]].modalities])
            rows = np.flatnonzero((chosen == g) & some)
            if len(rows):
                values[rows] = learner.predict(store, alike[0], indices[rows]).values
    metric = PRIMARY[task.kind]
    target = got.target[:, 0] if task.kind in ("binary", "multiclass") else got.target
    known, without = (
        evaluate_predictions(task.kind, target, v, classes=task.classes, bootstrap=0).metrics[metric]
        for v in (got.values, values)
    )
    return TaskCost(name, len(indices), float((chosen == own).mean()), metric, known, without)


def _same_question(one: Task, other: Task) -> bool:
    return (one.kind, one.classes) == (other.kind, other.classes)


def _base_rate(learner: Learner, task: Task) -> NDArray[np.float64]:
    if task.kind == "regression":
        return learner.preprocessor.target_scale(task.name)[0].astype(np.float64)
    counts = learner.preprocessor.class_counts(task.name).astype(np.float64)
    shares = counts / counts.sum(axis=0)
    return np.asarray(shares if task.kind == "multiclass" else shares[1])
