"""What happened to each task as later stages came: the task x stage table R[i, s], metric of task i after stage s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_moe.results import Evaluation, Results


class Progression(NamedTuple):
    """A task x stage table.

    Attributes:
        metric: what the values are.
        tasks: names, in the order in which they were learned.
        learned: t_i, the stage in which each task was learned.
        values: (tasks, stages), NaN where the task was not evaluated.
        low, high: bounds of the 95 % interval, NaN where there is none.
    """

    metric: str
    tasks: tuple[str, ...]
    learned: tuple[int, ...]
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def progression(
    results: Results, metric: str, *, split: str = "test", evaluations: Sequence[Evaluation] | None = None
) -> Progression:
    """Committed values of a metric for every task after every stage.

    Args:
        evaluations: those of a `Comparison`; default those of the run itself.
    """
    tasks = tuple(task for stage in results.stages for task in stage.tasks)
    row = {task: i for i, task in enumerate(tasks)}
    values, low, high = np.full((3, len(tasks), len(results.stages)), np.nan)
    for e in results.evaluations if evaluations is None else evaluations:
        if e.split == split and e.phase == "committed" and metric in e.metrics and e.task in row:
            place = row[e.task], e.after_stage
            values[place] = e.metrics[metric]
            low[place], high[place] = e.ci.get(metric, (np.nan, np.nan))
    return Progression(metric, tasks, tuple(results.learned_in(task) for task in tasks), values, low, high)
