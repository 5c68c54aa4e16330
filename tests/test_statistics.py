"""The promises of the channel statistics, held against numpy on one channel at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_moe.data.statistics import STATISTICS, series_statistics

CELL = st.one_of(st.just(float("nan")), st.integers(-50, 50).map(float))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3).flatmap(lambda c: st.lists(st.lists(CELL, min_size=c, max_size=c), min_size=1, max_size=8)))
def test_every_channel_is_what_numpy_says_of_its_observed_values(rows: list[list[float]]) -> None:
    values = np.array(rows)
    times = np.arange(len(values)) * 0.5
    table = series_statistics(values, times, end=10.0)
    for channel, got in enumerate(table):
        seen = ~np.isnan(values[:, channel])
        x, t = values[seen, channel], times[seen]
        if len(x) == 0:
            assert got[7] == 0
            assert np.isnan(np.delete(got, 7)).all()
            continue
        slope = np.polyfit(t, x, 1)[0] if len(x) > 1 else np.nan
        wanted = [x[0], x[-1], x.min(), x.max(), x.mean(), x.std(), slope, len(x), 10.0 - t[-1]]
        np.testing.assert_allclose(got, wanted, atol=1e-8)


def test_an_empty_series_has_counts_of_zero_and_nothing_else() -> None:
    table = series_statistics(np.empty((0, 2)), np.empty(0), end=1.0)
    assert table.shape == (2, len(STATISTICS))
    assert table[:, STATISTICS.index("count")].tolist() == [0, 0]
    assert np.isnan(np.delete(table, STATISTICS.index("count"), axis=1)).all()


def test_two_values_at_one_time_have_no_slope() -> None:
    table = series_statistics(np.array([[1.0], [3.0]]), np.array([2.0, 2.0]), end=2.0)
    assert np.isnan(table[0, STATISTICS.index("slope")])
