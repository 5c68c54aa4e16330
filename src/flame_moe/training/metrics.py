"""Metrics of predictions, each with a bootstrap interval over subjects, and their aggregation over seeds.

| kind | prediction | metrics |
|---|---|---|
| binary | probability (n,) | auroc, auprc, f1 (threshold 0.5), accuracy, brier, ece |
| multiclass | probabilities (n, C) | the same, class against the rest, mean over classes; f1, accuracy of the argmax |
| multilabel | probabilities (n, L) | the same, mean over labels; accuracy is 1 - Hamming loss |
| regression | values (n, V) in natural units | rmse, mae, r2, mean over values |

The Brier score is the mean squared distance to the 0/1 target, summed over classes for multiclass (0 to 2); ece has 15
equal-width bins and reads the probability of the top class for multiclass. A class or label for which a metric does
not exist (it has no positive, say) is left out of the mean and named in the note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from flame_moe.errors import DataError
from flame_moe.results import PRIMARY
from flame_moe.schema import TaskKind
from flame_moe.training import weighted
from flame_moe.training.calibration import CalibrationPoint, calibration_curve, calibration_pairs
from flame_moe.training.checks import checked
from flame_moe.training.weighted import Array

__all__ = [
    "PRIMARY",
    "Aggregate",
    "CalibrationPoint",
    "Scores",
    "aggregate",
    "calibration_curve",
    "calibration_pairs",
    "evaluate_predictions",
]

CELLS_AT_ONCE = 4_000_000
"""Weights held in memory at a time, so that a large test set does not need resamples x samples of it."""


class Scores(NamedTuple):
    """Metrics of one task on one split.

    Attributes:
        metrics: name -> value, NaN where it does not exist.
        ci: name -> (low, high), the 95 % percentile bootstrap interval; NaN where there is none.
        n: number of samples.
        prevalence: class -> share of the samples with it; empty for regression.
        note: what a reader must know about these numbers, or empty.
    """

    metrics: dict[str, float]
    ci: dict[str, tuple[float, float]]
    n: int
    prevalence: dict[str, float]
    note: str


def evaluate_predictions(
    kind: TaskKind,
    target: ArrayLike,
    prediction: ArrayLike,
    *,
    classes: Sequence[str],
    subjects: Sequence[str] | None = None,
    bootstrap: int = 500,
    seed: int = 0,
) -> Scores:
    """Every metric of the kind with its 95 % interval.

    The interval holds the 2.5th to 97.5th percentile of the metric over `bootstrap` resamples of the subjects, with
    all samples of a drawn subject; without subjects, of the samples. Resamples in which the metric does not exist do
    not count and are told in the note.

    Args:
        target: (n,) or (n, 1) of 0/1 or class indices; (n, L) of 0/1; (n, V) values.
        prediction: probabilities or values, shaped as in the table of this module.
        classes: names of the outputs, as in `Task.classes`.
        subjects: n names of subjects, the units of resampling.
        bootstrap: number of resamples; 0 gives no intervals.
        seed: of the resampling.

    Raises:
        DataError: if there are no samples, shapes do not fit, a number is NaN or infinite, a probability is outside
            0..1 or a label is not one of the classes.

    Example:
        >>> scores = evaluate_predictions("binary", [0, 0, 1], [0.1, 0.4, 0.8], classes=("no", "yes"), bootstrap=0)
        >>> scores.metrics["auroc"], scores.n
        (1.0, 3)
    """
    y, p = checked(kind, target, prediction, len(classes))
    n = len(y)
    units, unit_of = _units(n, subjects)
    rng = np.random.default_rng(seed)
    parts = [MEASURES[kind](y, p, np.ones((1, n)))]
    at_once = max(1, CELLS_AT_ONCE // n)
    for start in range(0, bootstrap, at_once):
        counts = weighted.resample(units, min(at_once, bootstrap - start), rng)
        parts.append(MEASURES[kind](y, p, counts if unit_of is None else counts[:, unit_of]))
    metrics = {name: float(parts[0][name][0]) for name in parts[0]}
    notes = _notes(kind, y, classes)
    ci: dict[str, tuple[float, float]] = {}
    for name in metrics:
        drawn = np.concatenate([part[name] for part in parts[1:]]) if bootstrap else np.empty(0)
        exists = drawn[~np.isnan(drawn)]
        usable = len(exists) > 0 and units > 1 and not np.isnan(metrics[name])
        ci[name] = _interval(exists) if usable else (np.nan, np.nan)
        if usable and len(exists) < bootstrap:
            notes.append(f"the interval of {name} is from {len(exists)} of {bootstrap} resamples")
    if bootstrap and units == 1:
        notes.append("no intervals: there is one subject")
    return Scores(metrics, ci, n, _prevalence(kind, y, classes), "; ".join(notes))


class Aggregate(NamedTuple):
    """Mean over seeds, sample standard deviation (ddof 1) and the 95 % t-interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def aggregate(values: Sequence[float]) -> Aggregate:
    """Mean, spread and t-interval over independent seeds: mean +- t(0.975, n - 1) sd / sqrt(n).

    One value has no spread (NaN); a NaN among the values makes everything NaN.

    Raises:
        DataError: if there are no values.

    Example:
        >>> aggregate([0.80, 0.82, 0.84]).mean
        0.82
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise DataError("there are no values to aggregate", where="aggregate", mend="Give one value per seed.")
    mean = float(x.mean())
    if len(x) == 1:
        return Aggregate(mean, np.nan, np.nan, np.nan, 1)
    sd = float(x.std(ddof=1))
    half = float(stdtrit(len(x) - 1, 0.975)) * sd / float(np.sqrt(len(x)))
    return Aggregate(mean, sd, mean - half, mean + half, len(x))


def _columns(y: Array, p: Array, weights: Array) -> dict[str, Array]:
    """Metrics of 0/1 columns, each averaged over the columns for which it exists."""
    columns = []
    for c in range(y.shape[1]):
        hard = (p[:, c] >= 0.5).astype(np.float64)
        auroc, auprc = weighted.ranking(y[:, c], p[:, c], weights)
        columns.append(
            {
                "auroc": auroc,
                "auprc": auprc,
                "f1": weighted.f1(y[:, c], hard, weights),
                "accuracy": weighted.mean((hard == y[:, c]).astype(np.float64), weights),
                "brier": weighted.mean((p[:, c] - y[:, c]) ** 2, weights),
                "ece": weighted.calibration_error(y[:, c], p[:, c], weights),
            }
        )
    return {name: _mean_existing([column[name] for column in columns]) for name in columns[0]}


def _multiclass(y: Array, p: Array, weights: Array) -> dict[str, Array]:
    hot = (y == np.arange(p.shape[1])).astype(np.float64)
    top = p.argmax(axis=1)
    chosen = (top[:, None] == np.arange(p.shape[1])).astype(np.float64)
    right = (top == y[:, 0]).astype(np.float64)
    ranked = [weighted.ranking(hot[:, c], p[:, c], weights) for c in range(p.shape[1])]
    return {
        "auroc": _mean_existing([auroc for auroc, _ in ranked]),
        "auprc": _mean_existing([auprc for _, auprc in ranked]),
        "f1": _mean_existing([weighted.f1(hot[:, c], chosen[:, c], weights) for c in range(p.shape[1])]),
        "accuracy": weighted.mean(right, weights),
        "brier": weighted.mean(((p - hot) ** 2).sum(axis=1), weights),
        "ece": weighted.calibration_error(right, p.max(axis=1), weights),
    }


def _regression(y: Array, p: Array, weights: Array) -> dict[str, Array]:
    columns = range(y.shape[1])
    return {
        "rmse": _mean_existing([np.sqrt(weighted.mean((p[:, v] - y[:, v]) ** 2, weights)) for v in columns]),
        "mae": _mean_existing([weighted.mean(np.abs(p[:, v] - y[:, v]), weights) for v in columns]),
        "r2": _mean_existing([weighted.explained(y[:, v], p[:, v], weights) for v in columns]),
    }


MEASURES: dict[str, Callable[[Array, Array, Array], dict[str, Array]]] = {
    "binary": _columns,
    "multiclass": _multiclass,
    "multilabel": _columns,
    "regression": _regression,
}


def _mean_existing(rows: Sequence[Array]) -> Array:
    """Mean over rows, ignoring NaN; NaN where every row is."""
    stacked = np.stack(rows)
    exists = ~np.isnan(stacked)
    total = np.where(exists, stacked, 0.0).sum(axis=0)
    return np.divide(total, exists.sum(axis=0), out=np.full_like(total, np.nan), where=exists.any(axis=0))


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _units(n: int, subjects: Sequence[str] | None) -> tuple[int, NDArray[np.intp] | None]:
    """Number of units of resampling and the unit of each sample (None: each is its own)."""
    if subjects is None:
        return n, None
    if len(subjects) != n:
        raise DataError(f"{n} samples but {len(subjects)} subjects", where="subjects", mend="Give one per sample.")
    names, unit_of = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    return len(names), unit_of


def _prevalence(kind: TaskKind, y: Array, classes: Sequence[str]) -> dict[str, float]:
    if kind == "regression":
        return {}
    if kind == "multilabel":
        return {name: float(y[:, i].mean()) for i, name in enumerate(classes)}
    return {name: float((y[:, 0] == i).mean()) for i, name in enumerate(classes)}


def _notes(kind: TaskKind, y: Array, classes: Sequence[str]) -> list[str]:
    """Which classes, labels or values have no ranking metric or r2 because the data does not vary there."""
    if kind == "regression":
        still = [name for i, name in enumerate(classes) if np.ptp(y[:, i]) == 0]
        return [f"no r2 for {', '.join(still)}: the target does not vary"] if still else []
    if kind == "binary":
        only = classes[int(y[0, 0])]
        return [f"no auroc and auprc: every sample is '{only}'"] if np.ptp(y) == 0 else []
    share = _prevalence(kind, y, classes)
    still = [name for name, value in share.items() if value in (0.0, 1.0)]
    return [f"no auroc and auprc for {', '.join(still)}: no sample or every sample has it"] if still else []
