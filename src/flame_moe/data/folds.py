"""Cross-validation inside a store without touching its test split."""

from __future__ import annotations

import copy

import numpy as np

from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from flame_moe.schema import SPLITS

TRAIN, VAL, TEST = range(len(SPLITS))


def fold(store: Store, number: int, of: int, seed: int = 0) -> Store:
    """A view of a store in which one fold of the training and validation subjects validates and the others train.

    Statistics are fitted anew on the view's training samples. Test samples stay test samples.

    Args:
        store: stays as it is; its files are shared.
        number: which fold, 0 <= number < of.
        of: how many folds.
        seed: decides which subject is in which fold.

    Raises:
        DataError: if there is no such fold.
    """
    if not (of >= 2 and 0 <= number < of):
        raise DataError(f"there is no fold {number} of {of}", mend="Number folds from 0, and make at least two.")
    everyone = np.arange(len(store))
    subjects = np.array(store.subjects(everyone), dtype=object)
    learned = store.splits != TEST
    people = np.unique(subjects[learned].astype(str))
    held = set(np.random.default_rng(seed).permutation(people)[number::of].tolist())
    splits = store.splits.copy()
    splits[learned] = [VAL if subject in held else TRAIN for subject in subjects[learned]]
    view = copy.copy(store)
    view.__dict__["splits"] = splits
    view.manifest = {**store.manifest, "statistics": Preprocessor.fit(view).plain()}
    return view
