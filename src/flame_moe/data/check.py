"""Is this a sample? Every refusal names the sample, the modality or task, and the mend.

Used by the store writer before anything of a sample reaches the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flame_moe.batch import Observation, Sample
from flame_moe.errors import DataError, nearest
from flame_moe.schema import SPLITS, Modality, Task

Array = NDArray[Any]


def check_sample(sample: Sample, modalities: Mapping[str, Modality], tasks: Mapping[str, Task]) -> Sample:
    """The sample in storage form: numbers as they are stored, flags where the modality has them, 0 where not observed.

    Raises:
        DataError: if it is not a sample of these modalities and tasks.
    """
    for label, text in (("id", sample.id), ("subject", sample.subject)):
        if not isinstance(text, str) or not text:
            raise DataError(f"the {label} of a sample must be text, not {text!r}", where=f"sample '{sample.id}'")
    where = f"sample '{sample.id}'"
    if not sample.modalities:
        raise DataError("a sample has no modality", where=where, mend="Leave it out, or give it at least one.")
    stored: dict[str, Observation] = {}
    for name, observation in sample.modalities.items():
        if name not in modalities:
            raise DataError(f"unknown modality '{name}'", where=where, mend=nearest(name, modalities))
        stored[name] = check_observation(observation, modalities[name], f"{where}, modality '{name}'")
    targets: dict[str, NDArray[np.float32]] = {}
    for name, target in sample.targets.items():
        if name not in tasks:
            raise DataError(f"unknown task '{name}'", where=where, mend=nearest(name, tasks))
        targets[name] = check_target(target, tasks[name], f"{where}, task '{name}'")
    if sample.split is not None and sample.split not in SPLITS:
        raise DataError(f"unknown split '{sample.split}'", where=where, mend=nearest(sample.split, SPLITS))
    return Sample(sample.id, sample.subject, stored, targets, sample.split)


def check_observation(observation: Observation, modality: Modality, where: str) -> Observation:
    """One modality of one sample in storage form.

    Raises:
        DataError: if shapes, types, times or values do not fit the modality.
    """
    values = _stored(observation.values, modality, where)
    if values.ndim != 2 or values.shape[1] != modality.features:
        raise DataError(
            f"values have shape {values.shape}, not (steps, {modality.features})",
            where=where,
            mend="Give one row per step and one column per feature.",
        )
    if len(values) == 0:
        raise DataError("a modality without a step", where=where, mend="Leave the modality out of the sample.")
    if modality.kind == "table" and len(values) != 1:
        raise DataError(
            f"a table has one row, not {len(values)}", where=where, mend="Use kind 'patches' for sequences."
        )
    observed = _observed(observation.observed, modality, values.shape, where)
    kept = values if observed is None else np.where(observed, values, values.dtype.type(0))
    if not np.isfinite(kept).all():
        row, column = np.argwhere(~np.isfinite(kept))[0]
        channel = f" ('{modality.channels[column]}')" if modality.channels else ""
        mend = "Mark the cell as not observed." if modality.has_observed else "Give a finite value, or leave it out."
        raise DataError(f"value {kept[row, column]} at step {row}, feature {column}{channel}", where=where, mend=mend)
    return Observation(kept, _times(observation.times, modality, len(values), where), observed)


def _stored(data: Any, modality: Modality, where: str) -> Array:
    """Values in the modality's storage type; codes and pixels that are no whole numbers in range are refused."""
    if modality.storage == "<f4":
        return _numbers(data, "values", where)
    array = np.asarray(data)
    if array.dtype.kind not in "iu":
        what = "pixels" if modality.kind == "image" else str(modality.kind)
        raise DataError(f"{what} of type {array.dtype} are no whole numbers", where=where, mend="Give integers.")
    low, high = (0, 255) if modality.kind == "image" else (0, 2**31 - 1)
    if array.size and (array.min() < low or array.max() > high):
        bad = array.min() if array.min() < low else array.max()
        raise DataError(f"the value {bad} is not in {low} to {high}", where=where)
    if modality.kind == "codes" and array.ndim == 2 and array.size and array[:, 0].max() >= len(modality.types):
        what = f"event type {array[:, 0].max()}, but there are {len(modality.types)}"
        raise DataError(what, where=where, mend=f"Number them as in {', '.join(modality.types)}, from 0.")
    return array.astype(modality.storage)


