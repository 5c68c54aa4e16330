"""Certifying a run and verifying it later: files, environment and report around `flame_moe.continual.certificate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from flame_moe.batch import Sample
from flame_moe.continual import Learner
from flame_moe.continual.certificate import TOLERANCE, Difference, Entry, Verdict, compare, issue
from flame_moe.continual.certificate import load as load_certificate
from flame_moe.continual.certificate import save as save_certificate
from flame_moe.continual.probes import synthetic, taken
from flame_moe.data.store import Store
from flame_moe.environment import environment
from flame_moe.errors import CheckpointError, DataError, nearest
from flame_moe.locking import writing
from flame_moe.nn import products
from flame_moe.results import Certificate, CertifiedTask
from flame_moe.runs import CERTIFICATE, MODEL, REPORT, RESULTS, Run, insist_on_run, open_store
from flame_moe.training.checkpoint import TENSORS, digest_of, hash_tensor

SYNTHETIC = "synthetic"
PROBES = (SYNTHETIC, "train", "val")


@dataclass(frozen=True)
class Verification:
    """What became of a certified run.

    Attributes:
        digest: of the certificate.
        verdicts: one per certified task.
        uncertified: tasks that were learned after the certificate was written.
    """

    digest: str
    verdicts: tuple[Verdict, ...]
    uncertified: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every certified task is what it was."""
        return all(verdict.holds for verdict in self.verdicts)

    def plain(self) -> dict[str, Any]:
        """JSON-ready data."""
        rows = [
            {**asdict(v), "holds": v.holds, "differences": [d._asdict() for d in v.differences]} for v in self.verdicts
        ]
        return {
            "holds": self.holds,
            "digest": self.digest,
            "tolerance": TOLERANCE,
            "tasks": rows,
            "uncertified": list(self.uncertified),
        }


def certify(path: str | Path, *, probes: str = SYNTHETIC, store: Store | str | Path | None = None) -> Certificate:
    """Write RUN/certificate for every task that has none yet; what was certified before must still hold and is kept.

    Args:
        path: the run folder.
        probes: "synthetic", drawn from the preprocessing statistics; or the split, train or val, of which a few samples
            are stored with the certificate. Those are patient data: it must then be kept like the store itself.
        store: for probes of a split; default the run's own store.

    Returns:
        What the certificate covers, as it also stands in results.json.

    Raises:
        FlameError: if the run or the store cannot be used, or an earlier certificate does not hold any more.
    """
    if probes not in PROBES:
        raise DataError(f"unknown probes '{probes}'", mend=nearest(probes, PROBES))
    insist_on_run(path)
    with writing(path, "flame certify"):
        return _certify(Run.open(path), probes, store)


def _certify(run: Run, probes: str, store: Store | str | Path | None) -> Certificate:
    place, learner = run.path / CERTIFICATE, run.learner
    entries = load_certificate(place) if place.exists() else []
    _insist(entries, learner, str(place))
    new = [name for name in learner.tasks if name not in {e.task for e in entries}]
    found = None if probes == SYNTHETIC or not new else open_store(learner.recipe, store, make=False)
    issued = datetime.now(UTC).isoformat(timespec="seconds")
    for name in new:
        inputs = _inputs(learner, name, probes, found)
        entries.append(issue(learner, name, inputs, probes=probes, environment=_surroundings(), issued=issued))
    if new:
        save_certificate(place, entries)
    tasks = tuple(
        CertifiedTask(task=e.task, issued=e.issued, tensors=len(e.tensors), probes=len(e.inputs)) for e in entries
    )
    summary = Certificate(digest=digest_of(place), tasks=tasks)
    if run.results.certificate != summary:
        _report(run, summary)
    return summary


def verify(path: str | Path) -> Verification:
    """Compute again everything that RUN/certificate states, and name what differs. Writes nothing.

    Raises:
        FlameError: if there is no certificate, or it or the run cannot be read.
    """
    path = insist_on_run(path)
    place = path / CERTIFICATE
    if not place.exists():
        raise CheckpointError("the run has no certificate", where=str(path), mend="Write one: `flame certify`.")
    entries, digest = load_certificate(place), digest_of(place)
    try:
        learner = Learner.load(path / MODEL)
    except CheckpointError:
        damaged = _damaged(path / MODEL / TENSORS, entries)
        if not damaged:
            raise
        return Verification(digest, tuple(damaged), ())
    verdicts = tuple(_compare(entry, learner) for entry in entries)
    certified = {entry.task for entry in entries}
    return Verification(digest, verdicts, tuple(name for name in learner.tasks if name not in certified))


def _compare(entry: Entry, learner: Learner) -> Verdict:
    """With the threads and the products it was certified with: they are settings, not the machine."""
    was = entry.environment.get("products", "default")
    with _threads(int(entry.environment["threads"])), products.using(was if products.exact() else "default"):
        return compare(entry, learner, _surroundings())


def _insist(entries: list[Entry], learner: Learner, where: str) -> None:
    for verdict in (_compare(entry, learner) for entry in entries):
        for _, name, said in verdict.differences[:1]:
            raise CheckpointError(
                f"the certificate of task '{verdict.task}' does not hold any more: {name} {said}",
                where=where,
                mend="See `flame verify`. To certify the model as it is now, move the certificate away first.",
            )


def _inputs(learner: Learner, task: str, probes: str, store: Store | None) -> list[Sample]:
    if store is None:
        return synthetic(learner.tasks[task], learner.model.modalities, learner.preprocessor)
    return taken(learner.tasks[task], store, probes)


def _surroundings() -> dict[str, Any]:
    """What decides the last bits of a result: versions, machine, threads and the processor's instructions."""
    return {**environment().plain(), "instructions": torch.backends.cpu.get_cpu_capability()}


def _report(run: Run, summary: Certificate) -> None:
    from flame_moe.report import write_report

    results = run.results.model_copy(update={"certificate": summary})
    results.save(run.path / RESULTS)
    write_report(results, run.path / REPORT)


def _damaged(file: Path, entries: list[Entry]) -> list[Verdict]:
    """Which certified tensors of a checkpoint that does not load have other bits; empty if that cannot be told."""
    try:
        tensors: Mapping[str, torch.Tensor] = safetensors.torch.load_file(file)
    except (safetensors.SafetensorError, OSError):
        return []
    hashes = {name: hash_tensor(tensor) for name, tensor in tensors.items()}
    found = []
    for entry in entries:
        changed = [name for name, was in entry.tensors.items() if hashes.get(name, was["sha256"]) != was["sha256"]]
        said = "has other bits: the file was changed after it was written"
        rows = tuple(Difference("tensor", name, said) for name in changed)
        found.append(Verdict(entry.task, entry.issued, len(entry.tensors), 0, (), False, float("nan"), rows))
    return found if any(verdict.differences for verdict in found) else []


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
