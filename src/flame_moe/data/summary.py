"""The numbers a person wants before trusting a store: how many, how labelled, how much is missing."""

from __future__ import annotations

from typing import Any

import numpy as np

from flame_moe.data.labels import refuse_unlearnable, summarise
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.split import SplitRule
from flame_moe.data.store import Store
from flame_moe.schema import SPLITS


def summaries(store: Store) -> dict[str, Any]:
    """What the manifest says about each split.

    Returns:
        counts: split -> samples and subjects.
        labels: task -> split -> labelled, and prevalence of the classes or mean and std of the values.
        missing: modality -> split -> fraction of its samples that lack the modality (None for an empty split).
    """
    parts = {split: store.indices(split=split) for split in SPLITS}
    return {
        "counts": {s: {"samples": len(part), "subjects": len(set(store.subjects(part)))} for s, part in parts.items()},
        "labels": {
            name: {s: summarise(store.target(name, part), task) for s, part in parts.items()}
            for name, task in store.tasks.items()
        },
        "missing": {
            name: {s: 1.0 - float(store.present(name)[part].mean()) if len(part) else None for s, part in parts.items()}
            for name in store.modalities
        },
    }


def refuse_unlearnable_tasks(store: Store, rule: SplitRule) -> None:
    """Refuse a store with a task that cannot be learned or scored.

    With fractions, every split with a fraction above 0 needs labels of every task; otherwise every split that
    occurs. The training split is always needed.

    Raises:
        DataError: naming the task, and the split or label.
    """
    if isinstance(rule, SplitSpec):
        needed = [s for s, fraction in zip(SPLITS, rule.fractions, strict=True) if fraction > 0 or s == "train"]
    else:
        needed = [s for i, s in enumerate(SPLITS) if s == "train" or (store.splits == i).any()]
    everyone = np.arange(len(store))
    for name, task in store.tasks.items():
        refuse_unlearnable(store.target(name, everyone), task, store.splits, needed)


def describe_store(store: Store) -> dict[str, Any]:
    """A store in plain data, for people and reports.

    Returns:
        source, options, samples, funnel (steps and counts), counts, labels, missing (see `summaries`), and for
        every modality and task its description; no path and no file hashes.
    """
    manifest = store.manifest
    keys = ("source", "options", "samples", "funnel", "split", "counts", "labels", "missing", "modalities", "tasks")
    return {key: manifest[key] for key in keys}
