"""The promises of the controls: equal effort, fitted on train, chosen on validation, blind to test."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import DataError
from flame_moe.experiments import baselines
from flame_moe.experiments.baselines import GRIDS, KINDS, Kind, fit_baseline, summary_matrix
from flame_moe.schema import Modality, Task
from flame_moe.training.metrics import evaluate_predictions

READS = ("table", "series", "steps")
MODALITIES = (
    Modality(name="table", kind="table", features=3, channels=("a", "b", "c")),
    Modality(name="series", kind="series", features=2, channels=("hr", "sbp")),
    Modality(name="steps", kind="patches", features=2),
)
TASKS = (
    Task(name="yes", kind="binary", modalities=READS, classes=("no", "yes")),
    Task(name="which", kind="multiclass", modalities=READS, classes=("x", "y", "z")),
    Task(name="many", kind="multilabel", modalities=READS, classes=("p", "q")),
    Task(name="amount", kind="regression", modalities=READS, classes=("u", "v")),
    Task(name="rare", kind="binary", modalities=READS, classes=("no", "yes")),
)


def learnable(number: int, generator: np.random.Generator) -> Sample:
    """A sample whose labels follow from its table and its series, each cell of the table missing now and then."""
    row = generator.normal(size=3)
    level = generator.normal()
    steps = int(generator.integers(1, 6))
    observed = generator.random(3) < 0.9
    observed[generator.integers(3)] = True
    series = level + 0.1 * generator.normal(size=(steps, 2))
    parts = {
        "table": Observation(row[None].astype(np.float32), None, observed[None]),
        "series": Observation(series.astype(np.float32), np.sort(generator.random(steps)).astype(np.float32)),
        "steps": Observation(generator.normal(size=(steps, 2)).astype(np.float32)),
    }
    if generator.random() < 0.1:
        del parts["steps"]
    targets = {
        "yes": [float(row[0] + level > 0)],
        "which": [float(np.digitize(row[1], [-0.5, 0.5]))],
        "many": [float(row[0] > 0), float(level > 0)],
        "amount": [100 + 10 * row[1], -5 * level],
        "rare": [0.0],
    }
    return Sample(str(number), str(number), parts, {k: np.array(v, dtype=np.float32) for k, v in targets.items()})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("baselines") / "store"
    with StoreWriter(path, source="test", options={}, modalities=MODALITIES, tasks=TASKS) as writer:
        for number in range(400):
            writer.add(learnable(number, generator))
        funnel = Funnel()
        funnel.start(400)
        return writer.finish(SplitSpec(fractions=(0.6, 0.2, 0.2)), funnel, require_labels=False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings and few trees: what is tested does not depend on the effort."""
    monkeypatch.setattr(baselines, "GRIDS", {key: (grid[0], grid[-1]) for key, grid in GRIDS.items()})
    monkeypatch.setattr(baselines, "_BOOSTING", {**baselines._BOOSTING, "max_iter": 40})


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("task", "reached"), [("yes", 0.9), ("which", 0.9), ("many", 0.9), ("amount", 0.6)])
def test_every_kind_of_task_is_learned(store: Store, kind: Kind, task: str, reached: float) -> None:
    baseline = fit_baseline(kind, store, task)
    test = store.indices(task, "test")
    X, names = summary_matrix(store, test, baseline.modalities)
    assert names == baseline.names
    scores = evaluate_predictions(
        baseline.task.kind, store.target(task, test), baseline.predict(X), classes=baseline.task.classes, bootstrap=0
    )
    assert scores.metrics[baseline.metric] > reached


def test_both_kinds_try_equally_many_settings_all_different() -> None:
    for classes in (True, False):
        assert len({len(GRIDS[kind, classes]) for kind in KINDS}) == 1
    for grid in GRIDS.values():
        assert len({str(setting) for setting in grid}) == len(grid)


@pytest.mark.usefixtures("short")
def test_the_setting_is_the_best_on_validation(store: Store) -> None:
    baseline = fit_baseline("logistic", store, "yes")
    assert baseline.val_score == max(score for _, score in baseline.tried)
    assert dict(baseline.tried[0][0]) == dict(baselines.GRIDS["logistic", True][0])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", KINDS)
def test_the_test_split_is_never_read(store: Store, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = set(store.indices(split="test").tolist())
    gather, target = Store.gather, Store.target

    def watched_gather(self: Store, modality: str, indices: np.ndarray) -> object:
        assert not hidden & set(np.asarray(indices).tolist())
        return gather(self, modality, indices)

    def watched_target(self: Store, task: str, indices: np.ndarray) -> object:
        assert not hidden & set(np.asarray(indices).tolist())
        return target(self, task, indices)

    monkeypatch.setattr(Store, "gather", watched_gather)
    monkeypatch.setattr(Store, "target", watched_target)
    fit_baseline(kind, store, "yes")


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_predictions(store: Store, kind: Kind) -> None:
    X, _ = summary_matrix(store, store.indices("yes", "test"), READS)
    first, again = (fit_baseline(kind, store, "yes", seed=3).predict(X) for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_the_matrix_holds_tables_as_they_are_and_series_by_their_statistics(store: Store) -> None:
    indices = store.indices()[:50]
    X, names = summary_matrix(store, indices, ("table", "series", "steps"))
    column = {name: X[:, i] for i, name in enumerate(names)}
    for row, index in enumerate(indices.tolist()):
        sample = store.sample(index)
        table, series = sample.modalities["table"], sample.modalities["series"]
        assert table.observed is not None
        seen = table.values[0, 0] if table.observed[0, 0] else np.nan
        np.testing.assert_equal(column["table.a"][row], np.float64(seen))
        assert column["series.hr.max"][row] == series.values[:, 0].max()
        assert column["series.sbp.count"][row] == len(series.values)
        absent = "steps" not in sample.modalities
        assert np.isnan(column["steps.0.mean"][row]) == absent
        assert np.isnan(column["steps.0.count"][row]) == absent


def test_a_wrong_question_is_refused(store: Store) -> None:
    with pytest.raises(DataError, match="unknown kind of baseline"):
        fit_baseline(cast(Kind, "forest"), store, "yes")
    with pytest.raises(DataError, match="unknown task"):
        fit_baseline("logistic", store, "maybe")
    with pytest.raises(DataError, match="unknown modality"):
        fit_baseline("logistic", store, "yes", modalities=("tables",))
    with pytest.raises(DataError, match="at least one modality"):
        summary_matrix(store, [0], ())
    with pytest.raises(DataError, match="'yes' has a single value in the training split"):
        fit_baseline("logistic", store, "rare")


@pytest.mark.usefixtures("short")
def test_rows_of_another_width_are_refused(store: Store) -> None:
    baseline = fit_baseline("logistic", store, "yes", modalities=("table",))
    with pytest.raises(DataError, match="columns"):
        baseline.predict(np.zeros((2, 5)))
