"""One row of numbers per sample, for models that read tables: what each kind of modality says in a fixed width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from flame_moe.data.statistics import STATISTICS, series_statistics
from flame_moe.data.store import Ragged, Store
from flame_moe.schema import Modality

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Columns = list[str]

CODES = 200
CELLS = 8
PIECE = 256
SIGNAL = ("mean", "std", "min", "q05", "q50", "q95", "max", "step")
"""Of a signal's channel; `step` is the mean absolute difference of neighbours."""


def summarised(store: Store, modality: str, rows: Ints) -> tuple[Array, Columns]:
    """The summary of one modality.

    Args:
        store: where the samples are; what has to be chosen (which codes) is chosen on its training split.
        modality: which.
        rows: k samples.

    Returns:
        (k, columns) with NaN for samples without the modality, and the names of the columns.
    """
    description = store.modalities[modality]
    columns, summarise = _SUMMARIES.get(description.kind, _series)(store, description)
    found = np.full((len(rows), len(columns)), np.nan)
    for start in range(0, len(rows), PIECE):
        part = store.gather(modality, rows[start : start + PIECE])
        for row, steps in zip(part.rows.tolist(), _samples(part), strict=True):
            found[start + row] = summarise(part, steps)
    return found, columns


Summary = tuple[Columns, Callable[[Ragged, slice], Array]]


def _samples(part: Ragged) -> Iterator[slice]:
    """The steps of each sample in the packed arrays."""
    ends = np.cumsum(part.lengths).tolist()
    for end, length in zip(ends, part.lengths.tolist(), strict=True):
        yield slice(end - length, end)


def _names(modality: Modality) -> tuple[str, ...]:
    return modality.channels or tuple(str(i) for i in range(modality.features))


def _cells(part: Ragged, steps: slice) -> Array:
    """(L, C) values, NaN where not observed."""
    values = part.values[steps].astype(np.float64)
    if part.observed is not None:
        values[~part.observed[steps]] = np.nan
    return values


def _table(store: Store, modality: Modality) -> Summary:
    """The row as it is."""
    return list(_names(modality)), lambda part, steps: _cells(part, steps)[0]


def _series(store: Store, modality: Modality) -> Summary:
    """`flame_moe.data.statistics` of every channel, with the step number for the time where there are no times."""

    def row(part: Ragged, steps: slice) -> Array:
        values = _cells(part, steps)
        if part.times is None:
            return series_statistics(values, np.arange(len(values), dtype=np.float64), float(len(values))).ravel()
        return series_statistics(values, part.times[steps].astype(np.float64), 1.0).ravel()

    return [f"{c}.{s}" for c in _names(modality) for s in STATISTICS], row


def _vectors(store: Store, modality: Modality) -> Summary:
    """Where no training sample has more than one vector: the vector, and the time since; else as a series.

    The statistics of a single step are the same number over and over: nine times the columns for the same content.
    """
    if store.lengths(modality.name, store.indices(split="train")).max(initial=0) > 1:
        return _series(store, modality)

    def row(part: Ragged, steps: slice) -> Array:
        assert part.times is not None
        return np.append(_cells(part, steps).mean(axis=0), 1.0 - part.times[steps][-1])

    return [*_names(modality), "since_last"], row


def _frequent(store: Store, modality: Modality, of: Callable[[Array], Array]) -> Ints:
    """The numbers that are most frequent in the training split, ascending."""
    train, counts = store.indices(split="train"), Counter[int]()
    for start in range(0, len(train), PIECE):
        part = store.gather(modality.name, train[start : start + PIECE])
        found, times = np.unique(of(part.values), return_counts=True)
        counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    return np.array(sorted(sorted(counts, key=lambda code: (-counts[code], code))[:CODES]), dtype=np.int64)


def _tokens(store: Store, modality: Modality) -> Summary:
    """How many pieces, and how often each of the most frequent tokens of the training split."""
    chosen = _frequent(store, modality, lambda values: values[values > 0])

    def row(part: Ragged, steps: slice) -> Array:
        numbers = part.values[steps]
        known = numbers[np.isin(numbers, chosen)]
        counts = np.bincount(np.searchsorted(chosen, known), minlength=len(chosen))
        return np.concatenate([[len(numbers)], counts]).astype(float)

    return ["pieces", *(f"token{number - 1}.count" for number in chosen.tolist())], row


def _codes(store: Store, modality: Modality) -> Summary:
    """How many events of each type, and how often each of the most frequent codes of the training split."""
    chosen = _frequent(store, modality, lambda values: values[:, 1])

    def row(part: Ragged, steps: slice) -> Array:
        events = part.values[steps]
        types = np.bincount(events[:, 0], minlength=len(modality.types))
        known = events[np.isin(events[:, 1], chosen), 1]
        return np.concatenate([types, np.bincount(np.searchsorted(chosen, known), minlength=len(chosen))]).astype(float)

    return [*(f"{name}.count" for name in modality.types), *(f"code{code}.count" for code in chosen.tolist())], row


def _image(store: Store, modality: Modality) -> Summary:
    """Brightness, contrast and a coarse picture of at most 8 x 8 cells per channel, averaged over the pictures."""
    height, width, channels = modality.shape
    down, across = (_starts(size, min(CELLS, size)) for size in (height, width))
    area = np.outer(np.diff(down, append=height), np.diff(across, append=width))[:, :, None]

    def row(part: Ragged, steps: slice) -> Array:
        pictures = part.values[steps].reshape(-1, height, width, channels).astype(np.float64)
        sums = np.add.reduceat(np.add.reduceat(pictures.mean(axis=0), down, axis=0), across, axis=1)
        head = [len(pictures), pictures.mean(), pictures.std(axis=(1, 2, 3)).mean()]
        return np.concatenate([head, (sums / area).ravel()])

    coarse = [f"cell{i}.{j}.{c}" for i in range(len(down)) for j in range(len(across)) for c in range(channels)]
    return ["pictures", "mean", "std", *coarse], row


def _starts(size: int, cells: int) -> Ints:
    """Where each of `cells` stretches of like size begins."""
    return np.array([-(-cell * size // cells) for cell in range(cells)])


def _waveform(store: Store, modality: Modality) -> Summary:
    """Length, and per channel mean, deviation, range, quantiles and mean absolute step."""

    def row(part: Ragged, steps: slice) -> Array:
        x = part.values[steps].astype(np.float64)
        step = np.abs(np.diff(x, axis=0)).mean(axis=0) if len(x) > 1 else np.full(x.shape[1], np.nan)
        low, middle, high = np.quantile(x, (0.05, 0.5, 0.95), axis=0)
        columns = (x.mean(axis=0), x.std(axis=0), x.min(axis=0), low, middle, high, x.max(axis=0), step)
        return np.concatenate([[len(x)], np.stack(columns, axis=1).ravel()])

    return ["steps", *(f"{c}.{s}" for c in _names(modality) for s in SIGNAL)], row


_SUMMARIES: dict[str, Callable[[Store, Modality], Summary]] = {
    "table": _table,
    "timed": _vectors,
    "tokens": _tokens,
    "codes": _codes,
    "image": _image,
    "waveform": _waveform,
}
