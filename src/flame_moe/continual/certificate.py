"""The no-forgetting proof: everything that decides what a task predicts, written down to be computed again later.

For each task a certificate holds

    tensors      sha256 of every tensor that the task's forward reads at its cursor (watched, see `flame_moe.nn.reads`)
    description  cursor, kind and outputs of the task, its modalities, shape of the network
    statistics   sha256 of the scaling of each modality and of the statistics of the labels
    logits       of stored probe inputs, all in one batch, with their sha256
    environment  what computed them

Equal tensors, statistics and description mean equal predictions for every input; the probes show that the program and
the machine still compute with them what they did. The hash of a tensor is that of its bytes in C order, little-endian.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from flame_moe.batch import FlexiBatch, Sample
from flame_moe.continual.learner import Learner
from flame_moe.continual.probes import pack, to_batch, unpack
from flame_moe.errors import CheckpointError
from flame_moe.nn.reads import reads, tensors_of
from flame_moe.training.checkpoint import hash_tensor, load_checkpoint, save_checkpoint

KIND, VERSION = "flame-moe-certificate", 1
TOLERANCE = 1e-4
"""Elsewhere (another processor, library or number of threads) a logit z may differ by this times max(1, |z|)."""

Part = Literal["description", "statistics", "tensor", "logit"]
_RESTORE = "Restore the certificate from a backup."
_TASK, _MODALITY = (
    ("kind", "modalities", "classes"),
    ("kind", "features", "channels", "units", "types", "vocabulary", "shape", "rate", "pretrained"),
)


@dataclass(frozen=True)
class Entry:
    """What is certified of one task.

    Attributes:
        task: its name.
        issued: ISO 8601 time.
        probes: where the probe inputs come from: "synthetic", or the split they were taken from.
        description, statistics, tensors, environment, batch: see the module; names -> hashes or plain data.
        inputs: the probes, in natural units.
        logits: (n, outputs) float32.
    """

    task: str
    issued: str
    probes: str
    description: Mapping[str, Any]
    statistics: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, Any]
    batch: Mapping[str, Any]
    inputs: Sequence[Sample]
    logits: Tensor


class Difference(NamedTuple):
    """One thing that is not as certified: what sort of thing, its name, and how it differs."""

    part: Part
    name: str
    said: str


@dataclass(frozen=True)
class Verdict:
    """What became of one task since it was certified.

    Attributes:
        task, issued: of the entry.
        tensors, probes: how many were compared.
        environment: what is not as it was, in words; empty where logits have to be equal bit for bit.
        bitwise: whether the logits are.
        largest: largest absolute difference of a logit.
        differences: empty where the certificate holds.
    """

    task: str
    issued: str
    tensors: int
    probes: int
    environment: tuple[str, ...]
    bitwise: bool
    largest: float
    differences: tuple[Difference, ...]

    @property
    def holds(self) -> bool:
        return not self.differences


def issue(
    learner: Learner, task: str, inputs: Sequence[Sample], *, probes: str, environment: Mapping[str, Any], issued: str
) -> Entry:
    """Write down what decides the predictions of a task as they are now.

    Args:
        learner: the model.
        task: learned by it.
        inputs: see `flame_moe.continual.probes`.
        probes: where they come from.
        environment: what this process computes with, as plain data.
        issued: the time.
    """
    batch = to_batch(inputs, learner.tasks[task], learner.preprocessor)
    logits, names = reads(learner.model, batch, learner.cursor(task))
    return Entry(
        task,
        issued,
        probes,
        _description(learner, task),
        _statistics(learner, task),
        _hashes(learner, names),
        dict(environment),
        _shape(batch),
        list(inputs),
        logits,
    )


def compare(entry: Entry, learner: Learner, environment: Mapping[str, Any]) -> Verdict:
    """Compute again what was certified of a task, and name everything that differs."""
    changed = tuple(
        f"{key}: {environment.get(key)}, was {was}"
        for key, was in entry.environment.items()
        if environment.get(key) != was
    )
    if entry.task not in learner.tasks:
        gone = Difference("description", "task", "the model has no such task")
        return Verdict(entry.task, entry.issued, 0, 0, changed, False, float("inf"), (gone,))
    found: list[Difference] = []
    where = _first_change(entry.description, _description(learner, entry.task))
    if where is not None:
        found.append(Difference("description", *where))
    now = _statistics(learner, entry.task)
    found += [
        Difference("statistics", k, "is not what it was") for k, was in entry.statistics.items() if now.get(k) != was
    ]
    try:
        batch = to_batch(entry.inputs, learner.tasks[entry.task], learner.preprocessor)
        logits, names = reads(learner.model, batch, learner.cursor(entry.task))
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        found.append(Difference("description", "forward", f"the probes can no longer be read: {error}"))
        return Verdict(entry.task, entry.issued, 0, 0, changed, False, float("inf"), tuple(found))
    found += _compare_tensors(entry.tensors, _hashes(learner, names))
    bitwise, largest, logit = _compare_logits(entry, logits, exact=not changed)
    found += logit
    return Verdict(
        entry.task, entry.issued, len(entry.tensors), len(entry.inputs), changed, bitwise, largest, tuple(found)
    )


def save(folder: str | Path, entries: Iterable[Entry]) -> Path:
    """Write a certificate atomically, with a digest over all of it."""
    rows = list(entries)
    tensors = {f"{e.task}/logits": e.logits for e in rows}
    tensors |= {f"{e.task}/inputs/{key}": t for e in rows for key, t in pack(e.inputs).items()}
    return save_checkpoint(folder, tensors, {"tasks": {e.task: _plain(e) for e in rows}}, kind=KIND, version=VERSION)


def load(folder: str | Path) -> list[Entry]:
    """Read a certificate.

    Raises:
        CheckpointError: if it is missing, damaged or was changed after it was written.
    """
    tensors, manifest = load_checkpoint(folder, kind=KIND, version=VERSION)
    try:
        return [_entry(name, data, tensors, str(folder)) for name, data in manifest["tasks"].items()]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError("this is not a certificate", where=str(folder), mend=_RESTORE) from None


def _plain(entry: Entry) -> dict[str, Any]:
    """The JSON part of an entry."""
    return {
        "issued": entry.issued,
        "probes": {"from": entry.probes, "sha256": _hash_samples(entry.inputs)},
        "description": entry.description,
        "statistics": entry.statistics,
        "tensors": entry.tensors,
        "environment": entry.environment,
        "batch": entry.batch,
        "logits": hash_tensor(entry.logits),
    }


def _entry(name: str, data: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Entry:
    start = f"{name}/inputs/"
    inputs = unpack({key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)})
    logits = tensors[f"{name}/logits"]
    for what, stated, is_ in (
        ("probes", data["probes"]["sha256"], _hash_samples(inputs)),
        ("logits", data["logits"], hash_tensor(logits)),
    ):
        if stated != is_:
            said = f"the certificate's {what} of task '{name}' are not those it was written with"
            raise CheckpointError(said, where=where, mend=_RESTORE)
    kept = {key: data[key] for key in ("issued", "description", "statistics", "tensors", "environment", "batch")}
    return Entry(task=name, probes=data["probes"]["from"], inputs=inputs, logits=logits, **kept)


def _description(learner: Learner, name: str) -> dict[str, Any]:
    """What decides a forward beside numbers, as it comes back from JSON."""
    task = learner.tasks[name]
    modalities = {m: learner.model.modalities[m].plain() for m in task.modalities}
    return {
        "cursor": learner.cursor(name),
        "task": {key: task.plain()[key] for key in _TASK},
        "modalities": {m: {key: plain[key] for key in _MODALITY} for m, plain in modalities.items()},
        "model": learner.recipe.model.plain(),
    }


def _statistics(learner: Learner, name: str) -> dict[str, str]:
    fitted, task = learner.preprocessor.plain(), learner.tasks[name]
    found = {f"scaling of '{m}'": _hash_plain(fitted["modalities"].get(m)) for m in task.modalities}
    return {**found, f"labels of '{name}'": _hash_plain(fitted["tasks"].get(name))}


def _hashes(learner: Learner, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    wanted = set(names)
    return {
        name: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape), "sha256": hash_tensor(t)}
        for name, t in tensors_of(learner.model)
        if name in wanted
    }


def _compare_tensors(certified: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    found = []
    for name, was in certified.items():
        if name not in now:
            found.append(Difference("tensor", name, "is no longer read"))
        elif now[name] != was:
            same = all(now[name][key] == was[key] for key in ("dtype", "shape"))
            found.append(Difference("tensor", name, "has other bits" if same else "has another shape or type"))
    return found + [Difference("tensor", name, "was not read before") for name in now if name not in certified]


def _compare_logits(entry: Entry, now: Tensor, *, exact: bool) -> tuple[bool, float, list[Difference]]:
    """Whether all bits are equal, the largest absolute difference, and it as a difference where it may not be."""
    was = entry.logits
    if now.shape != was.shape:
        said = f"are {tuple(now.shape)}, were {tuple(was.shape)}"
        return False, float("inf"), [Difference("logit", "logits", said)]
    if hash_tensor(now) == hash_tensor(was):
        return True, 0.0, []
    apart = (now.double() - was.double()).abs().nan_to_num(nan=float("inf"))
    largest, at = float(apart.max()), int(apart.argmax())
    if not exact and bool((apart <= TOLERANCE * was.double().abs().clamp(min=1.0)).all()):
        return False, largest, []
    probe, output = divmod(at, was.shape[1])
    said = f"is {now[probe, output]:.9g}, was {was[probe, output]:.9g}, the largest difference: {largest:.3g}"
    return False, largest, [Difference("logit", f"probe {probe}, output {output}", said)]


def _first_change(certified: Any, now: Any, place: str = "") -> tuple[str, str] | None:
    """The first certified key whose value is another now; keys that are new are no change."""
    if isinstance(certified, Mapping) and isinstance(now, Mapping):
        for key, was in certified.items():
            found = _first_change(was, now.get(key), f"{place}.{key}" if place else str(key))
            if found is not None:
                return found
        return None
    return None if certified == now else (place, f"is {now}, was {certified}")


def _shape(batch: FlexiBatch) -> dict[str, Any]:
    return {
        "size": batch.size,
        "modalities": {name: list(part.values.shape) for name, part in batch.modalities.items()},
    }


def _hash_plain(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _hash_samples(samples: Sequence[Sample]) -> str:
    return _hash_plain({key: hash_tensor(t) for key, t in pack(samples).items()})
