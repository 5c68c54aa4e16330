"""Plain fine-tuning: what most people do today. Everything trains in place, so earlier predictions change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from flame_moe.continual.methods.base import CAREFUL_RATES, Commit, Method, Setting
from flame_moe.nn.model import Flame


class FineTune(Method):
    """Later stages go on training the same weights and routers; only heads and new modalities are added."""

    name: ClassVar[str] = "finetune"
    grid: ClassVar[tuple[Setting, ...]] = CAREFUL_RATES

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        model.add_router_heads(new, stage)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        model.requires_grad_(True)
        for name, head in model.heads.items():
            head.requires_grad_(name in set(tasks))

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        model.requires_grad_(False)
        return []
