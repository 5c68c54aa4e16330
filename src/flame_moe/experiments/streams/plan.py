"""The order of work of a comparison: first stages, every setting with seed 0, the chosen one with the other seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flame_moe.data.layout import MANIFEST
from flame_moe.data.store import Store
from flame_moe.environment import environment
from flame_moe.errors import RecipeError
from flame_moe.experiments.streams.bootstrap import Resampling
from flame_moe.experiments.streams.cells import Cell, FirstStage, best
from flame_moe.experiments.streams.entries import Entry
from flame_moe.experiments.streams.picture import picture
from flame_moe.experiments.streams.table import markdown, rows
from flame_moe.experiments.work import Tell, Work
from flame_moe.files import sha256, write_bytes, write_text
from flame_moe.runs import check, open_store
from flame_moe.schema import Recipe

_STREAM = "stream.json"


def compare(
    stream: Recipe,
    store: str,
    out: str,
    entries: Sequence[Entry],
    *,
    workers: int = 1,
    resamples: int = 1000,
    tell: Tell = lambda done, left: None,
) -> str:
    """Do what is not done yet, then write the table; returns it.

    Args:
        stream: the recipe; its seed does not matter, keys of its `method` are given to every entry that reads them.
        store: the samples; made from the raw data that the recipe names if it is not there.
        out: folder of cells and table.
        entries: the rows.
        workers: processes, one thread each; with 0 all is done in this process.
        resamples: behind each interval.
        tell: who is told of progress.

    Raises:
        FlameError: if the stream does not fit the store, or `out` was begun with another stream or store.
    """
    opened = open_store(stream, store)
    for entry in entries:
        for setting in entry.settings():
            check(entry.recipe(stream, setting, 0), opened)
    _claim(stream, opened, Path(out))
    seeds = max(entry.seeds for entry in entries)
    first = {seed: FirstStage(stream, store, out, seed) for seed in range(seeds)}
    tried = {e: [Cell(e, setting, first[0]) for setting in e.settings()] for e in entries}
    later = sum(entry.seeds - 1 for entry in entries)
    work = Work(workers, tell)
    work.off(list(first.values()), then=sum(len(cells) for cells in tried.values()) + later)
    work.off([cell for cells in tried.values() for cell in cells], then=later)
    fixed = {e: best(cells) for e, cells in tried.items()}
    chosen = {e: [replace(fixed[e], first=first[seed]) for seed in range(e.seeds)] for e in entries}
    work.off([cell for cells in chosen.values() for cell in cells], then=0)
    found = rows(tried, chosen, Resampling(opened, stream, resamples))
    document = {
        "stream": stream.plain() | {"data": None},
        "environment": environment().plain(),
        "tasks": [name for stage in stream.stages for name in stage.tasks],
        "resamples": resamples,
        "rows": found,
    }
    write_text(Path(out) / "table.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_bytes(Path(out) / "table.png", picture(found, stream.name))
    table = markdown(found)
    write_text(Path(out) / "table.md", table)
    return table


def _claim(stream: Recipe, store: Store, out: Path) -> None:
    """Insist that what is in `out` was computed from this stream and store.

    Raises:
        RecipeError: if it was not.
    """
    asked = {key: value for key, value in stream.plain().items() if key not in ("seed", "compare")}
    asked["data"] = {"source": stream.data.source, "manifest": sha256(store.path / MANIFEST)}
    told = json.loads(json.dumps(asked))
    file = out / _STREAM
    if not file.exists():
        write_text(file, json.dumps(told, indent=1) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = sorted(key for key in before.keys() | told.keys() if before.get(key) != told.get(key))
    if changed:
        what = f"the folder was begun with another stream or store ({', '.join(changed)} differ)"
        raise RecipeError(what, where=str(out), mend="Give another folder.")
