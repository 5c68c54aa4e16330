"""The rows of the comparison: every continual method that there is, and variants of FLAME."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flame_moe.continual.methods import METHODS, Setting
from flame_moe.errors import RecipeError, nearest
from flame_moe.schema import MethodConfig, Recipe

FIRST = "flame"
"""The entry from which differences are taken."""
SEEDS, MORE_SEEDS = 3, 5
CLOSE = frozenset({"flame", "lora_equal", "finetune", "joint"})
"""Entries with more seeds: those whose distance to FLAME matters most."""


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Attributes:
        name: of its files and on the command line.
        label: what the table calls it.
        method: keys of `MethodConfig`; they go before those of the grid.
        seeds: how many, counted from 0.
    """

    name: str
    label: str
    method: Mapping[str, Any] = field(default_factory=dict, hash=False)
    seeds: int = SEEDS

    def settings(self) -> tuple[Setting, ...]:
        """Among which validation chooses: the grid of the method, without what this entry fixes."""
        fixed = self.method.keys()
        grid = METHODS[self.method["name"]].grid
        free = [Setting({k: v for k, v in s.keys.items() if k not in fixed}, s.lr) for s in grid]
        return tuple(s for i, s in enumerate(free) if s not in free[:i])

    def recipe(self, stream: Recipe, setting: Setting, seed: int) -> Recipe:
        """The stream as this entry learns it with one setting and seed.

        Keys of the method come from the entry, else from the setting, else from the stream's own `method`.
        """
        read = [key for key in METHODS[self.method["name"]].keys if key in stream.method.model_fields_set]
        given = {key: getattr(stream.method, key) for key in read}
        method = MethodConfig.parse({**given, **setting.keys, **self.method}, where=f"entry '{self.name}'")
        first, *later = stream.stages
        rate = stream.train.lr
        later = [s.model_copy(update={"lr": (s.lr or rate) * setting.lr}) for s in later]
        train = stream.train.model_copy(update={"bootstrap": 0})
        changes = {"seed": seed, "method": method, "stages": (first, *later), "train": train, "compare": ()}
        return stream.model_copy(update=changes)


_QUARTER = 8
"""Of the streams' width of 32, as the published rank is 32 of 128."""
_RANK = {"name": FIRST, "keep": "rank", "rank": _QUARTER}
_PUBLISHED = {**_RANK, "truncation": "weight"}
VARIANTS: tuple[Entry, ...] = (
    Entry("flame_untruncated", "FLAME, nothing cut", {"name": FIRST, "truncation": "none"}),
    Entry("flame_weight", "FLAME, cut by singular values alone", {"name": FIRST, "truncation": "weight"}),
    Entry("flame_activation", "FLAME, cut with the inputs in view", {"name": FIRST, "truncation": "activation"}),
    Entry(
        "flame_refine", "FLAME, cut half-way, then trained on", {"name": FIRST, "warmup": 0.5, "bias_correction": True}
    ),
    Entry("flame_recalibrate", "FLAME, router and heads once more after the cut", {"name": FIRST, "recalibrate": 1}),
    Entry("flame_warm_start", "FLAME, beginning as the most similar task", {"name": FIRST, "warm_start": True}),
    Entry("flame_from_zero", "FLAME, factors from zero, rank 8", {**_RANK, "warmup": 0.0}),
    Entry("flame_paper", "FLAME of the paper: rank 8, singular values", {**_PUBLISHED, "preset": "paper"}),
    Entry(
        "flame_reference",
        "FLAME of the published code, rank 8",
        {**_PUBLISHED, "preset": "reference", "base_rank": _QUARTER},
    ),
)
"""FLAME with parts of it changed. What coincides with the defaults is computed all the same: defaults may change."""


def every_entry() -> tuple[Entry, ...]:
    """FLAME first, its variants, then every other method by its defaults."""
    plain = [Entry(n, "FLAME" if n == FIRST else n, {"name": n}, MORE_SEEDS if n in CLOSE else SEEDS) for n in METHODS]
    own = [entry for entry in plain if entry.name == FIRST]
    return (*own, *VARIANTS, *(entry for entry in plain if entry.name != FIRST))


def choose_entries(names: Sequence[str], seeds: int | None = None) -> tuple[Entry, ...]:
    """The entries of these names, all if there are none, in the order of the table.

    Args:
        names: of entries.
        seeds: how many instead of each entry's own.

    Raises:
        RecipeError: for an unknown name.
    """
    known = {entry.name: entry for entry in every_entry()}
    for name in names:
        if name not in known:
            raise RecipeError(f"unknown entry '{name}'", where="--methods", mend=nearest(name, known))
    chosen = [entry for name, entry in known.items() if not names or name in names]
    return tuple(e if seeds is None else Entry(e.name, e.label, e.method, seeds) for e in chosen)


def written(setting: Setting) -> str:
    """A setting in words, for tables.

    Example:
        >>> written(Setting({"rank": 8}, 0.3)), written(Setting())
        ('rank = 8, rate x 0.3', 'rate x 1')
    """
    return ", ".join([*(f"{key} = {value}" for key, value in setting.keys.items()), f"rate x {setting.lr:g}"])


def digest(entry: Entry, setting: Setting) -> str:
    """Eight hex digits that name what an entry is with a setting, so that other keys meet no old cells. Keys that the
    method does not read have no part in it.
    """
    method = MethodConfig.parse({**setting.keys, **entry.method}, where=f"entry '{entry.name}'").plain()
    kind = METHODS[entry.method["name"]]
    read = ("name", *kind.keys, *kind.defaults)
    told = json.dumps([{key: method[key] for key in read}, setting.lr], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:8]
