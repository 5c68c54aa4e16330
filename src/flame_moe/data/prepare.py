"""From raw data to a sample store, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flame_moe.data.funnel import Funnel
from flame_moe.data.publish import refuse_existing
from flame_moe.data.sources import get_source
from flame_moe.data.store import Store
from flame_moe.data.summary import describe_store
from flame_moe.data.work import Say, Work
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import DataError

__all__ = ["describe_store", "prepare"]


def prepare(
    source_name: str,
    raw: str | Path | None,
    out: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
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
        overwrite: replace a store that is already there, once the new one is complete.
        require_labels: False prepares new records for scoring: labels may be missing, and all of them are test
            samples.
        say: told in words what is being read.

    Steps that take long are kept beside `out` until the store stands, so that a call after a crash goes on from them.

    Raises:
        RecipeError: if an option is unknown or out of range.
        DataError: if the source is unknown, the raw data are missing or cannot be used.
        StoreError: if something is at `out` and may not be replaced.

    Example:
        >>> store = prepare("digits", None, "stores/digits", overwrite=True)  # doctest: +SKIP
        >>> len(store)  # doctest: +SKIP
        1797
    """
    source = get_source(source_name)
    chosen = source.options.parse(dict(options or {}), where=f"options of source '{source_name}'")
    folder = None if raw is None else Path(raw)
    if source.needs_raw and folder is None:
        raise DataError(f"source '{source_name}' needs raw data", mend="Say in which folder they are.")
    if not source.needs_raw and folder is not None:
        raise DataError(f"source '{source_name}' reads no raw data", where=str(folder), mend="Leave the folder out.")
    if folder is not None and not folder.exists():
        raise DataError("there are no raw data", where=str(folder), mend="Check the path.")
    refuse_existing(Path(out), overwrite=overwrite)
    modalities, tasks = source.describe(folder, chosen)
    funnel = Funnel()
    work = Work(Path(out).with_name(f".{Path(out).name}.steps"), say)
    writer = StoreWriter(
        out, source=source.name, options=chosen.plain(), modalities=modalities, tasks=tasks, overwrite=overwrite
    )
    with writer:
        for sample in source.read(folder, chosen, funnel, work):
            writer.add(sample)
        split = source.split(chosen) if require_labels else "test"
        inputs = {} if folder is None else work.inputs(folder)
        store = writer.finish(split, funnel, require_labels=require_labels, inputs=inputs)
    work.clear()
    return store
