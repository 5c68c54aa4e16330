"""Metrics under many sample weightings at once: what makes a bootstrap of 500 resamples cheap.

A bootstrap resample is the same samples with integer weights, so scores are sorted once and every resample is one
row of a weight matrix.

Shape suffixes: n samples, R weightings (row 0 is the data as it is), K distinct scores, C classes.

Every function takes `weights_Rn` (float64, >= 0) and returns (R,) float64, NaN where the metric does not exist.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

BINS = 15
"""Equal-width bins of the expected calibration error."""


def ranking(target_n: Array, score_n: Array, weights_Rn: Array) -> tuple[Array, Array]:
    """Area under the ROC curve and average precision of a binary target.

    AUROC is the trapezoidal area, so tied pairs count one half. Average precision is the step sum
    sum_k (recall_k - recall_{k-1}) precision_k over distinct thresholds, without interpolation (Davis and Goadrich
    2006). Both are NaN where only one class has weight.

    Example:
        >>> auroc, ap = ranking(np.array([0.0, 1.0]), np.array([0.2, 0.9]), np.ones((1, 2)))
        >>> float(auroc[0]), float(ap[0])
        (1.0, 1.0)
    """
    order = np.argsort(-score_n, kind="stable")
    last_K = np.append(np.flatnonzero(np.diff(score_n[order])), len(order) - 1)
    sorted_Rn = weights_Rn[:, order]
    true_RK = np.cumsum(sorted_Rn * target_n[order], axis=1)[:, last_K]
    false_RK = np.cumsum(sorted_Rn * (1.0 - target_n[order]), axis=1)[:, last_K]
    positive_R, negative_R = true_RK[:, -1], false_RK[:, -1]
    gained_RK = np.diff(true_RK, axis=1, prepend=0.0)
    wider_RK = np.diff(false_RK, axis=1, prepend=0.0)
    area_R = np.einsum("rk,rk->r", wider_RK, true_RK - 0.5 * gained_RK)
    found_RK = true_RK + false_RK
    precision_RK = np.divide(true_RK, found_RK, out=np.zeros_like(true_RK), where=found_RK > 0)
    steps_R = np.einsum("rk,rk->r", gained_RK, precision_RK)
    both_R = (positive_R > 0) & (negative_R > 0)
    return _ratio(area_R, positive_R * negative_R, both_R), _ratio(steps_R, positive_R, both_R)


def f1(target_n: Array, predicted_n: Array, weights_Rn: Array) -> Array:
    """2 TP / (2 TP + FP + FN) of hard 0/1 predictions; NaN where there is neither a positive nor an alarm."""
    hits_R = weights_Rn @ (target_n * predicted_n)
    marked_R = weights_Rn @ (target_n + predicted_n)
    return _ratio(2.0 * hits_R, marked_R, marked_R > 0)


def mean(value_n: Array, weights_Rn: Array) -> Array:
    """Weighted mean of one number per sample (accuracy, Brier score, absolute error)."""
    total_R = weights_Rn.sum(axis=1)
    return _ratio(weights_Rn @ value_n, total_R, total_R > 0)


def calibration_error(target_n: Array, probability_n: Array, weights_Rn: Array) -> Array:
    """Expected calibration error: sum_b |sum of (probability - target) in bin b| / n, 15 equal-width bins.

    Guo et al. 2017, eq. 3; the difference of the bin's means times its share of the samples.
    """
    gap_nB = np.zeros((len(target_n), BINS))
    gap_nB[np.arange(len(target_n)), bin_of(probability_n, BINS)] = probability_n - target_n
    total_R = weights_Rn.sum(axis=1)
    return _ratio(np.abs(weights_Rn @ gap_nB).sum(axis=1), total_R, total_R > 0)


def explained(target_n: Array, prediction_n: Array, weights_Rn: Array) -> Array:
    """R2 = 1 - sum (y - p)^2 / sum (y - mean y)^2; NaN where the target does not vary."""
    # Centring first keeps the difference of the two sums from cancelling for targets far from zero.
    centred_n = target_n - target_n.mean()
    total_R = weights_Rn.sum(axis=1)
    squares_R = weights_Rn @ centred_n**2
    spread_R = squares_R - _ratio((weights_Rn @ centred_n) ** 2, total_R, total_R > 0)
    varies_R = spread_R > 1e-12 * squares_R
    if np.ptp(target_n) == 0:
        varies_R[:] = False
    return 1.0 - _ratio(weights_Rn @ (target_n - prediction_n) ** 2, spread_R, varies_R)


def bin_of(probability_n: Array, bins: int) -> NDArray[np.int64]:
    """Index of the equal-width bin of each probability; 1.0 falls into the last bin."""
    return np.clip((probability_n * bins).astype(np.int64), 0, bins - 1)


def resample(units: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each of `units` is drawn in each bootstrap resample: (resamples, units), rows sum to `units`."""
    drawn = rng.integers(0, units, size=(resamples, units))
    drawn += np.arange(resamples)[:, None] * units
    return np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units).astype(np.float64)


def _ratio(above_R: Array, below_R: Array, exists_R: NDArray[np.bool_]) -> Array:
    return np.divide(above_R, below_R, out=np.full_like(above_R, np.nan), where=exists_R)
