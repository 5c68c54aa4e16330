"""The measures of continual learning are those of matrices worked out by hand, missing entries included."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flame_moe.measures import (
    FORMULAS,
    backward_transfer,
    forgetting,
    forward_transfer,
    largest_drift,
    last,
    measures,
)
from flame_moe.progression import Progression, progression
from flame_moe.results import Drift
from tests.example_results import MORTALITY, example

NAN = np.nan
R = [[0.8, 0.9, 0.7], [NAN, 0.6, 0.65], [NAN, NAN, 0.5]]


def made(values: list[list[float]], learned: tuple[int, ...], metric: str = "auroc") -> Progression:
    table = np.array(values)
    gap = np.full_like(table, NAN)
    return Progression(metric, tuple("abcd"[: len(table)]), learned, table, gap, gap)


def drift(task: str, stage: int, change: float) -> Drift:
    return Drift(after_stage=stage, task=task, max_abs_logit_change=change, bitwise_equal=change == 0, n=3)


def test_each_measure_of_three_tasks_in_three_stages_is_the_one_worked_out_by_hand() -> None:
    rows = [drift("a", 0, 0.0), drift("a", 1, 2.5), drift("a", 2, 1.5), drift("b", 2, 0.25)]
    found = {m.name: m for m in measures(made(R, (0, 1, 2)), alone={"b": 0.5, "c": 0.6}, drift=rows)}
    assert {name: m.value for name, m in found.items()} == pytest.approx(
        {
            "average": (0.7 + 0.65 + 0.5) / 3,
            "backward transfer": ((0.7 - 0.8) + (0.65 - 0.6)) / 2,
            "forgetting": ((0.9 - 0.7) + (0.6 - 0.65)) / 2,
            "forward transfer": ((0.6 - 0.5) + (0.5 - 0.6)) / 2,
            "logit drift": 2.5,
        }
    )
    assert {name: m.tasks for name, m in found.items()} == dict(zip(FORMULAS, (3, 2, 2, 2, 2), strict=True))


def test_two_tasks_of_one_stage_both_count() -> None:
    table = made([[0.9, 0.8], [0.7, 0.9], [NAN, 0.6]], (0, 0, 1))
    assert backward_transfer(table) == pytest.approx({"a": -0.1, "b": 0.2})
    assert forgetting(table) == pytest.approx({"a": 0.1, "b": -0.2})
    assert forward_transfer(table, {"c": 0.5}) == pytest.approx({"c": 0.1})


def test_the_value_after_the_last_stage_is_not_among_the_best_that_can_be_forgotten() -> None:
    assert forgetting(made([[0.5, 0.6, 0.9]], (0,))) == pytest.approx({"a": -0.3})


def test_for_errors_lower_is_better_and_the_signs_turn() -> None:
    table = made([[2.0, 1.5, 3.0], [NAN, 1.0, 1.0]], (0, 1), metric="rmse")
    assert last(table) == {"a": 3.0, "b": 1.0}
    assert backward_transfer(table) == {"a": -1.0, "b": 0.0}
    assert forgetting(table) == {"a": 1.5, "b": 0.0}
    assert forward_transfer(table, {"b": 1.25}) == {"b": 0.25}


def test_a_task_that_never_has_the_metric_does_not_belong_to_the_measure() -> None:
    table = made([[0.8, 0.7], [NAN, NAN], [NAN, 0.5]], (0, 0, 1))
    found = {m.name: (m.value, m.tasks) for m in measures(table)}
    assert found == {
        "average": (pytest.approx(0.6), 2),
        "backward transfer": (pytest.approx(-0.1), 1),
        "forgetting": (pytest.approx(0.1), 1),
    }


def test_a_missing_entry_that_is_needed_makes_a_measure_missing_and_no_other() -> None:
    table = made([[0.8, NAN, 0.7], [NAN, 0.6, NAN], [NAN, NAN, 0.5]], (0, 1, 2))
    assert backward_transfer(table) == pytest.approx({"a": -0.1, "b": NAN}, nan_ok=True)
    assert forgetting(table) == pytest.approx({"a": NAN, "b": NAN}, nan_ok=True)
    assert forward_transfer(table, {"b": 0.5}) == pytest.approx({"b": 0.1, "c": NAN}, nan_ok=True)
    assert all(math.isnan(m.value) for m in measures(table, alone={"b": 0.5}))


def test_one_stage_has_nothing_to_forget_and_nothing_from_before() -> None:
    table = progression(example(((MORTALITY,),)), "auroc")
    assert backward_transfer(table) == forgetting(table) == forward_transfer(table, {}) == {}
    average, *others = measures(table, alone={})
    assert average.value == table.values[0, 0]
    assert all(math.isnan(m.value) and m.tasks == 0 for m in others)


def test_no_drift_was_measured_is_not_the_same_as_no_drift() -> None:
    assert math.isnan(largest_drift([]))
    assert largest_drift([drift("a", 1, 0.0)]) == 0.0


def test_compared_methods_have_the_whole_matrix_of_every_metric() -> None:
    results = example()
    for other in results.comparison:
        for metric in ("auroc", "auprc", "brier", "rmse", "r2"):
            mine = progression(results, metric)
            theirs = progression(results, metric, evaluations=other.evaluations)
            assert np.array_equal(np.isnan(mine.values), np.isnan(theirs.values))
