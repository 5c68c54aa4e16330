"""Intervals over subjects and seeds: every row of the table is measured on the same resamples.

A resample draws test subjects with replacement, with all their samples in every task, and seeds with replacement. Three
seeds are few: the part of an interval that comes from training is then told roughly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.store import Store
from flame_moe.experiments.streams.cells import Predictions
from flame_moe.measures import Measure, measures
from flame_moe.progression import Progression
from flame_moe.recorder import metric_target
from flame_moe.schema import Recipe
from flame_moe.training import weighted
from flame_moe.training.checks import checked
from flame_moe.training.metrics import CELLS_AT_ONCE, MEASURES

Array = NDArray[np.float64]
Sampled = dict[str, Array]
"""Measure -> (1 + resamples,): of the test split as it is, then of its resamples."""


@dataclass(frozen=True)
class Resampling:
    """Resamples of the test subjects of a stream.

    Attributes:
        store: the samples.
        stream: its tasks in their stages.
        resamples: how many.
    """

    store: Store
    stream: Recipe
    resamples: int = 1000

    @property
    def tasks(self) -> tuple[str, ...]:
        """In the order in which they are learned."""
        return tuple(name for stage in self.stream.stages for name in stage.tasks)

    @property
    def learned(self) -> tuple[int, ...]:
        """The stage of each task."""
        return tuple(s for s, stage in enumerate(self.stream.stages) for _ in stage.tasks)

    def matrices(self, predictions: Predictions) -> dict[str, Array]:
        """Metric -> R (tasks, stages, 1 + resamples), NaN where a task was not measured or lacks the metric."""
        shape = (len(self.tasks), len(self.stream.stages), 1 + self.resamples)
        found: dict[str, Array] = {}
        for i, task in enumerate(self.tasks):
            before: tuple[NDArray[np.float64], dict[str, Array]] | None = None
            for s in range(self.learned[i], shape[1]):
                if (s, task) not in predictions:
                    continue
                values = predictions[s, task]
                if before is None or not np.array_equal(before[0], values):
                    before = values, self._metrics(task, values)
                for metric, column in before[1].items():
                    found.setdefault(metric, np.full(shape, np.nan))[i, s] = column
        return found

    def measures(self, matrix: Array, metric: str, alone: Array | None = None) -> Sampled:
        """Every measure of a matrix R of `matrices`, on each resample.

        Args:
            matrix: (tasks, stages, 1 + resamples).
            metric: what its values are.
            alone: the same of the method that gives each task a network of its own.
        """
        columns = [self._measure(matrix, metric, alone, r) for r in range(1 + self.resamples)]
        return {m.name: np.array([column[k].value for column in columns]) for k, m in enumerate(columns[0])}

    def seeds(self, count: int) -> Array:
        """(1 + resamples, count) weights of the seeds: equal, then as often as each is drawn; rows sum to 1."""
        drawn = weighted.resample(count, self.resamples, np.random.default_rng(count))
        return np.concatenate([np.ones((1, count)), drawn]) / count

    def over_seeds(self, each: Sequence[Array]) -> Array:
        """Mean over seeds, on resampled seeds and subjects together: (1 + resamples,)."""
        stacked = np.stack(each, axis=1)
        return np.asarray((stacked * self.seeds(len(each))).sum(axis=1))

    def _measure(self, matrix: Array, metric: str, alone: Array | None, r: int) -> tuple[Measure, ...]:
        gap = np.full(matrix.shape[:2], np.nan)
        table = Progression(metric, self.tasks, self.learned, matrix[:, :, r], gap, gap)
        scratch: Mapping[str, float] | None = None
        if alone is not None:
            scratch = {task: float(alone[i, self.learned[i], r]) for i, task in enumerate(self.tasks)}
        return measures(table, alone=scratch)

    def _metrics(self, task: str, values: NDArray[np.float64]) -> dict[str, Array]:
        """Metric -> (1 + resamples,) of one task."""
        description = self.store.tasks[task]
        indices, subject = self._samples[task]
        target = metric_target(description, self.store.target(task, indices))
        y, p = checked(description.kind, target, values, len(description.classes))
        parts = []
        at_once = max(1, CELLS_AT_ONCE // len(y))
        for start in range(0, 1 + self.resamples, at_once):
            parts.append(MEASURES[description.kind](y, p, self._counts[start : start + at_once][:, subject]))
        return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}

    @cached_property
    def _samples(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.intp]]]:
        """Task -> its test samples, and the place of each one's subject."""
        rows = {t: self.store.indices(t, "test", modalities=self._reads(t)) for t in self.tasks}
        everyone = sorted({subject for indices in rows.values() for subject in self.store.subjects(indices)})
        place = {subject: i for i, subject in enumerate(everyone)}
        return {t: (found, np.array([place[s] for s in self.store.subjects(found)])) for t, found in rows.items()}

    @cached_property
    def _counts(self) -> Array:
        """(1 + resamples, subjects) how often each is drawn; the first row is the split as it is."""
        subjects = 1 + max(int(place.max()) for _, place in self._samples.values())
        drawn = weighted.resample(subjects, self.resamples, np.random.default_rng(0))
        return np.concatenate([np.ones((1, subjects)), drawn])

    def _reads(self, task: str) -> tuple[str, ...]:
        changed = self.stream.tasks.get(task)
        own = self.store.tasks[task].modalities
        return own if changed is None or changed.modalities is None else changed.modalities


def interval(values: Array) -> tuple[float, float]:
    """95 % percentile interval over the resamples in which the number exists; NaN where it exists in none."""
    drawn = values[1:][~np.isnan(values[1:])]
    if len(drawn) == 0:
        return np.nan, np.nan
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
