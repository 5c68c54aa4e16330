"""Writing a sample store, one sample at a time.

Arrays stream to the disk; only ids, subjects and a few bytes per sample stay in memory. Everything is built in a
temporary sibling folder, which becomes the store by one rename, or disappears.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from flame_moe.batch import Sample
from flame_moe.data.check import check_sample
from flame_moe.data.columns import ColumnFile, FileRecord, write_synced, writing
from flame_moe.data.funnel import Funnel
from flame_moe.data.layout import FORMAT, MANIFEST, SAMPLES, VERSION, layout
from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.publish import publish, refuse_existing, sibling
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.split import SplitRule, assign
from flame_moe.data.store import Store
from flame_moe.data.summary import refuse_unlearnable_tasks, summaries
from flame_moe.errors import DataError, StoreError, nearest
from flame_moe.schema import Modality, Task

Described = TypeVar("Described", Modality, Task)


class StoreWriter:
    """Builds a store; used as a context manager.

    Args:
        path: folder of the new store.
        source: name of the source, for the manifest.
        options: the source's options as plain data, for the manifest.
        modalities: what samples may hold.
        tasks: what labels samples may have.
        overwrite: replace a store that is already there, once the new one is complete.

    Raises:
        DataError: if a task reads an unknown modality, or a name occurs twice.
        StoreError: if something is at `path` and may not be replaced.

    Example:
        with StoreWriter(path, source="mine", options={}, modalities=modalities, tasks=tasks) as writer:
            for sample in samples:
                writer.add(sample)
            store = writer.finish(SplitSpec(), funnel)
    """

    def __init__(
        self,
        path: str | Path,
        *,
        source: str,
        options: Mapping[str, Any],
        modalities: Iterable[Modality],
        tasks: Iterable[Task],
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self._head = {"source": source, "options": dict(options)}
        self._modalities = _by_name("modality", modalities)
        self._tasks = _by_name("task", tasks)
        for task in self._tasks.values():
            for name in task.modalities:
                if name not in self._modalities:
                    mend = nearest(name, self._modalities)
                    raise DataError(f"task '{task.name}' reads unknown modality '{name}'", mend=mend)
        refuse_existing(self.path, overwrite=overwrite)
        self._files: dict[str, ColumnFile] = {}
        self._ids: dict[str, None] = {}
        self._subjects: list[str] = []
        self._given: dict[str, str | None] = {}
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        folder = sibling(self.path)
        with writing(self.path):
            folder.mkdir(parents=True)
        self._folder = folder
        for name, column in layout(self._modalities.values(), self._tasks.values()).items():
            self._files[name] = ColumnFile(self._folder / name, column.dtype, column.row)
            if column.extra:
                self._files[name].append(np.zeros(column.extra))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.abandon()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: naming sample, modality or task, and what to do; nothing of the sample has been written then.
        """
        checked = check_sample(sample, self._modalities, self._tasks)
        if checked.id in self._ids:
            raise DataError("two samples have the same id", where=f"sample '{checked.id}'", mend="Make ids unique.")
        if self._given.setdefault(checked.subject, checked.split) != checked.split:
            what = f"subject '{checked.subject}' is in split {checked.split} here and in another before"
            raise DataError(what, where=f"sample '{checked.id}'", mend="A subject belongs to one split.")
        for name in self._modalities:
            folder, part = f"modalities/{name}", checked.modalities.get(name)
            if part is not None:
                self._files[f"{folder}/values.bin"].append(part.values)
                if part.times is not None:
                    self._files[f"{folder}/times.bin"].append(part.times)
                if part.observed is not None:
                    self._files[f"{folder}/observed.bin"].append(part.observed)
            end = self._files[f"{folder}/values.bin"].rows
            self._files[f"{folder}/offsets.bin"].append(np.array([end], dtype=np.int64))
        for name, t in self._tasks.items():
            target = checked.targets.get(name)
            row = np.full(t.target_width, np.nan, dtype=np.float32) if target is None else target
            self._files[f"tasks/{name}/target.bin"].append(row[None])
        self._ids[checked.id] = None
        self._subjects.append(checked.subject)

    def finish(
        self,
        split: SplitRule,
        funnel: Funnel,
        *,
        require_labels: bool = True,
        inputs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Store:
        """Split by subject, check the labels, fit the statistics on the training split, and publish the store.

        Args:
            split: fractions and seed, or subject -> split, or one split for all samples. Where the samples themselves
                say theirs, fractions do not matter.
            funnel: how the samples came about.
            require_labels: refuse tasks that cannot be learned or scored; False for scoring new records.
            inputs: raw file -> bytes and SHA-256, for the manifest.

        Raises:
            DataError: if there are no samples, or a task has no labels in a split, or constant training labels.
        """
        if self._folder is None:
            raise StoreError("the writer is not open", mend="Use it as a context manager.")
        if not self._ids:
            raise DataError("the source gave no sample", where=str(self.path), mend="See the cohort funnel.")
        if isinstance(split, SplitSpec):
            split = self._fixed() or split
        splits = assign(self._subjects, split)
        files = {name: file.finish() for name, file in self._files.items()}
        files[SAMPLES] = self._write_samples(self._folder, splits)
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            **self._head,
            "modalities": [m.plain() for m in self._modalities.values()],
            "tasks": [t.plain() for t in self._tasks.values()],
            "funnel": funnel.plain(),
            "split": split.plain() if isinstance(split, SplitSpec) else "given",
            "samples": len(self._ids),
            "inputs": dict(inputs or {}),
            "files": {name: record.plain() for name, record in files.items()},
        }
        draft = Store(self._folder, manifest)
        if require_labels:
            refuse_unlearnable_tasks(draft, split)
        manifest |= summaries(draft)
        trained = len(draft.indices(split="train")) > 0
        manifest["statistics"] = Preprocessor.fit(draft).plain() if trained else None
        write_synced(self._folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
        with writing(self.path):
            publish(self._folder, self.path)
        self._folder = None
        return Store.open(self.path)

    def _fixed(self) -> dict[str, str] | None:
        """Subject -> split as the samples gave it, if any did."""
        given = {subject: split for subject, split in self._given.items() if split is not None}
        if not given:
            return None
        if len(given) < len(self._given):
            lacking = next(subject for subject, split in self._given.items() if split is None)
            raise DataError("a subject has no split, others have", where=f"subject '{lacking}'", mend="Give all one.")
        return given

    def _write_samples(self, folder: Path, splits: NDArray[np.int8]) -> FileRecord:
        table = pa.table(
            {
                "id": pa.array(list(self._ids), pa.large_string()),
                "subject": pa.array(self._subjects, pa.large_string()),
                "split": pa.array(splits, pa.int8()),
            }
        )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return write_synced(folder / SAMPLES, sink.getvalue().to_pybytes())


def _by_name(what: str, items: Iterable[Described]) -> dict[str, Described]:
    named: dict[str, Described] = {}
    for item in items:
        if item.name in named:
            raise DataError(f"two {what} descriptions have the name '{item.name}'", mend="Make names unique.")
        named[item.name] = item
    return named
