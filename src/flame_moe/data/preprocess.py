"""Preprocessing that is fitted on the training split and applied everywhere, exactly the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.labels import class_counts
from flame_moe.data.scaling import Identity, Pixels, Quantile, Scaler, Standard, Vocabulary, parse_scaler
from flame_moe.data.store import Store
from flame_moe.errors import DataError, StoreError, nearest
from flame_moe.schema import Modality, Task

CELLS = 1 << 22


@dataclass(frozen=True)
class Preprocessor:
    """Scalers of the modalities and statistics of the labels.

    Attributes:
        scalers: modality name -> its scaler.
        labels: task name -> "mean" and "std" (lists) of a regression, or "counts" of the classes, and "labelled".

    Example:
        preprocessor = Preprocessor.from_store(store)
        part = store.gather("rows", indices)
        scaled = preprocessor.apply("rows", part.values, part.observed)
    """

    scalers: Mapping[str, Scaler]
    labels: Mapping[str, Mapping[str, Any]]

    @classmethod
    def fit(cls, store: Store, split: str = "train") -> Preprocessor:
        """Fit on one split of a store, piece by piece.

        Raises:
            DataError: if the split has no sample.
        """
        indices = store.indices(split=split)
        if len(indices) == 0:
            raise DataError(f"the {split} split has no sample to fit statistics on", where=str(store.path))
        scalers = {name: _fit_scaler(store, m, indices) for name, m in store.modalities.items()}
        labels = {name: _label_statistics(store, t, indices) for name, t in store.tasks.items()}
        return cls(scalers, labels)

    @classmethod
    def from_store(cls, store: Store) -> Preprocessor:
        """The statistics that the store's manifest carries.

        Raises:
            StoreError: if the store has none, because it holds no training split.
        """
        if store.manifest["statistics"] is None:
            mend = "Use the statistics of the checkpoint that scores it."
            raise StoreError("the store has no training split, so no statistics", where=str(store.path), mend=mend)
        return cls.parse(store.manifest["statistics"], where=str(store.path))

    def apply(self, modality: str, values: NDArray[Any], observed: NDArray[np.bool_] | None) -> NDArray[np.float32]:
        """Scale packed steps (S, C); 0 where not observed.

        Raises:
            DataError: if nothing was fitted for the modality.
        """
        if modality not in self.scalers:
            mend = nearest(modality, self.scalers)
            raise DataError(f"no statistics were fitted for modality '{modality}'", mend=mend)
        return self.scalers[modality].apply(values, observed)

    def target_scale(self, task: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of a regression's training labels, (target_width,) each; deviation 0 becomes 1.

        Raises:
            DataError: if the task is no regression, or had no training labels.
        """
        found = self._labels_of(task, "mean")
        std = np.array(found["std"], dtype=np.float32)
        return np.array(found["mean"], dtype=np.float32), np.where(std > 0, std, np.float32(1.0))

    def class_counts(self, task: str) -> NDArray[np.int64]:
        """Training counts: (2,) negative, positive; (classes,); or (2, labels) for multilabel.

        Raises:
            DataError: if the task is a regression, or had no training labels.
        """
        return np.array(self._labels_of(task, "counts")["counts"], dtype=np.int64)

    def plain(self) -> dict[str, Any]:
        """JSON-ready data that `parse` reads back."""
        return {
            "modalities": {name: scaler.plain() for name, scaler in self.scalers.items()},
            "tasks": {name: dict(found) for name, found in self.labels.items()},
        }

    @classmethod
    def parse(cls, data: Any, *, where: str = "statistics") -> Preprocessor:
        """Read back what `plain` wrote.

        Raises:
            StoreError: if the data are no statistics.
        """
        try:
            scalers = {str(name): parse_scaler(scaler) for name, scaler in data["modalities"].items()}
            return cls(scalers, {str(name): dict(found) for name, found in data["tasks"].items()})
        except (KeyError, TypeError, ValueError, AttributeError):
            raise StoreError("the statistics cannot be read", where=where, mend="Prepare the store again.") from None

    def _labels_of(self, task: str, kind: str) -> Mapping[str, Any]:
        if task not in self.labels:
            raise DataError(f"no statistics were fitted for task '{task}'", mend=nearest(task, self.labels))
        found = self.labels[task]
        if kind not in found:
            kinds = "target scale (it is no regression)" if kind == "mean" else "class counts (it is a regression)"
            what = "training labels" if found["labelled"] == 0 else kinds
            raise DataError(f"task '{task}' has no {what}")
        return found


def _fit_scaler(store: Store, modality: Modality, indices: NDArray[np.int64]) -> Scaler:
    chunks = _chunks(store, modality.name, indices)
    if modality.kind == "codes":
        return Vocabulary.fit(chunks, modality.vocabulary)
    if modality.kind == "image":
        return Pixels.fit(chunks)
    if modality.scaling == "none" or modality.kind == "tokens":
        return Identity()
    return (Standard if modality.scaling == "standard" else Quantile).fit(chunks, modality.features)


def _chunks(
    store: Store, modality: str, indices: NDArray[np.int64]
) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_] | None]]:
    """Pieces of about 4 million cells, so that memory does not grow with the number or the length of samples."""
    cells = np.cumsum(store.lengths(modality, indices)) * store.modalities[modality].features
    for piece in np.split(indices, np.flatnonzero(np.diff(cells // CELLS)) + 1):
        part = store.gather(modality, piece)
        yield part.values, part.observed


def _label_statistics(store: Store, task: Task, indices: NDArray[np.int64]) -> dict[str, Any]:
    target = store.target(task.name, indices)
    known = target[~np.isnan(target[:, 0])]
    found: dict[str, Any] = {"labelled": len(known)}
    if len(known) == 0:
        return found
    if task.kind == "regression":
        wide = known.astype(np.float64)
        return {**found, "mean": wide.mean(axis=0).tolist(), "std": wide.std(axis=0).tolist()}
    return {**found, "counts": class_counts(known, task).tolist()}
