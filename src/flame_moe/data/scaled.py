"""Scaled values of steps that were read before, kept in memory up to a limit.

Putting a value between its quantiles costs more than everything else in loading a batch, and every epoch asks for the
same values. What is kept is what `Preprocessor.apply` gave, step by step, so nothing depends on the order of reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.preprocess import Preprocessor
from flame_moe.data.scaling import Quantile, Scaler
from flame_moe.data.store import Ragged, Store

LIMIT = 1 << 27
"""Bytes of scaled values that are kept of one store; a modality that would go beyond is scaled anew every time."""


@dataclass
class _Kept:
    scaler: Scaler
    values: NDArray[np.float32]
    known: NDArray[np.bool_]


_MEMORY: WeakKeyDictionary[Store, dict[str, _Kept]] = WeakKeyDictionary()


def scaled(store: Store, preprocessor: Preprocessor, modality: str, part: Ragged) -> NDArray[np.float32]:
    """(steps, C) values of a gathered part, scaled; 0 where not observed.

    Raises:
        DataError: if nothing was fitted for the modality.
    """
    kept = _kept(store, preprocessor, modality, part)
    if kept is None:
        return preprocessor.apply(modality, part.values, part.observed)
    new = ~kept.known[part.steps]
    if new.any():
        observed = None if part.observed is None else part.observed[new]
        kept.values[part.steps[new]] = preprocessor.apply(modality, part.values[new], observed)
        kept.known[part.steps[new]] = True
    found: NDArray[np.float32] = kept.values[part.steps]
    return found


def _kept(store: Store, preprocessor: Preprocessor, modality: str, part: Ragged) -> _Kept | None:
    """The memory of a modality; None where its scaling is cheap, or there is too much of it."""
    scaler = preprocessor.scalers.get(modality)
    if not isinstance(scaler, Quantile):
        return None
    memory = _MEMORY.setdefault(store, {})
    if modality in memory and memory[modality].scaler is scaler:
        return memory[modality]
    memory.pop(modality, None)
    shape = (store.steps(modality), part.values.shape[1])
    if 4 * shape[0] * shape[1] + sum(kept.values.nbytes for kept in memory.values()) > LIMIT:
        return None
    memory[modality] = _Kept(scaler, np.empty(shape, np.float32), np.zeros(shape[0], np.bool_))
    return memory[modality]
