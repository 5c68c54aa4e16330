"""From raw data to a sample store, in one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from flame_moe.data.funnel import Funnel
from flame_moe.data.publish import refuse_existing
from flame_moe.data.sources import get_source
from flame_moe.data.store import Store
from flame_moe.data.summary import describe_store
from flame_moe.data.work import Say, Work
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import DataError, nearest
from flame_moe.schema import Task

__all__ = ["describe_store", "prepare"]


def prepare(
    source_name: str,
    raw: str | Path | None,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    tasks: Collection[str] | None = None,
    overwrite: bool = False,
    require_labels: bool = True,
    say: Say | None = None,
) -> Store:
    """Read a source and write its samples to a new store.

    Args:
        source_name: see `flame_moe.data.sources.source_names`.
        raw: folder of the raw data, or None for a source that needs none.
        out: folder of the new store.
        options: the source's options; those left out have their defaults.
        tasks: which of the source's tasks the store has, in the order of the source; default all. Modalities and
            samples stay. A source with an option `tasks` is given it, and reads only what they need.
        overwrite: replace a store that is already there, once the new one is complete.
        require_labels: False prepares new records for scoring: labels may be missing, and all of them are test
            samples.
        say: told what is being read and how far it is.

    Steps that take long are kept beside `out` until the store stands, so that a call after a crash goes on from them.

    Raises:
        RecipeError: if an option is unknown or out of range.
        DataError: if the source or a task is unknown, the raw data are missing or cannot be used.
        StoreError: if something is at `out` and may not be replaced.

    Example:
        >>> store = prepare("digits", None, "stores/digits", overwrite=True)  # doctest: +SKIP
        >>> len(store)  # doctest: +SKIP
        1797
    """
    source = get_source(source_name)
    given = dict(options or {})
    if tasks is not None and "tasks" in source.options.model_fields:
        given["tasks"] = list(tasks)
    chosen = source.options.parse(given, where=f"options of source '{source_name}'")
    folder = None if raw is None else Path(raw)
    if source.needs_raw and folder is None:
        raise DataError(f"source '{source_name}' needs raw data", mend="Say in which folder they are.")
    if not source.needs_raw and folder is not None:
        raise DataError(f"source '{source_name}' reads no raw data", where=str(folder), mend="Leave the folder out.")
    if folder is not None and not folder.exists():
        raise DataError("there are no raw data", where=str(folder), mend="Check the path.")
    refuse_existing(Path(out), overwrite=overwrite)
    modalities, described = source.describe(folder, chosen)
    wanted = _only(described, tasks)
    left_out = {task.name for task in described} - wanted.keys()
    funnel = Funnel()
    work = Work(Path(out).with_name(f".{Path(out).name}.steps"), say)
    writer = StoreWriter(
        out,
        source=source.name,
        options=chosen.plain(),
        modalities=modalities,
        tasks=wanted.values(),
        overwrite=overwrite,
    )
    with writer:
        for sample in source.read(folder, chosen, funnel, work):
            kept = {name: target for name, target in sample.targets.items() if name not in left_out}
            writer.add(sample._replace(targets=kept))
        split = source.split(chosen) if require_labels else "test"
        inputs = {} if folder is None else work.inputs(folder)
        store = writer.finish(split, funnel, require_labels=require_labels, inputs=inputs)
    work.clear()
    return store


def _only(described: Iterable[Task], names: Collection[str] | None) -> dict[str, Task]:
    """Those of the tasks that are named, by name."""
    known = {task.name: task for task in described}
    for name in names if names is not None else ():
        if name not in known:
            raise DataError(f"unknown task '{name}'", mend=nearest(name, known))
    return {name: task for name, task in known.items() if names is None or name in names}
