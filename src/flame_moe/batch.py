"""Samples and batches: ragged sequences with absence kept as absence.

Shape suffixes: B samples in the batch, n of them that have the modality, L steps, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_moe.errors import DataError


class Observation(NamedTuple):
    """One modality of one sample, as numpy arrays in natural units.

    Attributes:
        values: (L, C) float32, L >= 1; cells that are not observed hold anything. Codes are int32, images uint8.
        times: (L,) float32, non-decreasing, >= 0, or None for modalities without times.
        observed: (L, C) bool, or None where every cell is observed.
    """

    values: NDArray[Any]
    times: NDArray[np.float32] | None = None
    observed: NDArray[np.bool_] | None = None


class Sample(NamedTuple):
    """A unit of prediction (a stay, an exam, an image) with any non-empty subset of modalities.

    Attributes:
        id: unique in its store.
        subject: the person; splits are by subject.
        modalities: modality name -> Observation; an absent modality has no entry.
        targets: task name -> (target_width,) float32; an absent label has no entry.
        split: train, val or test where the source fixes it; then every sample of the source needs one.
    """

    id: str
    subject: str
    modalities: Mapping[str, Observation]
    targets: Mapping[str, NDArray[np.float32]]
    split: str | None = None


class ModalityBatch(NamedTuple):
    """One modality of a batch: only the samples that have it.

    Attributes:
        rows: (n,) int64, ascending positions in the batch.
        values: (n, L, C) float32, zero beyond each length and where not observed.
        lengths: (n,) int64, each >= 1.
        times: (n, L) float32 or None.
        observed: (n, L, C) bool or None.
        places: (P,) int64, ascending: where the steps that exist are among all n L. Known where the batch is made, so
            that a device need not be asked how many there are; None is asked for.
    """

    rows: Tensor
    values: Tensor
    lengths: Tensor
    times: Tensor | None = None
    observed: Tensor | None = None
    places: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(n, L) bool: true on steps that exist, false on padding."""
        steps = torch.arange(self.values.shape[1], device=self.values.device)
        return steps[None, :] < self.lengths[:, None]

    def existing(self) -> Tensor:
        """`places`; waits for the device where they are not known."""
        return self.mask.flatten().nonzero().squeeze(1) if self.places is None else self.places

    def take(self, padded: Tensor) -> Tensor:
        """(n, L, ...) -> (P, ...) of the steps that exist."""
        return padded.flatten(0, 1).index_select(0, self.existing())

    def put(self, steps: Tensor) -> Tensor:
        """The way back, (P, ...) -> (n, L, ...), zeros on padding."""
        n, length = self.values.shape[:2]
        padded = steps.new_zeros(n * length, *steps.shape[1:])
        return padded.index_copy(0, self.existing(), steps).unflatten(0, (n, length))


class FlexiBatch(NamedTuple):
    """Samples of one task. A modality that is not there is an absent row, never a zero-filled one.

    Attributes:
        task: name of the task.
        size: B.
        modalities: modality name -> ModalityBatch; modalities that no sample has are left out.
        target: (B, target_width) float32, NaN where unknown.
        ids: B sample ids.
    """

    task: str
    size: int
    modalities: dict[str, ModalityBatch]
    target: Tensor
    ids: tuple[str, ...]


