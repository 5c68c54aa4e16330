"""What the literature of continual instruction tuning reports of a matrix R[i, s], beside `flame_moe.measures`.

AP, also Last, is that module's average; BWT its backward transfer, over the T - 1 tasks that have a later one.
"""

from __future__ import annotations

import numpy as np

from flame_moe.measures import AVERAGE, BACKWARD, FORGETTING, FORMULAS, measures
from flame_moe.progression import Progression

FINE_TUNE = "mean fine-tune"
MEAN_AVERAGE = "mean average"
ANSWER_FORMULAS = {
    AVERAGE: f"AP, Last: {FORMULAS[AVERAGE]}",
    FINE_TUNE: "MFT: mean over i of R[i, t_i]",
    MEAN_AVERAGE: "MAA: mean over s of the mean over t_i <= s of R[i, s]",
    BACKWARD: f"BWT: {FORMULAS[BACKWARD]}",
    FORGETTING: FORMULAS[FORGETTING],
}
"""Measure -> its formula (CoIN, arXiv 2403.08350; MLLM-CTBench and MCITlib use the same)."""


def answer_measures(table: Progression) -> dict[str, float]:
    """Every measure of `ANSWER_FORMULAS`.

    Example:
        >>> R = np.array([[0.9, 0.5], [np.nan, 0.7]])
        >>> {k: round(v, 3) for k, v in answer_measures(Progression("accuracy", ("a", "b"), (0, 1), R, R, R)).items()}
        {'average': 0.6, 'mean fine-tune': 0.8, 'mean average': 0.75, 'backward transfer': -0.4, 'forgetting': 0.4}
    """
    found = {m.name: m.value for m in measures(table)}
    learned = np.array(table.learned)
    own = table.values[np.arange(len(learned)), learned]
    by_stage = [float(table.values[learned <= s, s].mean()) for s in range(table.values.shape[1])]
    found |= {FINE_TUNE: float(own.mean()), MEAN_AVERAGE: float(np.mean(by_stage))}
    return {name: found[name] for name in ANSWER_FORMULAS}
