"""Learning without forgetting: on new samples, old heads go on saying what they said before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from flame_moe.continual.methods.base import Setting, StageContext, over
from flame_moe.continual.methods.distillation import Teacher
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig
from flame_moe.training.hooks import Seen


class LwF(FineTune):
    """Fine-tuning with strength * the distillation loss of earlier tasks on the stage's own batches (Li and Hoiem 2016,
    arXiv 1606.09282). A task none of whose modalities the new samples have is not protected by it.

    While a stage is learned the model of the stage before is kept as well; nothing of it is stored.
    """

    name: ClassVar[str] = "lwf"
    defaults: ClassVar[Mapping[str, float]] = {"strength": 1.0, "temperature": 2.0}
    grid: ClassVar[tuple[Setting, ...]] = over("strength", 0.3, 1.0, 3.0)

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._teacher: Teacher | None = None

    def prepare(self, context: StageContext) -> None:
        self._teacher = Teacher(context) if context.old_tasks else None

    def penalty(self, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        if self._teacher is None:
            return None
        loss = self._teacher.loss(model, seen, self.value("temperature"))
        return None if loss is None else self.value("strength") * loss

    def conclude(self, context: StageContext) -> None:
        self._teacher = None
