"""What is on record of a learned stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from flame_moe.continual.methods import Commit
from flame_moe.continual.rounds import Change
from flame_moe.continual.warm import Fingerprint, WarmStart
from flame_moe.nn.model import Flame


@dataclass(frozen=True)
class LearnedStage:
    """What a stage did.

    Attributes:
        index: its number, which is the cursor of its tasks.
        tasks: learned in it.
        modalities: all that its tasks read.
        new_modalities: those that appeared for the first time.
        trainable: part of the model -> number of parameters that were trained.
        epochs_run, best_epoch, seconds, history: of the training.
        commits: what became of each weight's update.
        changes: what the compression of the updates did to the stage's tasks; empty where nothing was compressed.
        warm: what each task began with, if the method starts warm.
        fingerprints: task -> where its training samples are routed, for the warm start of later stages.
    """

    index: int
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    new_modalities: tuple[str, ...]
    trainable: Mapping[str, int]
    epochs_run: int
    best_epoch: int
    seconds: float
    history: tuple[Mapping[str, Any], ...]
    commits: tuple[Commit, ...] = ()
    changes: tuple[Change, ...] = ()
    warm: tuple[WarmStart, ...] = ()
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """JSON-ready, the inverse of `parse`."""
        rows = {"commits": [c._asdict() for c in self.commits], "changes": [c._asdict() for c in self.changes]}
        return {**asdict(self), **rows}

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> LearnedStage:
        """Read what `plain` wrote; raises KeyError, TypeError or ValueError on anything else."""
        lists = {key: tuple(data[key]) for key in ("tasks", "modalities", "new_modalities", "history")}
        commits = tuple(Commit.parse(row) for row in data["commits"])
        changes = tuple(Change(**row) for row in data.get("changes", ()))
        warm = tuple(WarmStart(**{**w, "modalities": tuple(w["modalities"])}) for w in data.get("warm", ()))
        prints = {
            task: {name: tuple(values) for name, values in found.items()}
            for task, found in data.get("fingerprints", {}).items()
        }
        rows = {"commits": commits, "changes": changes, "warm": warm, "fingerprints": prints}
        return cls(**{**data, **lists, **rows})


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to: encoders, experts, attention, routers or heads."""
    where = name.split(".")
    if where[0] == "apart":
        where = where[2:]
    if where[0] in ("paths", "heads"):
        return {"paths": "encoders", "heads": "heads"}[where[0]]
    return {"pool": "experts", "columns": "experts", "layers": "attention", "routers": "routers"}[where[2]]


def count_trainable(model: Flame) -> dict[str, int]:
    """Part of the model -> numbers that require a gradient."""
    counts = dict.fromkeys(("encoders", "experts", "attention", "routers", "heads"), 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[part_of(name)] += parameter.numel()
    return counts
