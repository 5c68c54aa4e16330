"""What the labels of a store look like, and whether a task can be learned from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe.errors import DataError
from flame_moe.schema import SPLITS, Task

Targets = NDArray[np.float32]
_NAME_OTHERS = "name those to keep with --task, or data.tasks in a recipe"


def labelled(target: Targets) -> NDArray[np.bool_]:
    """(n,) bool: which rows of a target (n, width) hold a label."""
    known: NDArray[np.bool_] = ~np.isnan(target[:, 0])
    return known


def class_counts(target: Targets, task: Task) -> NDArray[np.int64]:
    """How often each class occurs among labelled targets (n, width).

    Returns:
        (2,) negatives and positives for binary, (classes,) for multiclass, (2, labels) negatives and positives of
        each label for multilabel.
    """
    if task.kind == "multiclass":
        return np.bincount(target[:, 0].astype(np.int64), minlength=len(task.classes)).astype(np.int64)
    positives = (target > 0.5).sum(axis=0)
    counts = np.stack([len(target) - positives, positives]).astype(np.int64)
    return counts[:, 0] if task.kind == "binary" else counts


def summarise(target: Targets, task: Task) -> dict[str, Any]:
    """Number of labelled samples, and the prevalence of each class or the mean and spread of each value."""
    known = target[labelled(target)]
    summary: dict[str, Any] = {"labelled": len(known)}
    if len(known) == 0:
        return summary
    if task.kind == "regression":
        wide = known.astype(np.float64)
        summary["mean"] = dict(zip(task.classes, wide.mean(axis=0).tolist(), strict=True))
        summary["std"] = dict(zip(task.classes, wide.std(axis=0).tolist(), strict=True))
        return summary
    counts = class_counts(known, task)
    rates = (counts[1] if task.kind == "multilabel" else counts) / len(known)
    summary["prevalence"] = dict(zip(task.classes, rates.tolist(), strict=True))
    return summary


def refuse_unlearnable(target: Targets, task: Task, splits: NDArray[np.int8], needed: Iterable[str]) -> None:
    """Refuse a task that no model can be fitted to or scored on.

    Args:
        target: (n, width), NaN where there is no label.
        task: its description.
        splits: (n,) positions in `SPLITS`.
        needed: splits that must have labels.

    Raises:
        DataError: if a needed split has no label, or the training labels are constant.
    """
    where = f"task '{task.name}'"
    known = labelled(target)
    for split in needed:
        if not (known & (splits == SPLITS.index(split))).any():
            mend = f"Give more samples, another split seed, or leave the task out: {_NAME_OTHERS}."
            raise DataError(f"no sample of the {split} split has a label", where=where, mend=mend)
    train = target[known & (splits == SPLITS.index("train"))]
    constant = (train == train[0]).all(axis=0)
    if not constant.any():
        return
    column = int(np.argmax(constant))
    named = task.kind in ("multilabel", "regression")
    what = f"label '{task.classes[column]}'" if named else "the label"
    value = f"{train[0, column]:g}"
    if not named:
        value = f"'{task.classes[int(train[0, 0])]}'"
    mend = f"Nothing can be learned from it: give more samples, or leave the task out: {_NAME_OTHERS}."
    raise DataError(f"{what} is {value} in all {len(train)} training samples", where=where, mend=mend)
