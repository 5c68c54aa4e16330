"""Choosing settings without the test split: cross-validation of a recipe's first stage on training and validation data.

    python -m flame_moe.experiments.crossval RECIPE STORE [--folds 5] [--use 2] [--set train.lr=1e-3 ...]

Prints the primary metric of every task at the last epoch, per fold and on average.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch

from flame_moe.continual import Learner
from flame_moe.data.folds import fold
from flame_moe.data.store import Store
from flame_moe.recipes import load_recipe
from flame_moe.results import PRIMARY
from flame_moe.schema import Recipe


def crossval(recipe: Recipe, store: Store, *, folds: int = 5, use: int | None = None) -> dict[str, list[float]]:
    """Learn the first stage once per fold.

    Args:
        recipe: its first stage and everything else but the data.
        store: its test split is not read.
        folds: into how many parts training and validation subjects are divided.
        use: only the first so many; default all.

    Returns:
        task -> its primary metric (AUROC or R2) on each held-out fold, at the last epoch.
    """
    found: dict[str, list[float]] = {name: [] for name in recipe.stages[0].tasks}
    for number in range(folds if use is None else use):
        learner = Learner(recipe)
        learned = learner.learn(fold(store, number, folds), recipe.stages[0])
        for name, values in found.items():
            values.append(learned.history[-1]["val"][name][PRIMARY[learner.tasks[name].kind]])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m flame_moe.experiments.crossval", description=__doc__)
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("store", help="the sample store")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--use", type=int, default=None, help="only the first so many folds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = load_recipe(chosen.recipe, chosen.set)
    for name, values in crossval(recipe, Store.open(chosen.store), folds=chosen.folds, use=chosen.use).items():
        print(f"{name}: {np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")


if __name__ == "__main__":
    main()
