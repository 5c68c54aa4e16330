"""What of a model belongs to a stage: what appeared in it, and what of a grown model trains in it."""

from __future__ import annotations

from collections.abc import Iterable

from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import Growable, Settled, StackedMatrix, StageVector, growables


def born(part: Growable, stage: int) -> bool:
    """Whether a weight appeared in this very stage, so that its base is what trains."""
    if isinstance(part, StackedMatrix):
        return part.base_stage == stage
    if isinstance(part, Settled):
        return part.stage == stage
    return part.structure()["stages"] == [stage]


def unfreeze(model: Flame, stage: int, tasks: Iterable[str]) -> None:
    """Let train what carries a stage's mark: updates, weights that appear in it, its router heads, its tasks' heads."""
    mark, named = str(stage), set(tasks)
    for _, part in growables(model):
        if isinstance(part, StackedMatrix):
            for parameter in part.active():
                parameter.requires_grad_(True)
            if part.base_stage == stage:
                part.base.requires_grad_(True)
        elif isinstance(part, StageVector) and mark in part.copies:
            part.copies[mark].requires_grad_(True)
        elif isinstance(part, Settled) and part.stage == stage:
            part.module.requires_grad_(True)
    for name, parameter in model.named_parameters():
        where = name.split(".")
        if (where[0] == "heads" and where[1] in named) or (where[2] == "routers" and where[5] == mark):
            parameter.requires_grad_(True)