def collate(samples: Sequence[Sample], task: str, modalities: Sequence[str], target_width: int) -> FlexiBatch:
    """Pad ragged samples into a batch: the simple reference that the store's fast path is tested against.

    Args:
        samples: at least one.
        task: which target to take.
        modalities: which modalities to take; others are not read.
        target_width: width of the target, for samples without one.

    Raises:
        DataError: if there are no samples, or one has none of the modalities.
    """
    if not samples:
        raise DataError("a batch needs at least one sample", where=f"task '{task}'")
    for sample in samples:
        if not any(name in sample.modalities for name in modalities):
            raise DataError(
                f"sample '{sample.id}' has none of the modalities {', '.join(modalities)}",
                where=f"task '{task}'",
                mend="Leave it out, or give it at least one.",
            )
    parts: dict[str, ModalityBatch] = {}
    for name in modalities:
        rows = [i for i, sample in enumerate(samples) if name in sample.modalities]
        if rows:
            parts[name] = _pad([samples[i].modalities[name] for i in rows], rows)
    unknown = np.full(target_width, np.nan, dtype=np.float32)
    target = np.stack([np.asarray(s.targets.get(task, unknown), dtype=np.float32) for s in samples])
    return FlexiBatch(task, len(samples), parts, torch.from_numpy(target), tuple(s.id for s in samples))


def _pad(observations: Sequence[Observation], rows: Sequence[int]) -> ModalityBatch:
    lengths = np.array([len(o.values) for o in observations])
    shape = (len(observations), int(lengths.max()), observations[0].values.shape[1])
    values = np.zeros(shape, dtype=np.float32)
    times = np.zeros(shape[:2], dtype=np.float32) if observations[0].times is not None else None
    observed = np.zeros(shape, dtype=bool) if observations[0].observed is not None else None
    for i, o in enumerate(observations):
        n = len(o.values)
        values[i, :n] = o.values if o.observed is None else np.where(o.observed, o.values, 0.0)
        if times is not None and o.times is not None:
            times[i, :n] = o.times
        if observed is not None and o.observed is not None:
            observed[i, :n] = o.observed
    return _placed(
        ModalityBatch(
            rows=torch.as_tensor(rows, dtype=torch.int64),
            values=torch.from_numpy(values),
            lengths=torch.from_numpy(lengths.astype(np.int64)),
            times=None if times is None else torch.from_numpy(times),
            observed=None if observed is None else torch.from_numpy(observed),
        )
    )


def drop_modalities(batch: FlexiBatch, rate: float) -> FlexiBatch:
    """Training only: hide each modality of each sample with probability `rate`; a sample that would lose all keeps all.

    Draws from PyTorch's global generator.
    """
    if rate <= 0 or len(batch.modalities) < 2:
        return batch
    names = list(batch.modalities)
    present = torch.zeros(batch.size, len(names), dtype=torch.bool)
    for j, name in enumerate(names):
        present[batch.modalities[name].rows, j] = True
    kept = present & (torch.rand(batch.size, len(names)) >= rate)
    kept = torch.where(kept.any(1, keepdim=True), kept, present)
    parts = {}
    for j, name in enumerate(names):
        keep = kept[batch.modalities[name].rows, j]
        if keep.any():
            parts[name] = _select(batch.modalities[name], keep)
    return batch._replace(modalities=parts)


def drop_cells(batch: FlexiBatch, rate: float) -> FlexiBatch:
    """Training only: hide observed cells of series and tables, as if they had never been measured.

    Each sample hides a share of its own, drawn uniformly from 0 to `rate`, so that complete samples are seen as well
    and predictions for them stay calibrated. Draws from PyTorch's global generator.
    """
    if rate <= 0:
        return batch
    share = torch.rand(batch.size) * rate
    parts = dict(batch.modalities)
    for name, part in parts.items():
        if part.observed is not None:
            kept = torch.rand(part.observed.shape) >= share[part.rows.cpu()][:, None, None]
            parts[name] = part._replace(observed=part.observed & kept.to(part.observed.device))
    return batch._replace(modalities=parts)


def _placed(part: ModalityBatch) -> ModalityBatch:
    """The batch, knowing its places."""
    return part._replace(places=part.existing())


def _select(part: ModalityBatch, keep: Tensor) -> ModalityBatch:
    return _placed(
        ModalityBatch(
            rows=part.rows[keep],
            values=part.values[keep],
            lengths=part.lengths[keep],
            times=None if part.times is None else part.times[keep],
            observed=None if part.observed is None else part.observed[keep],
        )
    )
