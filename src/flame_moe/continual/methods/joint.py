"""Joint training on everything so far: the upper bound, which keeps all data of all stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from flame_moe.continual.methods.base import RATES, Setting, StageContext
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.nn.model import Flame
from flame_moe.training.problem import Problem


class Joint(FineTune):
    """A stage goes on from the model as it is and trains on all training data of all tasks so far, each step holding
    what `train.sampling` says of all of them; the epoch is chosen by all of them. So a stage costs more than with any
    other method, and nothing is a copy of anything: there is one set of weights.
    """

    name: ClassVar[str] = "joint"
    rereads: ClassVar[bool] = True
    grid: ClassVar[tuple[Setting, ...]] = RATES

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        model.requires_grad_(True)

    def problems(self, context: StageContext) -> Mapping[str, Problem]:
        return {**context.earlier, **context.problems}
