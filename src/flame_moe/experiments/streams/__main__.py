"""Command line of the comparison of continual methods on a stream."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from flame_moe.errors import FlameError
from flame_moe.experiments.streams.entries import choose_entries, every_entry
from flame_moe.experiments.streams.plan import compare
from flame_moe.experiments.work import Bar
from flame_moe.recipes import load_recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, compare, print the table; 2 for what the user can mend."""
    names = ", ".join(entry.name for entry in every_entry())
    parser = argparse.ArgumentParser(prog="python -m flame_moe.experiments.streams", description=__doc__)
    parser.add_argument("stream", help="name or path of a recipe: stream_tasks, stream_units, stream_hospitals, ...")
    parser.add_argument("store", help="the sample store; made as the recipe says if it is not there")
    parser.add_argument("out", help="folder for cells and table")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help=f"default all: {names}")
    parser.add_argument("--seeds", type=int, default=None, help="instead of each method's own number")
    parser.add_argument("--resamples", type=int, default=1000, help="behind each interval")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    chosen = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        with Bar(console) as bar:
            table = compare(
                load_recipe(chosen.stream, chosen.set),
                chosen.store,
                chosen.out,
                choose_entries(chosen.methods, chosen.seeds),
                workers=chosen.workers,
                resamples=chosen.resamples,
                tell=bar.tell,
            )
    except FlameError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    sys.stdout.write(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
