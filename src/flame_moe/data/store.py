"""Reading a sample store: memory-mapped columns, gathered for many samples at once.

Its files are described in `flame_moe.data.layout`. A store is written once (`flame_moe.data.writer`), never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from flame_moe.batch import Observation, Sample
from flame_moe.data.columns import FileRecord, hash_file, map_array
from flame_moe.data.labels import labelled as has_label
from flame_moe.data.layout import SAMPLES, layout, read_manifest
from flame_moe.errors import DataError, FlameError, StoreError, nearest
from flame_moe.schema import SPLITS, Modality, Task


class Ragged(NamedTuple):
    """One modality of several samples, packed end to end.

    Attributes:
        rows: (k,) int64, ascending positions, within what was asked for, of the samples that have the modality.
        values: (steps, C) as stored (`Modality.storage`), steps of the k samples one after the other.
        observed: (steps, C) bool or None.
        times: (steps,) float32 or None.
        lengths: (k,) int64, each >= 1.
        steps: (steps,) int64, where they lie among all steps of the modality in the store.
    """

    rows: NDArray[np.int64]
    values: NDArray[Any]
    observed: NDArray[np.bool_] | None
    times: NDArray[np.float32] | None
    lengths: NDArray[np.int64]
    steps: NDArray[np.int64]


class Store:
    """A sample store that is open for reading; made by `Store.open` or `StoreWriter.finish`.

    Attributes:
        path: its folder.
        manifest: the parsed manifest.
        modalities: modality name -> description, in the order of the source.
        tasks: task name -> description, in the order of the source.

    Example:
        store = Store.open("stores/digits")
        train = store.indices("digit", "train")
        labels = store.target("digit", train)
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.modalities = {m["name"]: Modality.parse(m, where=str(path)) for m in manifest["modalities"]}
        self.tasks = {t["name"]: Task.parse(t, where=str(path)) for t in manifest["tasks"]}
        self._records = {name: FileRecord.parse(record) for name, record in manifest["files"].items()}
        self._layout = layout(self.modalities.values(), self.tasks.values())
        self._arrays: dict[str, NDArray[Any]] = {}
        self._present: dict[str, NDArray[np.bool_]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store, checking its version and that every file has its size; `verify` checks the contents.

        Raises:
            StoreError: if it is not a store, is of another version, or a file is missing or truncated.
        """
        path = Path(path)
        manifest = read_manifest(path)
        try:
            store = cls(path, manifest)
            manifest["samples"], manifest["counts"], manifest["labels"], manifest["missing"], manifest["statistics"]
        except (KeyError, TypeError, ValueError, AttributeError, FlameError) as error:
            raise StoreError(f"the manifest is damaged ({error})", where=str(path), mend="Prepare it again.") from None
        store._check_files()
        return store

    def __len__(self) -> int:
        return int(self.manifest["samples"])

    def ids(self, indices: ArrayLike) -> tuple[str, ...]:
        """Ids of the samples at `indices`."""
        return self._strings("id", indices)

    def subjects(self, indices: ArrayLike) -> tuple[str, ...]:
        """Subjects of the samples at `indices`."""
        return self._strings("subject", indices)

    @cached_property
    def splits(self) -> NDArray[np.int8]:
        """(n,) position in `SPLITS` of every sample's split."""
        # Here and below not by the conversions of pyarrow, which import pandas where it is installed.
        return np.asarray(np.from_dlpack(self._table["split"].cast(pa.int8()).combine_chunks()), dtype=np.int8)

    def present(self, modality: str) -> NDArray[np.bool_]:
        """(n,) bool: which samples have the modality."""
        if modality not in self._present:
            offsets = self._array(f"modalities/{self._known(modality)}/offsets.bin")
            self._present[modality] = offsets[1:] > offsets[:-1]
        return self._present[modality]

    def indices(
        self,
        task: str | None = None,
        split: str | None = None,
        *,
        modalities: Sequence[str] | None = None,
        labelled: bool = True,
    ) -> NDArray[np.int64]:
        """Samples of a split that a task can be trained or scored on, ascending int64.

        Args:
            task: keep samples with a label for it and at least one of its modalities; None asks for neither.
            split: train, val or test; None for all.
            modalities: keep samples with at least one of these, instead of the task's own.
            labelled: False also keeps samples without a label.

        Raises:
            DataError: if a name is unknown.
        """
        keep = np.ones(len(self), dtype=bool)
        if split is not None:
            if split not in SPLITS:
                raise DataError(f"unknown split '{split}'", mend=nearest(split, SPLITS))
            keep &= self.splits == SPLITS.index(split)
        if task is not None:
            target = self._array(f"tasks/{self._known_task(task)}/target.bin")
            keep &= has_label(target) if labelled else True
            modalities = self.tasks[task].modalities if modalities is None else modalities
        if modalities is not None:
            keep &= np.logical_or.reduce([self.present(name) for name in modalities])
        return np.flatnonzero(keep).astype(np.int64)

    def target(self, task: str, indices: ArrayLike) -> NDArray[np.float32]:
        """(k, target_width) float32 labels, NaN where there is none."""
        target: NDArray[np.float32] = self._array(f"tasks/{self._known_task(task)}/target.bin")[np.asarray(indices)]
        return target

    def lengths(self, modality: str, indices: ArrayLike) -> NDArray[np.int64]:
        """(k,) number of steps of each sample, 0 where the modality is absent."""
        offsets = self._array(f"modalities/{self._known(modality)}/offsets.bin")
        wanted = np.asarray(indices, dtype=np.int64)
        lengths: NDArray[np.int64] = offsets[wanted + 1] - offsets[wanted]
        return lengths

    def steps(self, modality: str) -> int:
        """How many steps all samples together have of a modality."""
        return int(self._array(f"modalities/{self._known(modality)}/offsets.bin")[-1])

    def gather(self, modality: str, indices: ArrayLike) -> Ragged:
        """One modality of several samples; samples without it are left out (see `Ragged.rows`)."""
        wanted = np.asarray(indices, dtype=np.int64)
        description = self.modalities[self._known(modality)]
        folder = f"modalities/{modality}"
        spans = self.lengths(modality, wanted)
        rows = np.flatnonzero(spans).astype(np.int64)
        lengths = spans[rows]
        steps = spread(self._array(f"{folder}/offsets.bin")[wanted[rows]], lengths)
        return Ragged(
            rows=rows,
            values=self._array(f"{folder}/values.bin")[steps],
            observed=self._array(f"{folder}/observed.bin")[steps] if description.has_observed else None,
            times=self._array(f"{folder}/times.bin")[steps] if description.has_times else None,
            lengths=lengths,
            steps=steps,
        )

    def times(self, modality: str, indices: ArrayLike) -> NDArray[np.float32]:
        """(steps,) times of several samples, packed; values are not touched.

        Raises:
            DataError: if the modality is unknown or has no times.
        """
        if not self.modalities[self._known(modality)].has_times:
            raise DataError(f"modality '{modality}' has no times", where=str(self.path))
        wanted = np.asarray(indices, dtype=np.int64)
        starts = self._array(f"modalities/{modality}/offsets.bin")[wanted]
        times: NDArray[np.float32] = self._array(f"modalities/{modality}/times.bin")[
            spread(starts, self.lengths(modality, wanted))
        ]
        return times

    def sample(self, index: int) -> Sample:
        """One sample in natural units, zero where not observed.

        Raises:
            DataError: if there is no such sample.
        """
        if not 0 <= index < len(self):
            raise DataError(f"there is no sample {index}", where=str(self.path), mend=f"There are {len(self)}.")
        modalities = {}
        for name in self.modalities:
            part = self.gather(name, [index])
            if len(part.rows):
                modalities[name] = Observation(part.values, part.times, part.observed)
        targets = {name: self.target(name, index) for name in self.tasks}
        known = {name: target for name, target in targets.items() if not np.isnan(target[0])}
        return Sample(self.ids([index])[0], self.subjects([index])[0], modalities, known)

    def verify(self) -> None:
        """Recompute the hash of every file and check that every subject is in one split.

        Raises:
            StoreError: naming the first file or subject that is wrong.
        """
        for name, record in self._records.items():
            if hash_file(self.path / name) != record.sha256:
                raise StoreError("a file was changed after the store was written", where=str(self.path / name))
        pairs = set(zip(self.subjects(np.arange(len(self))), self.splits.tolist(), strict=True))
        seen: set[str] = set()
        for subject, _ in sorted(pairs):
            if subject in seen:
                raise StoreError(f"subject '{subject}' is in two splits", where=str(self.path))
            seen.add(subject)

    @cached_property
    def _table(self) -> pa.Table:
        with pa.memory_map(str(self.path / SAMPLES)) as source:
            return pa.ipc.open_file(source).read_all()

    def _strings(self, column: str, indices: ArrayLike) -> tuple[str, ...]:
        wanted = np.ascontiguousarray(indices, dtype=np.int64)
        places = pa.Array.from_buffers(pa.int64(), len(wanted), [None, pa.py_buffer(wanted)])
        return tuple(self._table[column].take(places).to_pylist())

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = map_array(self.path / name, self._records[name])
        return self._arrays[name]

    def _known(self, modality: str) -> str:
        if modality not in self.modalities:
            mend = nearest(modality, self.modalities)
            raise DataError(f"unknown modality '{modality}'", where=str(self.path), mend=mend)
        return modality

    def _known_task(self, task: str) -> str:
        if task not in self.tasks:
            raise DataError(f"unknown task '{task}'", where=str(self.path), mend=nearest(task, self.tasks))
        return task

    def _check_files(self) -> None:
        """Refuse a store whose files are not those of its descriptions, or do not have their sizes."""
        where, mend = str(self.path), "Prepare the store again."
        for name in (SAMPLES, *self._layout):
            if name not in self._records:
                raise StoreError(f"the manifest does not list '{name}'", where=where, mend=mend)
        for name, column in self._layout.items():
            if not column.fits(self._records[name], len(self)):
                raise StoreError("an array does not fit the descriptions", where=str(self.path / name), mend=mend)
        for name, record in self._records.items():
            file = self.path / name
            if not file.is_file():
                raise StoreError("a file of the store is missing", where=str(file), mend=mend)
            if file.stat().st_size != record.bytes:
                what = f"a file of the store has {file.stat().st_size} bytes, not {record.bytes}"
                raise StoreError(what, where=str(file), mend=mend)


def spread(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions start, start + 1, ... of every range, one range after the other.

    Example:
        >>> spread(np.array([10, 40]), np.array([3, 2])).tolist()
        [10, 11, 12, 40, 41]
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
