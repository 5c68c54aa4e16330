"""Calibration curves: is 30 % predicted risk 30 % observed frequency?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from flame_moe.errors import DataError
from flame_moe.schema import TaskKind
from flame_moe.training.checks import checked
from flame_moe.training.weighted import Array, bin_of


class CalibrationPoint(NamedTuple):
    """One bin of a calibration curve: mean predicted probability against observed frequency of `n` predictions."""

    low: float
    high: float
    confidence: float
    frequency: float
    n: int


def calibration_curve(target: ArrayLike, probability: ArrayLike, bins: int = 10) -> list[CalibrationPoint]:
    """Reliability diagram over equal-width bins; bins without predictions are left out.

    Args:
        target: 0/1, any shape.
        probability: in 0..1, of the same shape.
        bins: how many bins 0..1 is cut into.

    Raises:
        DataError: as `evaluate_predictions`.
    """
    y, p = checked("binary", np.ravel(target), np.ravel(probability), 2)
    where = bin_of(p[:, 0], bins)
    return [
        CalibrationPoint(b / bins, (b + 1) / bins, float(p[inside].mean()), float(y[inside].mean()), int(inside.sum()))
        for b in range(bins)
        if (inside := where == b).any()
    ]


def calibration_pairs(kind: TaskKind, target: ArrayLike, prediction: ArrayLike, outputs: int) -> tuple[Array, Array]:
    """What the calibration curve of a task is drawn from: a 0/1 target and a probability, both flat.

    Binary as it is; multiclass: whether the top class is right, and its probability; multilabel: all labels pooled.

    Raises:
        DataError: as `evaluate_predictions`, and for regression, which has no probabilities.
    """
    if kind == "regression":
        raise DataError("a regression task has no probabilities to calibrate", where="calibration")
    y, p = checked(kind, target, prediction, outputs)
    if kind == "multiclass":
        return (p.argmax(axis=1) == y[:, 0]).astype(np.float64), p.max(axis=1)
    return y.ravel(), p.ravel()
