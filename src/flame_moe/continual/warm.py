"""Warm start: a new stage's routers and heads begin as those of the earlier task whose data are routed alike.

The fingerprint of a task is, per modality, the share of its training samples that each expert of each block gets. The
samples of a new task are sent through the routers of every earlier task with which it shares a modality; similarity is
the cosine between what they and the earlier task's own samples get there, over the shared modalities laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flame_moe.data.loader import make_batch
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.nn.fusion import Head
from flame_moe.nn.model import Flame
from flame_moe.schema import Task
from flame_moe.training.routing import fingerprints

SAMPLES = 512
BATCH = 256
TIE = 1e-6

Fingerprint = Mapping[str, tuple[float, ...]]
"""Modality -> activation of each expert, one block after the other."""


@dataclass(frozen=True)
class WarmStart:
    """What a new task began with.

    Attributes:
        task: the new one.
        source: the most similar earlier task, or None: no earlier task shares a routed modality.
        similarity: cosine, 0 to 1; None without a source.
        modalities: shared ones, whose routers and part of the head were taken over.
        linear: whether the last layer of the head was taken over too: both tasks have the same kind and outputs.
    """

    task: str
    source: str | None
    similarity: float | None
    modalities: tuple[str, ...]
    linear: bool


def fingerprint(
    model: Flame, preprocessor: Preprocessor, store: Store, task: Task, reader: Task, names: Sequence[str], cursor: int
) -> Fingerprint:
    """Where up to `SAMPLES` training samples of a task go.

    Args:
        model: the network.
        preprocessor: how values are scaled.
        store: where the samples are.
        task: whose training samples.
        reader: a task of the model that is read at `cursor` and reads all of `names`.
        names: which modalities are sent through.
        cursor: whose routers.
    """
    indices = store.indices(task.name, "train", modalities=names)
    indices = indices[np.unique(np.linspace(0, len(indices) - 1, min(SAMPLES, len(indices))).astype(np.int64))]
    narrow = task.model_copy(update={"modalities": tuple(names)})
    pieces = (indices[i : i + BATCH] for i in range(0, len(indices), BATCH))
    batches = (make_batch(store, preprocessor, narrow, piece)._replace(task=reader.name) for piece in pieces)
    found: dict[str, tuple[float, ...]] = {}
    for part in sorted(fingerprints(model, batches, cursor), key=lambda part: part.block):
        found[part.modality] = (*found.get(part.modality, ()), *part.activation)
    return found


def choose_source(
    model: Flame,
    preprocessor: Preprocessor,
    store: Store,
    task: Task,
    earlier: Mapping[str, Fingerprint],
    cursors: Mapping[str, int],
) -> WarmStart:
    """The earlier task that is most similar to a new one.

    Of tasks that are equally similar (to 1e-6) the one that shares more modalities is taken, then the one learned
    later, then the one named first in its stage.

    Args:
        model: the network, at whose earlier cursors the samples are routed.
        preprocessor, store: of the new task's training samples.
        task: the new one.
        earlier: task -> the fingerprint of its own training samples at its own cursor.
        cursors: of these tasks.
    """
    best, rank = WarmStart(task.name, None, None, (), False), (-1.0, 0, 0)
    for name, theirs in earlier.items():
        shared = [m for m in task.modalities if m in theirs]
        if not shared or not len(store.indices(task.name, "train", modalities=shared)):
            continue
        source = model.tasks[name]
        ours = fingerprint(model, preprocessor, store, task, source, shared, cursors[name])
        shared = [m for m in shared if m in ours]
        similarity = _cosine([x for m in shared for x in ours[m]], [x for m in shared for x in theirs[m]])
        place = (similarity, len(shared), cursors[name])
        if similarity > rank[0] + TIE or (abs(similarity - rank[0]) <= TIE and place[1:] > rank[1:]):
            same = (task.kind, task.outputs) == (source.kind, source.outputs)
            best, rank = WarmStart(task.name, name, similarity, tuple(shared), same), place
    return best


def start_warm(model: Flame, stage: int, starts: Iterable[WarmStart], cursors: Mapping[str, int]) -> None:
    """Copy routers and heads. A modality's router comes from the most similar source of a task that shares it."""
    taken: dict[str, tuple[float, int]] = {}
    for start in starts:
        if start.source is None or start.similarity is None:
            continue
        for name in start.modalities:
            if name not in taken or start.similarity > taken[name][0]:
                taken[name] = (start.similarity, cursors[start.source])
        old, new = model.heads[start.source], model.heads[start.task]
        assert isinstance(old, Head)
        assert isinstance(new, Head)
        _copy_head(old, new, start)
    for name, (_, cursor) in taken.items():
        for router in model.routers(name):
            if str(stage) in router.heads:
                router.heads[str(stage)].load_state_dict(router.head(cursor).state_dict())


@torch.no_grad()
def _copy_head(old: Head, new: Head, start: WarmStart) -> None:
    width = new.absent.shape[1]
    for name in start.modalities:
        i, j = old.modalities.index(name), new.modalities.index(name)
        there, here = slice(i * width, (i + 1) * width), slice(j * width, (j + 1) * width)
        new.absent[j] = old.absent[i]
        if new.query is not None and old.query is not None:
            new.query[j] = old.query[i]
        new.norm.weight[here], new.norm.bias[here] = old.norm.weight[there], old.norm.bias[there]
        if start.linear:
            new.linear.weight[:, here] = old.linear.weight[:, there]
    if start.linear:
        new.linear.bias.copy_(old.linear.bias)


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    one: NDArray[np.float64] = np.array(a)
    other: NDArray[np.float64] = np.array(b)
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length else 0.0
