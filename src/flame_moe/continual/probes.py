"""Probe inputs: a few samples on which a task's logits are written down, to be computed again later.

Synthetic probes are drawn from the preprocessing statistics, which travel with the model anyway; they hold no patient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_moe.batch import FlexiBatch, Observation, Sample, collate
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from flame_moe.schema import SPLITS, Modality, Task
from flame_moe.training.seeding import generator

COUNT = 16
STEPS = {"table": (1, 1), "image": (1, 2), "waveform": (64, 512)}
USUAL_STEPS = (1, 12)


def synthetic(task: Task, modalities: Mapping[str, Modality], preprocessor: Preprocessor) -> list[Sample]:
    """Samples that nobody is: complete ones, every modality alone, every modality missing, and random subsets.

    They depend on the name of the task and the statistics alone. A channel is drawn from its own distribution in the
    training data, so the values are plausible one by one and unrelated to each other.
    """
    random = generator(0, "probes", task.name)
    return [
        Sample(f"probe{i}", "", {m: _draw(modalities[m], preprocessor, random) for m in present}, {})
        for i, present in enumerate(_patterns(task.modalities, random))
    ]


def taken(task: Task, store: Store, split: str) -> list[Sample]:
    """Samples of a split, of as many patterns of missing modalities as there are, without ids and labels.

    Raises:
        DataError: if the split has no sample with one of the task's modalities.
    """
    if split not in ("train", "val"):
        raise DataError(f"probes from the {split} split", mend=f"Use {' or '.join(SPLITS[:2])}, or synthetic ones.")
    for name in task.modalities:
        if name not in store.modalities or not len(store.indices(None, split, modalities=[name])):
            what = f"the {split} split has no sample with modality '{name}' to take probes from"
            raise DataError(what, where=f"task '{task.name}', {store.path}", mend="Name another store.")
    return [
        Sample(f"probe{i}", "", {m: part for m in task.modalities if (part := found.get(m)) is not None}, {})
        for i, found in enumerate(store.sample(int(index)).modalities for index in _varied(task, store, split))
    ]


def to_batch(samples: Sequence[Sample], task: Task, preprocessor: Preprocessor) -> FlexiBatch:
    """Scaled and padded, all in one batch."""
    scaled = [
        sample._replace(
            modalities={
                name: part._replace(values=preprocessor.apply(name, part.values, part.observed))
                for name, part in sample.modalities.items()
            }
        )
        for sample in samples
    ]
    return collate(scaled, task.name, task.modalities, task.target_width)


def pack(samples: Iterable[Sample]) -> dict[str, Tensor]:
    """Samples as named tensors: "<number>/<modality>/<values, times or observed>"."""
    return {
        f"{i}/{name}/{key}": torch.from_numpy(np.ascontiguousarray(array))
        for i, sample in enumerate(samples)
        for name, part in sample.modalities.items()
        for key, array in part._asdict().items()
        if array is not None
    }


def unpack(tensors: Mapping[str, Tensor]) -> list[Sample]:
    """What `pack` packed; raises KeyError or ValueError on anything else."""
    found: dict[int, dict[str, dict[str, NDArray[Any]]]] = {}
    for key, tensor in tensors.items():
        number, name, part = key.split("/")
        found.setdefault(int(number), {}).setdefault(name, {})[part] = tensor.numpy()
    return [
        Sample(f"probe{i}", "", {name: Observation(**parts) for name, parts in found[i].items()}, {})
        for i in range(len(found))
    ]


def _patterns(names: Sequence[str], random: np.random.Generator) -> list[tuple[str, ...]]:
    """Which modalities each probe has."""
    chosen = [tuple(names), *((name,) for name in names)]
    if len(names) > 2:
        chosen += [tuple(other for other in names if other != name) for name in names]
    while len(chosen) < COUNT:
        keep = random.random(len(names)) < 0.6
        keep[random.integers(len(names))] = True
        chosen.append(tuple(name for name, kept in zip(names, keep, strict=True) if kept))
    return chosen


def _draw(modality: Modality, preprocessor: Preprocessor, random: np.random.Generator) -> Observation:
    low, high = STEPS.get(modality.kind, USUAL_STEPS)
    steps = int(random.integers(low, high + 1))
    values = preprocessor.scalers[modality.name].draw(random, steps, modality.features)
    if modality.kind == "codes":
        values[:, 0] = random.integers(0, len(modality.types), steps)
    if modality.pretrained is not None:
        values = random.integers(1, int(modality.pretrained.config["vocab_size"]) + 1, values.shape)
        values[np.arange(modality.features) >= random.integers(1, modality.features + 1, (steps, 1))] = 0
    times = np.sort(random.random(steps)).astype(np.float32) if modality.has_times else None
    observed = None
    if modality.has_observed:
        observed = random.random(values.shape) < 0.7
        observed[0, random.integers(modality.features)] = True
        values = np.where(observed, values, 0.0)
    return Observation(values.astype(modality.storage), times, observed)


def _varied(task: Task, store: Store, split: str) -> list[int]:
    """At least `COUNT` samples if there are so many: the patterns of present modalities take turns, most first."""
    indices = store.indices(None, split, modalities=task.modalities)
    present = np.stack([store.present(name)[indices] for name in task.modalities], axis=1)
    patterns, of = np.unique(present, axis=0, return_inverse=True)
    queues = [list(indices[of.ravel() == i]) for i in np.argsort(-patterns.sum(axis=1), kind="stable")]
    chosen: list[int] = []
    covered: set[str] = set()
    while queues and (len(chosen) < COUNT or covered < set(task.modalities)):
        queue = queues.pop(0)
        chosen.append(int(queue.pop(0)))
        covered |= {name for name in task.modalities if store.present(name)[chosen[-1]]}
        if queue:
            queues.append(queue)
    return chosen
