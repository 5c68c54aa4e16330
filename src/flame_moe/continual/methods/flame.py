"""FLAME-CL: compress each stage's change into a frozen low-rank slice (paper Eq. 3-4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from flame_moe.continual.methods.base import Commit, Method
from flame_moe.continual.truncation import by_weight
from flame_moe.nn.model import Flame
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import Growable, Settled, StackedMatrix, StageVector, growables


class FlameCL(Method):
    """Stage 0 trains everything. A later stage trains, with all else frozen,

    - a zero-initialised full-rank update on every stacked matrix that its tasks reach, and a copy of small vectors;
    - new router heads for its modalities, new heads for its tasks;
    - the whole path of a modality that appears for the first time; of a pre-trained encoder that is the only stage.

    The commit truncates each update to `rank` and freezes it. Earlier tasks read older cursors and cannot change.
    """

    name: ClassVar[str] = "flame"
    keys: ClassVar[tuple[str, ...]] = ("rank", "warm_start")

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        model.add_router_heads(modalities, stage)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        if stage == 0:
            model.requires_grad_(True)
            return
        model.requires_grad_(False)
        for _, part in model.growables(modalities):
            if not born(part, stage):
                part.grow(stage)
        self._unfreeze(model, stage, set(tasks))

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        commits = []
        for name, part in growables(model):
            error = part.commit(by_weight(self.config.rank))
            if isinstance(part, StackedMatrix) and error is not None:
                kept = part.slice(stage) if stage in part.stages else None
                rank = kept.a.shape[-1] if isinstance(kept, LowRank) else 0 if kept is None else None
                commits.append(Commit(name, rank, error))
        model.requires_grad_(False)
        return commits

    def _unfreeze(self, model: Flame, stage: int, tasks: set[str]) -> None:
        """Whatever carries this stage's mark trains; everything else stays frozen."""
        mark = str(stage)
        for _, part in growables(model):
            if isinstance(part, StackedMatrix):
                if part.delta is not None:
                    part.delta.requires_grad_(True)
                elif part.base_stage == stage:
                    part.base.requires_grad_(True)
            elif isinstance(part, StageVector) and mark in part.copies:
                part.copies[mark].requires_grad_(True)
            elif isinstance(part, Settled) and part.stage == stage:
                part.module.requires_grad_(True)
        for name, parameter in model.named_parameters():
            where = name.split(".")
            if (where[0] == "heads" and where[1] in tasks) or (where[2] == "routers" and where[5] == mark):
                parameter.requires_grad_(True)


def born(part: Growable, stage: int) -> bool:
    """Whether a weight appeared in this very stage, so that its base is what trains."""
    if isinstance(part, StackedMatrix):
        return part.base_stage == stage
    if isinstance(part, Settled):
        return part.stage == stage
    return part.structure()["stages"] == [stage]
