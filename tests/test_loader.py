from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_moe.batch import FlexiBatch, Sample, collate, drop_modalities
from flame_moe.data.loader import Loader, make_batch, to_device
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from flame_moe.schema import Task
from tests.example_stores import random_samples, write


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write(tmp_path_factory.mktemp("stores") / "s", random_samples(150))


def scaled(store: Store, preprocessor: Preprocessor, index: int) -> Sample:
    sample = store.sample(index)
    parts = {
        name: part._replace(values=preprocessor.apply(name, part.values, part.observed))
        for name, part in sample.modalities.items()
    }
    return sample._replace(modalities=parts)


def assert_same(a: FlexiBatch, b: FlexiBatch) -> None:
    assert (a.task, a.size, a.ids) == (b.task, b.size, b.ids)
    torch.testing.assert_close(a.target, b.target, rtol=0, atol=0, equal_nan=True)
    assert list(a.modalities) == list(b.modalities)
    for name, one in a.modalities.items():
        for x, y in zip(one, b.modalities[name], strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                assert x.dtype == y.dtype
                torch.testing.assert_close(x, y, rtol=0, atol=0)


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fast_batches_equal_collated_samples(store: Store, data: st.DataObject) -> None:
    preprocessor = Preprocessor.from_store(store)
    task = store.tasks[data.draw(st.sampled_from(list(store.tasks)))]
    able = store.indices(task.name, labelled=False).tolist()
    indices = data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=20))
    expected = collate([scaled(store, preprocessor, i) for i in indices], task.name, task.modalities, task.target_width)
    assert_same(make_batch(store, preprocessor, task, indices), expected)


def test_steps_that_exist_are_taken_out_and_put_back(store: Store) -> None:
    task = store.tasks["death"]
    batch = make_batch(store, Preprocessor.from_store(store), task, store.indices("death", "train"))
    torch.manual_seed(0)
    for name, part in [*batch.modalities.items(), *drop_modalities(batch, 0.5).modalities.items()]:
        taken = part.take(part.values)
        assert torch.equal(taken, part.values[part.mask]), name
        assert torch.equal(part._replace(places=None).take(part.values), taken), name
        back = part.put(taken + 1)
        assert torch.equal(back[part.mask], taken + 1), name
        assert not back[~part.mask].any(), name


def test_only_the_modalities_of_the_task_are_read(store: Store) -> None:
    task = Task.parse({**store.tasks["death"].plain(), "modalities": ["static"]}, where="test")
    indices = store.indices("death", "train", modalities=task.modalities)
    batch = make_batch(store, Preprocessor.from_store(store), task, indices)
    assert list(batch.modalities) == ["static"]
    assert batch.modalities["static"].rows.tolist() == list(range(len(indices)))


@given(st.integers(1, 40), st.integers(0, 3))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_epoch_holds_every_sample_once(store: Store, batch_size: int, seed: int) -> None:
    task = store.tasks["days"]
    indices = store.indices("days", "train")
    loader = Loader(store, Preprocessor.from_store(store), task, indices, batch_size)
    plain = [batch.ids for batch in loader.batches()]
    mixed = [batch.ids for batch in loader.batches(np.random.default_rng(seed))]
    assert len(plain) == len(mixed) == len(loader)
    assert [i for ids in plain for i in ids] == list(store.ids(indices))
    assert sorted(i for ids in mixed for i in ids) == sorted(store.ids(indices))
    again = [batch.ids for batch in loader.batches(np.random.default_rng(seed))]
    assert again == mixed


def test_shuffling_changes_the_order(store: Store) -> None:
    loader = Loader(store, Preprocessor.from_store(store), store.tasks["days"], store.indices("days"), 8)
    generator = np.random.default_rng(0)
    first = [batch.ids for batch in loader.batches(generator)]
    assert first != [batch.ids for batch in loader.batches(generator)]


def test_impossible_batches_are_told(store: Store) -> None:
    preprocessor, task = Preprocessor.from_store(store), store.tasks["codes"]
    with pytest.raises(DataError, match="at least one sample"):
        make_batch(store, preprocessor, task, [])
    lacking = np.flatnonzero(~store.present("notes"))
    with pytest.raises(DataError, match=f"sample '{store.ids(lacking[:1])[0]}' has none of the modalities notes"):
        make_batch(store, preprocessor, task, lacking)
    with pytest.raises(DataError, match=r"no sample to load.*codes"):
        Loader(store, preprocessor, task, np.array([], dtype=np.int64), 4)
    with pytest.raises(DataError, match="batch of 0"):
        Loader(store, preprocessor, task, store.indices("codes"), 0)


def test_moving_to_a_device_keeps_the_batch(store: Store) -> None:
    batch = make_batch(store, Preprocessor.from_store(store), store.tasks["death"], store.indices("death")[:5])
    assert_same(to_device(batch, "cpu"), batch)
    assert to_device(batch, "meta").target.device.type == "meta"


def test_the_fast_path_is_much_faster_than_collating_samples(store: Store) -> None:
    preprocessor, task = Preprocessor.from_store(store), store.tasks["death"]
    indices = store.indices("death")[:64]

    def seconds(run: Callable[[], FlexiBatch]) -> float:
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
        return best

    slow = seconds(lambda: collate([scaled(store, preprocessor, i) for i in indices], "death", task.modalities, 1))
    assert seconds(lambda: make_batch(store, preprocessor, task, indices)) < slow / 3
