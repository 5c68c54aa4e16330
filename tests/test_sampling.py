from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_moe.data.loader import Loader
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.sampling import POLICIES, Policy, steps, steps_per_epoch
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from tests.example_stores import random_samples, write

SIZES = st.fixed_dictionaries({"death": st.integers(1, 40), "days": st.integers(1, 40), "codes": st.integers(1, 40)})
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("stores") / "s", random_samples(120))


def loaders(store: Store, sizes: dict[str, int], batch_size: int = 7) -> dict[str, Loader]:
    preprocessor = Preprocessor.from_store(store)
    return {
        name: Loader(store, preprocessor, store.tasks[name], store.indices(name)[:size], batch_size)
        for name, size in sizes.items()
    }


def seen(epoch: list[list]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for step in epoch:
        for batch in step:
            counts.setdefault(batch.task, Counter()).update(batch.ids)
    return counts


@given(SIZES)
@QUICK
def test_round_robin_visits_every_task_at_every_step(store: Store, sizes: dict[str, int]) -> None:
    tasks = loaders(store, sizes)
    epoch = list(steps(tasks, "round_robin", 1.0, np.random.default_rng(0)))
    assert len(epoch) == steps_per_epoch(tasks, "round_robin") == max(len(x) for x in tasks.values())
    assert all([batch.task for batch in step] == list(tasks) for step in epoch)
    counts = seen(epoch)
    for name, loader in tasks.items():
        times = counts[name].values()
        assert len(counts[name]) == len(loader.indices)
        assert max(times) - min(times) <= 1
        if len(loader) == len(epoch):
            assert set(times) == {1}


@given(SIZES)
@QUICK
def test_proportional_sees_every_sample_of_every_task_once(store: Store, sizes: dict[str, int]) -> None:
    tasks = loaders(store, sizes)
    epoch = list(steps(tasks, "proportional", 1.0, np.random.default_rng(0)))
    assert len(epoch) == steps_per_epoch(tasks, "proportional") == sum(len(x) for x in tasks.values())
    counts = seen(epoch)
    for name, loader in tasks.items():
        assert counts[name] == Counter(store.ids(loader.indices))
    assert all(len(step) == 1 for step in epoch)


def test_temperature_evens_out_the_tasks(store: Store) -> None:
    tasks = loaders(store, {"death": 80, "days": 5}, batch_size=1)

    def share(temperature: float) -> float:
        generator = np.random.default_rng(0)
        drawn = [s[0].task for _ in range(20) for s in steps(tasks, "temperature", temperature, generator)]
        assert len(drawn) == 20 * steps_per_epoch(tasks, "temperature")
        return drawn.count("days") / len(drawn)

    p = 5 / (len(tasks["death"]) + 5)
    assert share(1.0) == pytest.approx(p, abs=0.02)
    assert share(2.0) == pytest.approx(1 / (1 + np.sqrt(len(tasks["death"]) / 5)), abs=0.04)
    assert share(1e9) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_generator_decides_everything(store: Store, policy: Policy) -> None:
    tasks = loaders(store, {"death": 30, "days": 11})

    def run(generator: np.random.Generator) -> list[tuple[str, ...]]:
        return [batch.ids for step in steps(tasks, policy, 2.0, generator) for batch in step]

    generator = np.random.default_rng(3)
    first, second = run(generator), run(generator)
    assert first == run(np.random.default_rng(3))
    assert first != second


def test_impossible_schedules_are_told(store: Store) -> None:
    tasks = loaders(store, {"death": 5})
    with pytest.raises(DataError, match="Did you mean 'round_robin'"):
        next(steps(tasks, "round_robbin", 1.0, np.random.default_rng(0)))
    with pytest.raises(DataError, match="no task"):
        steps_per_epoch({}, "proportional")
    with pytest.raises(DataError, match="temperature of 0"):
        next(steps(tasks, "temperature", 0.0, np.random.default_rng(0)))
