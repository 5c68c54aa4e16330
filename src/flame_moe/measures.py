"""What a task x stage table says of continual learning, each number with its formula.

R[i, s] is the metric of task i after stage s, t_i the stage that learned the task, T the last stage (0-based). For
errors (brier, ece, rmse, mae) signs are turned where a difference is taken, so that forgetting is positive and transfer
negative when things got worse.

Missing entries: a task that has no value of the metric at any stage (AUROC of a regression task) does not belong to the
measure. Any other entry that a measure needs and that is missing makes its value NaN, for the task and in the mean: a
mean over fewer tasks than another method has would not compare with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flame_moe.progression import Progression
from flame_moe.results import LOWER_IS_BETTER, Drift

AVERAGE = "average"
BACKWARD = "backward transfer"
FORGETTING = "forgetting"
FORWARD = "forward transfer"
DRIFT = "logit drift"
SEPARATE = "separate"
"""Name of the method that gives every later task a network of its own: what forward transfer is measured against."""
FORMULAS = {
    AVERAGE: "mean over i of R[i, T]",
    BACKWARD: "mean over i with t_i < T of R[i, T] - R[i, t_i]",
    FORGETTING: "mean over i with t_i < T of max over t_i <= s < T of R[i, s] - R[i, T]",
    FORWARD: "mean over i with t_i > 0 of R[i, t_i] - S[i], S[i]: a network of its own, equal budget",
    DRIFT: "max over i, t_i < s <= T and samples of |logit after s - logit after t_i|",
}
"""Measure -> its formula, as it is printed beside the number."""


class Measure(NamedTuple):
    """One number about a stream.

    Attributes:
        name: a key of `FORMULAS`.
        value: NaN where it does not exist.
        tasks: how many tasks it speaks of.
    """

    name: str
    value: float
    tasks: int

    @property
    def formula(self) -> str:
        """How the value is computed."""
        return FORMULAS[self.name]


def measures(
    table: Progression, *, alone: Mapping[str, float] | None = None, drift: Sequence[Drift] = ()
) -> tuple[Measure, ...]:
    """All measures of one method, in the order of `FORMULAS`; forward transfer and drift only where they were measured.

    Args:
        table: of one metric.
        alone: task -> the same metric of a network of its own, from scratch, with the data and steps of the stage.
        drift: what was measured of the logits.

    Example:
        >>> R = np.array([[0.9, 0.8], [np.nan, 0.7]])
        >>> table = Progression("auroc", ("a", "b"), (0, 1), R, R, R)
        >>> [(m.name, round(m.value, 3), m.tasks) for m in measures(table)]
        [('average', 0.75, 2), ('backward transfer', -0.1, 1), ('forgetting', 0.1, 1)]
    """
    found = [
        _mean(AVERAGE, last(table)),
        _mean(BACKWARD, backward_transfer(table)),
        _mean(FORGETTING, forgetting(table)),
    ]
    if alone is not None:
        found.append(_mean(FORWARD, forward_transfer(table, alone)))
    if drift:
        found.append(Measure(DRIFT, largest_drift(drift), len({row.task for row in drift})))
    return tuple(found)


def last(table: Progression) -> dict[str, float]:
    """R[i, T] of each task that has the metric."""
    return {task: float(table.values[i, -1]) for i, task, _ in _tasks(table)}


def backward_transfer(table: Progression) -> dict[str, float]:
    """What later stages did to each earlier task: R[i, T] - R[i, t_i] (Lopez-Paz and Ranzato 2017, eq. 3, per task).

    Negative is forgetting. Tasks of the last stage have no later stage and are left out.
    """
    return {
        task: float(_sign(table) * (table.values[i, -1] - table.values[i, learned]))
        for i, task, learned in _tasks(table)
        if learned < table.values.shape[1] - 1
    }


def forgetting(table: Progression) -> dict[str, float]:
    """How far each earlier task fell from its best: max over t_i <= s < T of R[i, s], minus R[i, T].

    Chaudhry et al. 2018, eq. 3. 0 or negative is no forgetting. Tasks of the last stage are left out.
    """
    return {
        task: float((_sign(table) * table.values[i, learned:-1]).max() - _sign(table) * table.values[i, -1])
        for i, task, learned in _tasks(table)
        if learned < table.values.shape[1] - 1
    }


def forward_transfer(table: Progression, alone: Mapping[str, float]) -> dict[str, float]:
    """What earlier stages gave to each later task: R[i, t_i] - S[i]; tasks of the first stage are left out.

    Args:
        alone: S, by task: a network of its own that learned it from scratch with the data and steps of the stage.
    """
    return {
        task: float(_sign(table) * (table.values[i, learned] - alone.get(task, math.nan)))
        for i, task, learned in _tasks(table)
        if learned > 0
    }


def largest_drift(rows: Sequence[Drift]) -> float:
    """Largest absolute change of any logit of any task since the stage that learned it; NaN where none was measured."""
    return max((row.max_abs_logit_change for row in rows), default=math.nan)


def _tasks(table: Progression) -> list[tuple[int, str, int]]:
    """(row, name, t_i) of the tasks that have the metric at all."""
    rows = enumerate(zip(table.tasks, table.learned, strict=True))
    return [(i, task, stage) for i, (task, stage) in rows if not np.isnan(table.values[i]).all()]


def _mean(name: str, values: Mapping[str, float]) -> Measure:
    return Measure(name, sum(values.values()) / len(values) if values else math.nan, len(values))


def _sign(table: Progression) -> float:
    return -1.0 if table.metric in LOWER_IS_BETTER else 1.0
