"""Codes, pictures and signals as rows of numbers: what the columns hold, and that only training data choose them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flame_moe.batch import Observation, Sample
from flame_moe.data.codes import code_id
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.writer import StoreWriter
from flame_moe.experiments import summaries
from flame_moe.experiments.baselines import fit_baseline, summary_matrix
from flame_moe.schema import Modality, Task
from flame_moe.training.metrics import evaluate_predictions

MODALITIES = (
    Modality(name="events", kind="codes", features=2, types=("diagnosis", "drug")),
    Modality(name="scans", kind="image", features=110, shape=(11, 10, 1)),
    Modality(name="ecg", kind="waveform", features=2, channels=("i", "ii"), rate=100.0),
    Modality(name="letter", kind="timed", features=3),
    Modality(name="letters", kind="timed", features=2),
)
READS = ("events", "scans", "ecg")
TASKS = tuple(Task(name=f"from_{m}", kind="binary", modalities=(m,), classes=("no", "yes")) for m in READS)


def sample(number: int, split: str, code: str, generator: np.random.Generator) -> Sample:
    """Each task's label follows from one modality: a code, a bright corner, a fast signal."""
    label = generator.integers(0, 2, 3)
    events = [[0, code_id("sick" if label[0] else "well")], [1, code_id(code)], [1, code_id("any")]]
    picture = generator.integers(90, 110, (2, 11, 10), dtype=np.uint8)
    picture[:, -4:, -4:] += np.uint8(30 * label[1])
    t = np.arange(300)
    wave = np.sin(t[:, None] * (0.3 if label[2] else 0.1)) + 0.1 * generator.normal(size=(300, 2))
    parts = {
        "events": Observation(np.array(events, dtype=np.int32), np.zeros(3, dtype=np.float32)),
        "scans": Observation(picture.reshape(2, 110), np.array([0.1, 0.2], dtype=np.float32)),
        "ecg": Observation(wave.astype(np.float32)),
        "letter": Observation(np.array([[number, -number, 1]], dtype=np.float32), np.array([0.25], dtype=np.float32)),
        "letters": Observation(np.full((1 + number % 2, 2), number, dtype=np.float32), np.zeros(1 + number % 2)),
    }
    if number % 10 == 0:
        del parts[READS[number // 10 % 3]]
    targets = {task.name: np.array([y], dtype=np.float32) for task, y in zip(TASKS, label, strict=True)}
    return Sample(str(number), str(number), parts, targets, split)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    generator = np.random.default_rng(0)
    path: Path = tmp_path_factory.mktemp("summaries") / "store"
    with StoreWriter(path, source="test", options={}, modalities=MODALITIES, tasks=TASKS) as writer:
        for number in range(300):
            split = ("train", "val", "test")[number % 3]
            writer.add(sample(number, split, f"only in {split}", generator))
        funnel = Funnel()
        funnel.start(300)
        return writer.finish(SplitSpec(), funnel)


def columns(store: Store, indices: np.ndarray) -> dict[str, np.ndarray]:
    X, names = summary_matrix(store, indices, READS)
    assert len(set(names)) == len(names) == X.shape[1]
    return {name: X[:, i] for i, name in enumerate(names)}


def test_codes_are_counted_by_type_and_by_the_codes_of_the_training_split(store: Store) -> None:
    found = columns(store, store.indices(split="test"))
    assert f"events.code{code_id('only in train')}.count" in found
    assert not any(str(code_id(f"only in {split}")) in name for name in found for split in ("val", "test"))
    there = ~np.isnan(found["events.drug.count"])
    assert set(found["events.drug.count"][there]) == {2.0}
    assert set(found["events.diagnosis.count"][there]) == {1.0}
    sick = store.target("from_events", store.indices(split="test"))[:, 0]
    np.testing.assert_array_equal(found[f"events.code{code_id('sick')}.count"][there], sick[there])


def test_only_the_most_frequent_codes_have_a_column(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summaries, "CODES", 2)
    codes = [name for name in columns(store, np.arange(3)) if ".code" in name]
    expected = sorted([code_id("any"), code_id("only in train")])
    assert codes == [f"events.code{code}.count" for code in expected]


def test_pictures_are_summarised_by_a_coarse_mean_picture(store: Store) -> None:
    found = columns(store, np.array([1, 2]))
    for row, index in enumerate((1, 2)):
        pictures = store.sample(index).modalities["scans"].values.reshape(2, 11, 10).astype(float)
        assert found["scans.pictures"][row] == 2
        assert found["scans.mean"][row] == pytest.approx(pictures.mean())
        assert found["scans.std"][row] == pytest.approx(np.mean([p.std() for p in pictures]))
        mean = pictures.mean(0)
        for i in range(8):
            for j in range(8):
                rows = [r for r in range(11) if r * 8 // 11 == i]
                across = [c for c in range(10) if c * 8 // 10 == j]
                assert found[f"scans.cell{i}.{j}.0"][row] == pytest.approx(mean[np.ix_(rows, across)].mean())


def test_a_vector_that_is_alone_is_taken_as_it_is_and_several_as_a_series(store: Store) -> None:
    X, names = summary_matrix(store, np.array([4]), ("letter", "letters"))
    assert list(names[:4]) == ["letter.0", "letter.1", "letter.2", "letter.since_last"]
    assert X[0, :4].tolist() == [4.0, -4.0, 1.0, 0.75]
    assert len(names) == 4 + 2 * 9
    assert X[0, names.index("letters.1.mean")] == 4.0


def test_signals_are_summarised_by_channel(store: Store) -> None:
    found = columns(store, np.array([4]))
    x = store.sample(4).modalities["ecg"].values.astype(float)
    assert found["ecg.steps"][0] == 300
    assert found["ecg.ii.std"][0] == pytest.approx(x[:, 1].std())
    assert found["ecg.i.q95"][0] == pytest.approx(np.quantile(x[:, 0], 0.95))
    assert found["ecg.i.step"][0] == pytest.approx(np.abs(np.diff(x[:, 0])).mean())


def test_an_absent_modality_is_missing_and_pieces_change_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.random.default_rng(1).permutation(len(store))
    whole, names = summary_matrix(store, order, READS)
    for name in READS:
        absent = np.isnan(whole[:, [i for i, column in enumerate(names) if column.startswith(f"{name}.")]])
        np.testing.assert_array_equal(absent.all(axis=1), ~store.present(name)[order])
        np.testing.assert_array_equal(absent.any(axis=1), ~store.present(name)[order])
    monkeypatch.setattr(summaries, "PIECE", 7)
    np.testing.assert_array_equal(summary_matrix(store, order, READS)[0], whole)


@pytest.mark.parametrize("task", [task.name for task in TASKS])
def test_a_linear_model_reads_the_signal_out_of_each_summary(store: Store, task: str) -> None:
    baseline = fit_baseline("logistic", store, task)
    test = store.indices(task, "test", modalities=baseline.modalities)
    X, _ = summary_matrix(store, test, baseline.modalities)
    scores = evaluate_predictions(
        "binary", store.target(task, test), baseline.predict(X), classes=("no", "yes"), bootstrap=0
    )
    assert scores.metrics["auroc"] > 0.95
