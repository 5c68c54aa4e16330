"""A network of its own for every task: nothing is shared, so nothing is forgotten and nothing is passed on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from flame_moe.continual.methods.base import Commit
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.nn.model import Flame
from flame_moe.schema import Modality, Task


class Separate(Frozen):
    """Each task of a later stage gets a whole network, trained from scratch on its data alone; tasks of the first stage
    keep the model that every method starts from. Networks of the tasks of one stage share its steps, the limit on the
    gradient's norm and the epoch that is kept, and no weight.
    """

    name: ClassVar[str] = "separate"

    def add(
        self, model: Flame, stage: int, tasks: Sequence[Task], modalities: Sequence[str], new: Sequence[Modality]
    ) -> None:
        if stage == 0:
            super().add(model, stage, tasks, modalities, new)
            return
        model.modalities.update({modality.name: modality for modality in new})
        for task in tasks:
            model.add_apart(task, stage)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        model.requires_grad_(stage == 0)
        if stage:
            for task in tasks:
                model.apart[task].requires_grad_(True)

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        model.requires_grad_(False)
        return []
