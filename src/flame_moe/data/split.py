"""Dealing subjects to train, val and test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.sources.base import SplitSpec
from flame_moe.errors import DataError, nearest
from flame_moe.schema import SPLITS

SplitRule = SplitSpec | Mapping[str, str] | str


def deal(subjects: Iterable[str], spec: SplitSpec) -> dict[str, str]:
    """Split of every subject: subjects ordered by a hash of seed and name, then cut at the fractions.

    The order in which subjects are given, and how often, changes nothing.

    Example:
        >>> sorted(deal(["a", "b", "c", "d"], SplitSpec(fractions=(0.5, 0.25, 0.25))).values())
        ['test', 'train', 'train', 'val']
    """
    ordered = sorted(set(subjects), key=lambda name: (_rank(spec.seed, name), name))
    first = round(spec.fractions[0] * len(ordered))
    second = round((spec.fractions[0] + spec.fractions[1]) * len(ordered))
    return {name: SPLITS[(i >= first) + (i >= second)] for i, name in enumerate(ordered)}


def assign(subjects: Sequence[str], rule: SplitRule) -> NDArray[np.int8]:
    """Split of every sample as a position in `SPLITS`, (n,) int8.

    Args:
        subjects: subject of each sample.
        rule: fractions and seed, or a split for each subject, or one split for all.

    Raises:
        DataError: if a subject has no split or an unknown one.
    """
    if isinstance(rule, str):
        return np.full(len(subjects), _code(rule, "the split of all samples"), dtype=np.int8)
    splits = deal(subjects, rule) if isinstance(rule, SplitSpec) else rule
    codes: dict[str, int] = {}
    for name in subjects:
        if name not in codes:
            if name not in splits:
                raise DataError("a subject has no split", where=f"subject '{name}'", mend="Add it to the mapping.")
            codes[name] = _code(splits[name], f"subject '{name}'")
    return np.array([codes[name] for name in subjects], dtype=np.int8)


def _code(split: str, where: str) -> int:
    if split not in SPLITS:
        raise DataError(f"unknown split '{split}'", where=where, mend=nearest(str(split), SPLITS))
    return SPLITS.index(split)


def _rank(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\x00{name}".encode(), digest_size=16).digest()
