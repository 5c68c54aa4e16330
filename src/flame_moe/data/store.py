"""The sample store: a folder of raw memory-mapped columns and one manifest.

    manifest.json                    what is inside: descriptions, funnel, splits, labels, statistics, files and hashes
    samples.arrow                    id, subject, split of every sample
    modalities/<name>/offsets.bin    (n + 1,) int64; sample i owns steps offsets[i]:offsets[i + 1], none = absent
    modalities/<name>/values.bin     (steps, features) float32
    modalities/<name>/times.bin      (steps,) float32, if the modality has times
    modalities/<name>/observed.bin   (steps, features) bool, if the modality has flags
    tasks/<name>/target.bin          (n, target_width) float32, NaN = no label

A store is written once (`flame_moe.data.writer`) and never changed.
"""

from __future__ import annotations

import json
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
from flame_moe.errors import DataError, FlameError, StoreError, nearest
from flame_moe.schema import SPLITS, Modality, Task

FORMAT = "flame-moe-store"
VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.arrow"


class Ragged(NamedTuple):
    """One modality of several samples, packed end to end.

    Attributes:
        rows: (k,) int64, ascending positions, within what was asked for, of the samples that have the modality.
        values: (steps, C) float32, steps of the k samples one after the other.
        observed: (steps, C) bool or None.
        times: (steps,) float32 or None.
        lengths: (k,) int64, each >= 1.
    """

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    observed: NDArray[np.bool_] | None
    times: NDArray[np.float32] | None
    lengths: NDArray[np.int64]


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
        return np.asarray(self._table["split"].combine_chunks().to_numpy(zero_copy_only=True), dtype=np.int8)

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

    def gather(self, modality: str, indices: ArrayLike) -> Ragged:
        """One modality of several samples; samples without it are left out (see `Ragged.rows`)."""
        wanted = np.asarray(indices, dtype=np.int64)
        description = self.modalities[self._known(modality)]
        folder = f"modalities/{modality}"
        offsets = self._array(f"{folder}/offsets.bin")
        starts = offsets[wanted]
        spans = offsets[wanted + 1] - starts
        rows = np.flatnonzero(spans).astype(np.int64)
        starts, lengths = starts[rows], spans[rows]
        steps = spread(starts, lengths)
        return Ragged(
            rows=rows,
            values=self._array(f"{folder}/values.bin")[steps],
            observed=self._array(f"{folder}/observed.bin")[steps] if description.has_observed else None,
            times=self._array(f"{folder}/times.bin")[steps] if description.has_times else None,
            lengths=lengths,
        )

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
        return tuple(self._table[column].take(pa.array(np.asarray(indices, dtype=np.int64))).to_pylist())

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
        for name in [SAMPLES, *expected_files(self.modalities.values(), self.tasks.values())]:
            if name not in self._records:
                raise StoreError(f"the manifest does not list '{name}'", where=str(self.path))
        for name, record in self._records.items():
            file = self.path / name
            if not file.is_file():
                raise StoreError("a file of the store is missing", where=str(file), mend="Prepare the store again.")
            if file.stat().st_size != record.bytes:
                what = f"a file of the store has {file.stat().st_size} bytes, not {record.bytes}"
                raise StoreError(what, where=str(file), mend="Prepare the store again.")


def expected_files(modalities: Any, tasks: Any) -> list[str]:
    """Names of the array files that a store with these descriptions has."""
    files = []
    for m in modalities:
        columns = ["offsets", "values", *(["times"] if m.has_times else []), *(["observed"] if m.has_observed else [])]
        files += [f"modalities/{m.name}/{column}.bin" for column in columns]
    return files + [f"tasks/{t.name}/target.bin" for t in tasks]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the store at `path`.

    Raises:
        StoreError: if there is no store, or it is of another format or version.
    """
    file = path / MANIFEST
    mend = "Prepare one with `flame prepare`."
    if not file.is_file():
        raise StoreError("there is no sample store", where=str(path), mend=mend)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise StoreError("the manifest is not valid JSON", where=str(file), mend="Prepare the store again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError("this is not a sample store", where=str(path), mend=mend)
    if manifest.get("version") != VERSION:
        what = f"the store has version {manifest.get('version')}, this program reads version {VERSION}"
        raise StoreError(what, where=str(path), mend="Prepare the store again.")
    return manifest


def spread(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions start, start + 1, ... of every range, one range after the other.

    Example:
        >>> spread(np.array([10, 40]), np.array([3, 2])).tolist()
        [10, 11, 12, 40, 41]
    """
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)
