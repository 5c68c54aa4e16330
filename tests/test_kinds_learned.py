"""From arrays to predictions: codes, pictures and electrocardiograms are learned, stage by stage, and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flame_moe.batch import Observation, Sample
from flame_moe.continual import Learner
from flame_moe.data.codes import code_id
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.writer import StoreWriter
from flame_moe.schema import Modality, Task
from flame_moe.training.metrics import evaluate_predictions
from tests.tiny import recipe

RATE = 100.0
MODALITIES = (
    Modality(name="events", kind="codes", features=2, types=("diagnosis", "drug")),
    Modality(name="scans", kind="image", features=144, shape=(12, 12, 1)),
    Modality(name="ecg", kind="waveform", features=2, channels=("i", "ii"), units=("mV", "mV"), rate=RATE),
)
TASKS = (
    Task(name="late_drug", kind="binary", modalities=("events",), classes=("no", "yes")),
    Task(name="stripes", kind="binary", modalities=("scans",), classes=("down", "across")),
    Task(name="rhythm", kind="multiclass", modalities=("ecg",), classes=("slow", "fast", "irregular")),
)


def heartbeats(rhythm: int, seconds: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """(L, 2) millivolts: a spike per beat in both leads, a slow wander of the baseline, noise."""
    t = np.arange(int(seconds * RATE)) / RATE
    gaps = {0: (1.0, 0.02), 1: (0.5, 0.02), 2: (0.75, 0.3)}[rhythm]
    beats = np.cumsum(np.clip(generator.normal(*gaps, size=60), 0.3, None))
    spikes = np.exp(-(((t[:, None] - beats) / 0.02) ** 2)).sum(axis=1)
    wander = 0.3 * np.sin(2 * np.pi * 0.2 * t + generator.uniform(0, 6))
    leads = np.stack([spikes + wander, 0.6 * spikes - wander], axis=1)
    return (leads + 0.05 * generator.normal(size=leads.shape)).astype(np.float32)


def patient(number: int, generator: np.random.Generator) -> Sample:
    """What matters is the time of a drug, the direction of stripes whatever their place, and the rhythm."""
    late, across, rhythm = generator.integers(2), generator.integers(2), generator.integers(3)
    times = [0.1, 0.9] if late else [0.1, 0.2]
    events = np.array([[0, code_id("fever")], [1, code_id("heparin")]], dtype=np.int32)
    stripes = np.broadcast_to((np.arange(12) + generator.integers(4)) % 4 < 2, (12, 12))
    picture = 80 + 60 * (stripes.T if across else stripes) + generator.integers(0, 20, (12, 12))
    parts = {
        "events": Observation(events, np.array(times, dtype=np.float32)),
        "scans": Observation(picture.reshape(1, 144).astype(np.uint8), np.array([0.5], dtype=np.float32)),
        "ecg": Observation(heartbeats(rhythm, generator.uniform(6, 12), generator)),
    }
    labels = {"late_drug": late, "stripes": across, "rhythm": rhythm}
    return Sample(str(number), str(number), parts, {k: np.array([v], dtype=np.float32) for k, v in labels.items()})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("kinds") / "store"
    with StoreWriter(path, source="test", options={}, modalities=MODALITIES, tasks=TASKS) as writer:
        for number in range(260):
            writer.add(patient(number, generator))
        funnel = Funnel()
        funnel.start(260)
        return writer.finish(SplitSpec(), funnel)


def auroc(learner: Learner, store: Store, task: Task) -> float:
    test = store.indices(task.name, "test")
    logits = learner.predict(store, task.name, test).logits.astype(np.float64)
    if task.kind == "binary":
        p = 1 / (1 + np.exp(-logits[:, 0]))
    else:
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
    y = store.target(task.name, test)
    return evaluate_predictions(task.kind, y, p, classes=task.classes, bootstrap=0).metrics["auroc"]


def test_each_kind_is_learned_in_its_stage_and_kept_bit_for_bit(store: Store, tmp_path: Path) -> None:
    plan = recipe(
        (("late_drug",), ("stripes",), ("rhythm",)),
        model={"width": 16, "hidden": 16, "steps": 12, "patches": 4, "time_width": 8},
        train={"epochs": 10, "lr": 5e-3},
        method={"rank": 4},
    )
    learner, first = Learner(plan), {}
    for stage, task in zip(plan.stages, TASKS, strict=True):
        learner.learn(store, stage)
        assert auroc(learner, store, task) > 0.9, task.name
        first[task.name] = learner.predict(store, task.name, np.arange(len(store))).logits
    loaded = Learner.load(learner.save(tmp_path / "model"))
    for name, logits in first.items():
        np.testing.assert_array_equal(loaded.predict(store, name, np.arange(len(store))).logits, logits)
