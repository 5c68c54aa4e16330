"""Refusal of targets and predictions that cannot be scored, in one sentence that names the place."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flame_moe.errors import DataError
from flame_moe.schema import TaskKind
from flame_moe.training.weighted import Array

SLACK = 1e-6
"""How far a probability may be outside 0..1 and still be float32 rounding."""


def checked(kind: TaskKind, target: ArrayLike, prediction: ArrayLike, outputs: int) -> tuple[Array, Array]:
    """Target and prediction as new float64 matrices (n, width) that fit the kind, or one clear sentence.

    Args:
        outputs: number of classes, labels or values (`len(task.classes)`).

    Raises:
        DataError: if there are no samples, shapes do not fit, a number is NaN or infinite, a probability is outside
            0..1 or a label is not one of the classes; names the sample and column.
    """
    y, p = (np.array(x, dtype=np.float64) for x in (target, prediction))
    y, p = (x[:, None] if x.ndim == 1 else x for x in (y, p))
    widths = {"binary": (1, 1), "multiclass": (1, outputs)}.get(kind, (outputs, outputs))
    for name, x, width in (("target", y, widths[0]), ("prediction", p, widths[1])):
        if x.ndim != 2 or x.shape[1] != width or len(x) != len(y):
            mend = f"A {kind} task with {outputs} classes needs ({len(y)}, {width})."
            raise DataError(f"the {name} has shape {x.shape}", where=f"{kind} metrics", mend=mend)
        if not np.isfinite(x).all():
            row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
            place = f"{name}, sample {row}, column {column}"
            raise DataError(f"{x[row, column]} is not a number to score", where=place, mend="Leave such samples out.")
    if len(y) == 0:
        raise DataError("there are no samples to score", where=f"{kind} metrics")
    if kind == "regression":
        return y, p
    allowed = range(outputs) if kind == "multiclass" else (0, 1)
    _refuse("a label", "target", y, ~np.isin(y, allowed), f"Labels are whole numbers, 0 to {max(allowed)}.")
    _refuse("a probability", "prediction", p, (p < -SLACK) | (p > 1 + SLACK), "Give probabilities, not logits.")
    return y, np.clip(p, 0.0, 1.0)


def _refuse(what: str, name: str, x: Array, wrong: NDArray[np.bool_], mend: str) -> None:
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise DataError(f"{x[row, column]} is not {what}", where=f"{name}, sample {row}, column {column}", mend=mend)
