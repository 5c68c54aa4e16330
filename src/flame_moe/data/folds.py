"""Cross-validation inside a store: for choosing, without its test split; for judging, with every sample tested once."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.store import Store
from flame_moe.errors import DataError
from flame_moe.schema import SPLITS

TRAIN, VAL, TEST = range(len(SPLITS))
OUT = -1
_VALIDATES = 8


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
    subjects, learned = _subjects(store), store.splits != TEST
    held = _deal(subjects[learned], number, of, seed)
    splits = store.splits.copy()
    splits[learned] = np.where(np.isin(subjects[learned], held), VAL, TRAIN)
    return _view(store, splits)


def judging_fold(store: Store, number: int, of: int, seed: int = 0, share: float = 1.0) -> Store:
    """A view of a store in which one fold of all subjects tests, an eighth of the others validates and the rest train.

    With five folds the shares are those of the usual split, 70/10/20, and every sample is tested in exactly one fold.

    Args:
        store: stays as it is; its own split does not matter.
        number: which fold, 0 <= number < of.
        of: how many folds.
        seed: decides which subject is in which fold.
        share: of the training subjects, to see what more data would bring; the others are in no split at all.
            A smaller share is part of every larger one.

    Raises:
        DataError: if there is no such fold.
    """
    subjects = _subjects(store)
    held = _deal(subjects, number, of, seed)
    tested = np.isin(subjects, held)
    validates = np.isin(subjects, _deal(subjects[~tested], 0, _VALIDATES, seed + 1))
    splits = np.where(tested, TEST, np.where(validates, VAL, TRAIN))
    learned = np.random.default_rng(seed + 2).permutation(np.unique(subjects[splits == TRAIN]))
    left = learned[max(1, round(share * len(learned))) :]
    return _view(store, np.where(np.isin(subjects, left), OUT, splits))


def _subjects(store: Store) -> NDArray[np.str_]:
    return np.array(store.subjects(np.arange(len(store))), dtype=str)


def _deal(subjects: NDArray[np.str_], number: int, of: int, seed: int) -> NDArray[np.str_]:
    """The distinct subjects of one fold."""
    if not (of >= 2 and 0 <= number < of):
        raise DataError(f"there is no fold {number} of {of}", mend="Number folds from 0, and make at least two.")
    return np.random.default_rng(seed).permutation(np.unique(subjects))[number::of]


def _view(store: Store, splits: NDArray[Any]) -> Store:
    view = copy.copy(store)
    view.__dict__["splits"] = splits.astype(np.int8)
    view.manifest = {**store.manifest, "statistics": Preprocessor.fit(view).plain()}
    return view
