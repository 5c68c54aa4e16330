"""From the store to batches of one task."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flame_moe.batch import FlexiBatch, ModalityBatch
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.scaled import scaled
from flame_moe.data.store import Store, spread
from flame_moe.errors import DataError
from flame_moe.schema import Task


@dataclass(frozen=True)
class Loader:
    """Batches of one task.

    Attributes:
        store: where the samples are.
        preprocessor: how they are scaled.
        task: whose modalities are read, exactly these and in this order, and whose target is given.
        indices: (n,) int64 samples of the store; each with at least one of the task's modalities.
        batch_size: samples per batch; the last batch of an epoch may be smaller and is kept.

    Example:
        loader = Loader(store, preprocessor, task, store.indices(task.name, "train"), 64)
        for batch in loader.batches(np.random.default_rng(0)):
            ...
    """

    store: Store
    preprocessor: Preprocessor
    task: Task
    indices: NDArray[np.int64]
    batch_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"a batch of {self.batch_size} samples", mend="Use a batch size of at least 1.")
        if len(self.indices) == 0:
            mend = "Check the split, the labels and the modalities of the task."
            raise DataError("there is no sample to load", where=f"task '{self.task.name}'", mend=mend)

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return -(-len(self.indices) // self.batch_size)

    def batches(
        self, generator: np.random.Generator | None = None, device: torch.device | str | None = None
    ) -> Iterator[FlexiBatch]:
        """One epoch: every sample once, shuffled if a generator is given, else in the order of `indices`."""
        order = self.indices if generator is None else generator.permutation(self.indices)
        for start in range(0, len(order), self.batch_size):
            batch = make_batch(self.store, self.preprocessor, self.task, order[start : start + self.batch_size])
            yield batch if device is None else to_device(batch, device)


def make_batch(store: Store, preprocessor: Preprocessor, task: Task, indices: ArrayLike) -> FlexiBatch:
    """Gather, scale and pad samples; the same as `flame_moe.batch.collate` of scaled samples, without a loop.

    Args:
        store: where the samples are.
        preprocessor: how they are scaled.
        task: which modalities and which target.
        indices: (B,) positions in the store.

    Raises:
        DataError: if there are no samples, or one has none of the task's modalities.
    """
    wanted = np.asarray(indices, dtype=np.int64)
    if len(wanted) == 0:
        raise DataError("a batch needs at least one sample", where=f"task '{task.name}'")
    some = np.logical_or.reduce([store.present(name)[wanted] for name in task.modalities])
    if not some.all():
        lacking = store.ids(wanted[~some][:1])[0]
        raise DataError(
            f"sample '{lacking}' has none of the modalities {', '.join(task.modalities)}",
            where=f"task '{task.name}'",
            mend="Choose samples with `Store.indices`.",
        )
    parts = {name: pad_modality(store, preprocessor, name, wanted) for name in task.modalities}
    return FlexiBatch(
        task=task.name,
        size=len(wanted),
        modalities={name: part for name, part in parts.items() if part is not None},
        target=torch.from_numpy(store.target(task.name, wanted)),
        ids=store.ids(wanted),
    )


def to_device(batch: FlexiBatch, device: torch.device | str) -> FlexiBatch:
    """The batch with its tensors on a device."""
    parts = {name: part_to_device(part, device) for name, part in batch.modalities.items()}
    return batch._replace(modalities=parts, target=batch.target.to(device))


def part_to_device(part: ModalityBatch, device: torch.device | str) -> ModalityBatch:
    """One modality of a batch with its tensors on a device."""
    return ModalityBatch._make(None if tensor is None else tensor.to(device) for tensor in part)


def pad_modality(
    store: Store, preprocessor: Preprocessor, modality: str, wanted: NDArray[np.int64]
) -> ModalityBatch | None:
    """One modality of some samples, scaled and padded; None where none of them has it.

    The packed steps of all samples are written to their places in (n, L, ...) with one assignment per array.
    """
    part = store.gather(modality, wanted)
    if len(part.rows) == 0:
        return None
    n, longest = len(part.rows), int(part.lengths.max())
    places = spread(np.arange(n, dtype=np.int64) * longest, part.lengths)
    values = scaled(store, preprocessor, modality, part)

    def placed(packed: NDArray[np.generic]) -> torch.Tensor:
        padded = np.zeros((n * longest, *packed.shape[1:]), dtype=packed.dtype)
        padded[places] = packed
        return torch.from_numpy(padded.reshape(n, longest, *packed.shape[1:]))

    return ModalityBatch(
        rows=torch.from_numpy(part.rows),
        values=placed(values),
        lengths=torch.from_numpy(part.lengths),
        times=None if part.times is None else placed(part.times),
        observed=None if part.observed is None else placed(part.observed),
        places=torch.from_numpy(places),
    )