def check_target(target: Array, task: Task, where: str) -> NDArray[np.float32]:
    """One label in storage form, (target_width,) float32.

    Raises:
        DataError: if the width, type or value does not fit the task.
    """
    label = _numbers(target, "label", where)
    if label.shape != (task.target_width,):
        raise DataError(f"a label has shape {label.shape}, not ({task.target_width},)", where=where)
    if not np.isfinite(label).all():
        mend = "Leave the task out of the sample's targets if the label is unknown."
        raise DataError(f"a label is {label[~np.isfinite(label)][0]}", where=where, mend=mend)
    if task.kind in ("binary", "multilabel") and not np.isin(label, (0.0, 1.0)).all():
        bad = label[~np.isin(label, (0.0, 1.0))][0]
        raise DataError(f"a label is {bad:g}, neither 0 nor 1", where=where)
    if task.kind == "multiclass" and not (label[0] == int(label[0]) and 0 <= label[0] < len(task.classes)):
        mend = f"Give the class index, 0 to {len(task.classes) - 1}."
        raise DataError(f"a label is {label[0]:g}, not one of {len(task.classes)} classes", where=where, mend=mend)
    return label


def _numbers(data: Any, what: str, where: str) -> NDArray[np.float32]:
    """As float32; numbers too large for it become infinite and are refused by the caller."""
    array = np.asarray(data)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{what} of type {array.dtype} are not numbers", where=where, mend="Give a numeric array.")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _observed(
    observed: Array | None, modality: Modality, shape: tuple[int, ...], where: str
) -> NDArray[np.bool_] | None:
    if not modality.has_observed:
        if observed is not None:
            mend = "Leave `observed` out, or declare the modality as 'series' or 'table'."
            raise DataError(f"a modality of kind '{modality.kind}' has no observed flags", where=where, mend=mend)
        return None
    if observed is None:
        return np.ones(shape, dtype=bool)
    flags = np.asarray(observed)
    if flags.dtype != bool:
        raise DataError(f"observed flags are {flags.dtype}, not bool", where=where, mend="Convert them to bool.")
    if flags.shape != shape:
        raise DataError(f"observed flags have shape {flags.shape}, values have {shape}", where=where)
    if not flags.any():
        mend = "Leave the modality out of the sample: absent is not the same as empty."
        raise DataError("no cell of the modality is observed", where=where, mend=mend)
    return flags


def _times(times: Array | None, modality: Modality, steps: int, where: str) -> NDArray[np.float32] | None:
    if not modality.has_times:
        if times is not None:
            mend = "Leave `times` out, or declare the modality as 'series' or 'timed'."
            raise DataError(f"a modality of kind '{modality.kind}' has no times", where=where, mend=mend)
        return None
    if times is None:
        raise DataError(f"a modality of kind '{modality.kind}' needs times", where=where, mend="Give one per step.")
    checked = _numbers(times, "times", where)
    if checked.shape != (steps,):
        raise DataError(f"times have shape {checked.shape}, values have {steps} steps", where=where)
    if not np.isfinite(checked).all():
        raise DataError(
            f"time {checked[~np.isfinite(checked)][0]}", where=where, mend="Give a finite time, or drop it."
        )
    if (checked < 0).any():
        mend = "Times count from the sample's origin; drop earlier steps."
        raise DataError(f"time {checked.min():g} is negative", where=where, mend=mend)
    if (np.diff(checked) < 0).any():
        at = int(np.argmax(np.diff(checked) < 0)) + 1
        raise DataError(f"times go back at step {at}", where=where, mend="Sort the steps by time.")
    return checked
