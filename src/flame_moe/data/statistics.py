"""Statistics of an irregular series, channel by channel: what a table has to say about a stay.

Used where a model reads one row per sample instead of the series: linear models, trees, a table modality.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
STATISTICS: tuple[str, ...] = ("first", "last", "min", "max", "mean", "std", "slope", "count", "since_last")


def series_statistics(values: Array, times: Array, end: float) -> Array:
    """Statistics of every channel over its observed values.

    Args:
        values: (L, C), NaN where not observed; L may be 0.
        times: (L,), non-decreasing.
        end: the time from which `since_last` counts back.

    Returns:
        (C, 9) in the order of `STATISTICS`. `count` is 0 and all others NaN for a channel without a value; `std`
        (population) needs one value, `slope` (least squares, per unit of time) two different times. A channel's
        statistics do not depend on the other channels or on steps where it has no value.

    Example:
        >>> table = series_statistics(np.array([[1.0], [np.nan], [5.0]]), np.array([0.0, 1.0, 2.0]), end=3.0)
        >>> dict(zip(STATISTICS, table[0].tolist()))["slope"]
        2.0
    """
    out = np.full((values.shape[1], len(STATISTICS)), np.nan)
    seen = ~np.isnan(values)
    count = seen.sum(axis=0)
    out[:, 7] = count
    some = np.flatnonzero(count)
    if len(some) == 0:
        return out
    x, seen, n = values[:, some], seen[:, some], count[some]
    columns = np.arange(len(some))
    first = seen.argmax(axis=0)
    last = len(times) - 1 - seen[::-1].argmax(axis=0)
    filled = np.where(seen, x, 0.0)
    mean = filled.sum(axis=0) / n
    away = np.where(seen, x - mean, 0.0)
    clock = np.where(seen, times[:, None], 0.0)
    clock_away = np.where(seen, times[:, None] - clock.sum(axis=0) / n, 0.0)
    spread = (clock_away**2).sum(axis=0)
    moves = times[last] > times[first]
    out[some, 0] = x[first, columns]
    out[some, 1] = x[last, columns]
    out[some, 2] = np.where(seen, x, np.inf).min(axis=0)
    out[some, 3] = np.where(seen, x, -np.inf).max(axis=0)
    out[some, 4] = mean
    out[some, 5] = np.sqrt((away**2).sum(axis=0) / n)
    out[some, 6] = np.where(moves, (clock_away * away).sum(axis=0) / np.where(moves, spread, 1.0), np.nan)
    out[some, 8] = end - times[last]
    return out
