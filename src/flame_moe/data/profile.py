"""From a store to its profile: how many, how labelled, what is missing, which values."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe import profile as p
from flame_moe.data.labels import labelled
from flame_moe.data.profile_looks import looks
from flame_moe.data.store import Store
from flame_moe.schema import SPLITS, Modality, Task

Indices = NDArray[np.int64]
PATTERNS = 25
BINS = 24
CELLS = 1 << 24
"""Values read of one modality at most; of a larger one evenly spaced samples are read, and the profile says so."""


def profile(store: Store) -> p.StoreProfile:
    """What a person wants to see of a store. Ranges and presence are of the training split alone.

    Example:
        found = profile(Store.open("stores/digits"))
        found.modalities[0].present["train"]
    """
    manifest = store.manifest
    train = store.indices(split="train")
    patterns = all_patterns(store)
    found = p.StoreProfile(
        source=manifest["source"],
        options=manifest["options"],
        samples=len(store),
        subjects=len(set(store.subjects(np.arange(len(store))))),
        split=_split_words(manifest["split"]),
        funnel=p.Funnel.parse(manifest["funnel"], where="funnel"),
        splits=tuple(p.SplitSize(name=name, **counts) for name, counts in manifest["counts"].items()),
        modalities=tuple(_modality(store, m, train) for m in store.modalities.values()),
        tasks=tuple(_task(store, t, train) for t in store.tasks.values()),
        patterns=tuple(patterns[:PATTERNS]),
        other_patterns=len(patterns[PATTERNS:]),
        other_samples=sum(pattern.samples for pattern in patterns[PATTERNS:]),
        together=_together(store),
        inputs=tuple(p.InputFile(name=name, **record) for name, record in manifest.get("inputs", {}).items()),
    )
    return found.model_copy(update={"looks": looks(found)})


def all_patterns(store: Store) -> list[p.Pattern]:
    """Every set of modalities that occurs and how many samples have exactly it, most frequent first."""
    names = tuple(store.modalities)
    present = np.stack([store.present(name) for name in names], axis=1)
    sets, counts = np.unique(present, axis=0, return_counts=True)
    found = [
        p.Pattern(modalities=tuple(n for n, there in zip(names, row, strict=True) if there), samples=int(count))
        for row, count in zip(sets, counts, strict=True)
    ]
    return sorted(found, key=lambda pattern: (-pattern.samples, -len(pattern.modalities), pattern.modalities))


def _together(store: Store) -> tuple[tuple[int, ...], ...]:
    present = np.stack([store.present(name) for name in store.modalities]).astype(np.int64)
    return tuple(tuple(int(n) for n in row) for row in present @ present.T)


def _split_words(split: Any) -> str:
    if not isinstance(split, dict):
        return "given by the source"
    parts = ", ".join(f"{name} {fraction:g}" for name, fraction in zip(SPLITS, split["fractions"], strict=True))
    return f"by subject: {parts}; seed {split['seed']}"


def _modality(store: Store, modality: Modality, train: Indices) -> p.ModalityProfile:
    name = modality.name
    present = store.present(name)
    parts = {split: store.indices(split=split) for split in SPLITS}
    everyone = np.flatnonzero(present).astype(np.int64)
    lengths = store.lengths(name, everyone)
    channels, observed, read, of = _channels(store, modality, train[present[train]])
    return p.ModalityProfile(
        name=name,
        kind=modality.kind,
        features=modality.features,
        description=modality.description,
        present={split: float(present[part].mean()) for split, part in parts.items() if len(part)},
        observed=observed,
        lengths=None if modality.kind == "table" or len(lengths) == 0 else _lengths(lengths),
        times=_times(store, modality, everyone) if modality.has_times and len(everyone) else None,
        channels=channels,
        read=read,
        of=of,
        events=_events(store, modality, everyone),
    )


def _even(indices: Indices, lengths: NDArray[np.int64], limit: int) -> Indices:
    """All of the samples, or evenly spaced ones with at most about `limit` steps."""
    total = int(lengths.sum())
    if total <= limit:
        return indices
    keep = max(1, len(indices) * limit // total)
    return indices[np.linspace(0, len(indices) - 1, keep).astype(np.int64)]


def _lengths(lengths: NDArray[np.int64]) -> p.Histogram:
    """Whole numbers one by one where they are few, else bins that grow by the same factor."""
    low, high = int(lengths.min()), int(lengths.max())
    if high - low < BINS:
        edges = np.arange(low, high + 2, dtype=np.float64)
    else:
        edges = np.unique(np.round(np.geomspace(low, high + 1, BINS + 1)))
    counts, _ = np.histogram(lengths, edges)
    return p.Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def _times(store: Store, modality: Modality, everyone: Indices) -> p.Histogram:
    chosen = _even(everyone, store.lengths(modality.name, everyone), CELLS)
    times = store.times(modality.name, chosen)
    edges = np.linspace(0.0, max(1.0, float(times.max())), BINS + 1)
    counts, _ = np.histogram(times, edges)
    return p.Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def _events(store: Store, modality: Modality, everyone: Indices) -> dict[str, int]:
    if modality.kind != "codes" or len(everyone) == 0:
        return {}
    counts = np.zeros(len(modality.types), dtype=np.int64)
    for part in np.array_split(everyone, max(1, len(everyone) // 4096)):
        counts += np.bincount(store.gather(modality.name, part).values[:, 0], minlength=len(counts))
    return dict(zip(modality.types, counts.tolist(), strict=True))


def _channels(
    store: Store, modality: Modality, train: Indices
) -> tuple[tuple[p.ChannelRange, ...], float | None, int, int]:
    """Ranges of the channels, share of all cells observed, samples read, samples that there are."""
    if not modality.has_observed or len(train) == 0:
        return (), None, 0, len(train)
    chosen = _even(train, store.lengths(modality.name, train), max(1, CELLS // modality.features))
    part = store.gather(modality.name, chosen)
    seen = part.observed if part.observed is not None else np.ones(part.values.shape, dtype=bool)
    names = modality.channels or tuple(f"feature {i}" for i in range(modality.features))
    units = modality.units or ("",) * modality.features
    ranges = []
    for i, (name, unit) in enumerate(zip(names, units, strict=True)):
        values = part.values[seen[:, i], i].astype(np.float64)
        quantiles = tuple(np.quantile(values, p.QUANTILES).tolist()) if len(values) else ()
        share = float(seen[:, i].mean())
        ranges.append(p.ChannelRange(name=name, unit=unit, observed=share, quantiles=quantiles))
    return tuple(ranges), float(seen.mean()), len(chosen), len(train)


def _task(store: Store, task: Task, train: Indices) -> p.TaskProfile:
    labels = []
    for split, found in store.manifest["labels"][task.name].items():
        rest = {key: found.get(old, {}) for key, old in (("share", "prevalence"), ("mean", "mean"), ("std", "std"))}
        labels.append(p.SplitLabels(split=split, labelled=found["labelled"], **rest))
    return p.TaskProfile(
        name=task.name,
        kind=task.kind,
        modalities=task.modalities,
        description=task.description,
        caveat=task.caveat,
        labels=tuple(labels),
        presence=tuple(_presence(store, task, train)),
    )


def _presence(store: Store, task: Task, train: Indices) -> list[p.Presence]:
    """Shares of each class with and without each modality that is sometimes missing."""
    if task.kind == "regression":
        return []
    target = store.target(task.name, train)
    known = labelled(target)
    train, target = train[known], target[known]
    rows = []
    for name in store.modalities:
        there = store.present(name)[train]
        if not 0 < int(there.sum()) < len(train):
            continue
        for label, of_class in _classes(task, target).items():
            rows.append(
                p.Presence(
                    modality=name,
                    label=label,
                    with_n=int(there.sum()),
                    with_share=float(of_class[there].mean()),
                    without_n=int((~there).sum()),
                    without_share=float(of_class[~there].mean()),
                )
            )
    return rows


def _classes(task: Task, target: NDArray[np.float32]) -> dict[str, NDArray[np.bool_]]:
    """Class -> which labelled samples are of it; of a binary task the positive one alone."""
    if task.kind == "binary":
        return {task.classes[1]: target[:, 0] > 0.5}
    if task.kind == "multiclass":
        return {name: target[:, 0] == i for i, name in enumerate(task.classes)}
    return {name: target[:, i] > 0.5 for i, name in enumerate(task.classes)}
