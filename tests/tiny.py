"""The smallest models, batches and recipes that still have every kind of modality and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flame_moe.batch import FlexiBatch, Observation, Sample, collate
from flame_moe.continual.methods import METHODS
from flame_moe.nn import Flame
from flame_moe.schema import Modality, ModelConfig, Recipe, Task
from tests.example_stores import MODALITIES, TASKS

BY_NAME = {m.name: m for m in MODALITIES}
EVERYTHING = Task(
    name="everything",
    kind="multiclass",
    modalities=("static", "vitals", "image", "notes", "events", "scans", "ecg"),
    classes=("a", "b", "c"),
)
SHAPE: dict[str, Any] = {
    "width": 8,
    "heads": 2,
    "experts": 4,
    "top_k": 2,
    "hidden": 8,
    "kernel": 3,
    "steps": 5,
    "time_width": 4,
    "patches": 2,
}
TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "bootstrap": 20}
STREAM = (("death",), ("stage",), ("days", "codes"))


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def flame(
    tasks: Sequence[Task] = (EVERYTHING,), modalities: Sequence[Modality] = MODALITIES, seed: int = 0, **changes: Any
) -> Flame:
    """A network with its first stage's modalities, routers and heads, in evaluation mode."""
    torch.manual_seed(seed)
    model = Flame(config(**changes))
    for modality in modalities:
        model.add_modality(modality, 0)
    model.add_router_heads([m.name for m in modalities], 0)
    for task in tasks:
        model.add_task(task)
    return model.eval()


def sample(
    number: int, generator: np.random.Generator, modalities: Sequence[str], *, lengths: tuple[int, int] = (1, 7)
) -> Sample:
    """A scaled sample with exactly these modalities."""
    parts = {}
    for name in modalities:
        m = BY_NAME[name]
        steps = 1 if m.kind == "table" else int(generator.integers(lengths[0], lengths[1]))
        steps *= 40 if m.kind == "waveform" else 1
        values = generator.normal(size=(steps, m.features)).astype(np.float32)
        if m.kind == "codes":
            values[:] = generator.integers(0, (len(m.types), m.vocabulary + 1), size=(steps, 2))
        times = np.sort(generator.random(steps)).astype(np.float32) if m.has_times else None
        observed = None
        if m.has_observed:
            observed = generator.random(values.shape) < 0.6
            observed[0, 0] = True
        parts[name] = Observation(values, times, observed)
    targets = {EVERYTHING.name: np.array([generator.integers(3)], dtype=np.float32)}
    return Sample(f"s{number}", f"p{number}", parts, targets)


def batch_of(samples: Sequence[Sample], task: Task = EVERYTHING) -> FlexiBatch:
    return collate(samples, task.name, task.modalities, task.target_width)


def full_batch(n: int = 6, seed: int = 0, **options: Any) -> FlexiBatch:
    """A batch in which every sample has every modality."""
    generator = np.random.default_rng(seed)
    return batch_of([sample(i, generator, EVERYTHING.modalities, **options) for i in range(n)])


def recipe(
    stages: Sequence[Sequence[str]] = STREAM,
    *,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    method: dict[str, Any] | None = None,
    **more: Any,
) -> Recipe:
    """A recipe for the example store."""
    data = {
        "name": "tiny",
        "data": {"source": "clinic"},
        "stages": [{"tasks": list(tasks)} for tasks in stages],
        "model": {**SHAPE, **(model or {})},
        "train": {**TRAIN, **(train or {})},
        "method": _small(method or {}),
    }
    return Recipe.parse({**data, **more}, where="tiny")


def _small(method: dict[str, Any]) -> dict[str, Any]:
    """FLAME of rank 2, or the method asked for, with rank 2 if it has one."""
    name = method.get("name", "flame")
    return {"name": name, **({"rank": 2} if name in METHODS and "rank" in METHODS[name].keys else {}), **method}


__all__ = ["BY_NAME", "EVERYTHING", "MODALITIES", "STREAM", "TASKS", "batch_of", "config", "flame", "full_batch"]
__all__ += ["recipe", "sample"]
