"""Heads only: the backbone stays as the first stage left it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from flame_moe.continual.methods.base import Commit, Method
from flame_moe.continual.methods.growth import born, unfreeze
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import Growable, growables


class Frozen(Method):
    """A later stage trains new task heads, new router heads for its modalities, and the whole path of a modality that
    appears for the first time; nothing that an earlier task reads. So earlier tasks cannot change.

    Base of the methods that add something to a frozen backbone.
    """

    name: ClassVar[str] = "frozen"

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        model.add_router_heads(modalities, stage)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        if stage == 0:
            model.requires_grad_(True)
            return
        model.requires_grad_(False)
        for name, part in model.growables(modalities):
            if not born(part, stage):
                self.start(model, name, part, stage)
        unfreeze(model, stage, tasks)

    def start(self, model: Flame, name: str, part: Growable, stage: int) -> None:
        """Begin the update of a weight that the stage's tasks reach; here there is none."""

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        for _, part in growables(model):
            part.commit()
        model.requires_grad_(False)
        return []
