"""Small ragged sample sets with every kind of modality and task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flame_moe.batch import Observation, Sample
from flame_moe.data.funnel import Funnel
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.writer import StoreWriter
from flame_moe.schema import Modality, Task

MODALITIES = (
    Modality(name="vitals", kind="series", features=3, channels=("hr", "sbp", "temp")),
    Modality(name="notes", kind="timed", features=4),
    Modality(name="image", kind="patches", features=2, scaling="none"),
    Modality(name="static", kind="table", features=2, scaling="quantile"),
    Modality(name="events", kind="codes", features=2, types=("diagnosis", "drug", "lab"), vocabulary=6),
    Modality(name="scans", kind="image", features=70, shape=(10, 7, 1)),
    Modality(name="ecg", kind="waveform", features=2, rate=100.0),
)
NEW = ("events", "scans", "ecg")
TASKS = (
    Task(name="death", kind="binary", modalities=("vitals", "static"), classes=("no", "yes")),
    Task(name="stage", kind="multiclass", modalities=("image", "notes"), classes=("a", "b", "c")),
    Task(name="codes", kind="multilabel", modalities=("notes",), classes=("x", "y")),
    Task(name="days", kind="regression", modalities=("vitals", "image"), classes=("days",)),
    Task(name="block", kind="binary", modalities=("ecg", "events", "scans"), classes=("no", "yes")),
    Task(name="dose", kind="regression", modalities=("scans", "events", "ecg"), classes=("mg", "days")),
)


def random_sample(number: int, generator: np.random.Generator, subject: str | None = None) -> Sample:
    """A sample with a random non-empty subset of modalities and of labels."""
    parts: dict[str, Observation] = {}
    for m in MODALITIES:
        if m.name in NEW:
            continue
        steps = 1 if m.kind == "table" else int(generator.integers(1, 9))
        values = generator.normal(5.0, 2.0, (steps, m.features)).astype(np.float32)
        times = np.sort(generator.random(steps)).astype(np.float32) if m.has_times else None
        observed = None
        if m.has_observed:
            observed = generator.random(values.shape) < 0.6
            observed[0, 0] = True
        parts[m.name] = Observation(values, times, observed)
    keep = generator.random(len(parts)) < 0.7
    keep[generator.integers(len(parts))] = True
    modalities = {name: part for (name, part), kept in zip(parts.items(), keep, strict=True) if kept}
    targets = {
        "death": [float(generator.integers(2))],
        "stage": [float(generator.integers(3))],
        "codes": generator.integers(0, 2, 2).astype(float).tolist(),
        "days": [float(generator.normal(6.0, 3.0))],
    }
    known = {name: np.array(t, dtype=np.float32) for name, t in targets.items() if generator.random() < 0.9}
    # Drawn apart, so that what was drawn before there were such kinds is drawn still.
    generator = np.random.default_rng([number, 1])
    modalities |= new_parts(generator)
    known["block"] = np.array([generator.integers(2)], dtype=np.float32)
    known["dose"] = generator.normal(5.0, 2.0, 2).astype(np.float32)
    return Sample(f"s{number}", subject or f"p{number // 2}", modalities, known)


def new_parts(generator: np.random.Generator) -> dict[str, Observation]:
    """Any subset of codes, pictures and signals."""
    parts: dict[str, Observation] = {}
    for name in NEW:
        m = next(m for m in MODALITIES if m.name == name)
        steps = int(generator.integers(1, 200 if m.kind == "waveform" else 4))
        if m.kind == "codes":
            values = np.stack([generator.integers(0, 3, steps), generator.integers(1, 10, steps)], axis=1)
        elif m.kind == "image":
            values = generator.integers(0, 256, (steps, m.features), dtype=np.uint8)
        else:
            values = generator.normal(size=(steps, m.features)).astype(np.float32)
        times = np.sort(generator.random(steps)).astype(np.float32) if m.has_times else None
        if generator.random() < 0.7:
            parts[name] = Observation(values, times)
    return parts


def random_samples(n: int, seed: int = 0) -> list[Sample]:
    generator = np.random.default_rng(seed)
    return [random_sample(i, generator) for i in range(n)]


def write(path: Path, samples: Sequence[Sample], split: Any = None, **options: Any) -> Store:
    """A store of the samples."""
    funnel = Funnel()
    funnel.start(len(samples), "made up")
    rule = SplitSpec() if split is None else split
    with StoreWriter(path, source="example", options={}, modalities=MODALITIES, tasks=TASKS) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.finish(rule, funnel, **options)
