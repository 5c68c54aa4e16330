"""What happened to each task as later stages came: the task x stage table, backward transfer and forgetting.

R[i, s] is the metric of task i on the split after stage s, t_i the stage in which task i was learned, T the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flame_moe.results import LOWER_IS_BETTER, Evaluation, Results


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


def backward_transfer(table: Progression) -> dict[str, float]:
    """What later stages did to each earlier task: R[i, T] - R[i, t_i] (Lopez-Paz and Ranzato 2017, eq. 3, per task).

    Negative is forgetting. For errors (brier, ece, rmse, mae) the sign is turned, so that positive is always better.
    Tasks of the last stage have no later stage and are left out.
    """
    return {
        task: float(_sign(table) * (table.values[i, -1] - table.values[i, learned]))
        for i, (task, learned) in enumerate(zip(table.tasks, table.learned, strict=True))
        if learned < table.values.shape[1] - 1
    }


def forgetting(table: Progression) -> dict[str, float]:
    """How far each earlier task fell from its best: max over t_i <= s < T of R[i, s], minus R[i, T].

    Chaudhry et al. 2018, eq. 3; for errors, the last value minus the least. 0 or negative is no forgetting. Tasks of
    the last stage are left out; NaN where the task was never evaluated before the last stage.
    """
    fallen = {}
    for i, (task, learned) in enumerate(zip(table.tasks, table.learned, strict=True)):
        if learned < table.values.shape[1] - 1:
            earlier = _sign(table) * table.values[i, learned:-1]
            known = earlier[~np.isnan(earlier)]
            best = known.max() if len(known) else np.nan
            fallen[task] = float(best - _sign(table) * table.values[i, -1])
    return fallen


def _sign(table: Progression) -> float:
    return -1.0 if table.metric in LOWER_IS_BETTER else 1.0
