"""Gradient projection memory: weights train in place, in directions that earlier tasks' inputs do not have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from flame_moe.continual.methods.base import Commit, StageContext
from flame_moe.continual.methods.growth import unfreeze
from flame_moe.continual.methods.spaces import KeepsSpaces
from flame_moe.continual.moments import gather
from flame_moe.continual.subspace import Subspaces
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix
from flame_moe.schema import MethodConfig


class GPM(KeepsSpaces):
    """Every matrix trains in place; its change since the stage began is kept orthogonal to a space that holds a share
    `threshold` of the energy of all earlier inputs (Saha et al. 2021, arXiv 2103.09762). Gradients are projected, and
    after each step the weights too, because neither AdamW's scaling nor its decay respects the projection. Rows of a
    table of embeddings that were ever picked stay. Small vectors and routers, which have no such space, are trained in
    their first stage only (the paper's networks have no biases, and freeze their normalisation after the first task).

    What is stored is one orthonormal basis per matrix.
    """

    name: ClassVar[str] = "gpm"

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._held: dict[str, _Held] = {}

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        model.add_router_heads(new, stage)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        model.requires_grad_(stage == 0)
        if stage:
            unfreeze(model, stage, tasks)
            for part in _matrices(model).values():
                part.base.requires_grad_(True)

    def prepare(self, context: StageContext) -> None:
        found = {name: _Held.of(self.spaces, name, part) for name, part in _matrices(context.model).items()}
        self._held = {name: held for name, held in found.items() if held is not None}

    def adjust_gradients(self, model: Flame) -> None:
        for name, part in _matrices(model).items():
            if name in self._held and part.base.grad is not None:
                part.base.grad.copy_(self._held[name].free(part.base.grad))

    @torch.no_grad()
    def after_step(self, model: Flame) -> None:
        for name, part in _matrices(model).items():
            if name in self._held:
                start = self._held[name].start.to(part.base.device)
                part.base.copy_(start + self._held[name].free(part.base - start))

    def conclude(self, context: StageContext) -> None:
        self._held = {}
        self.spaces.extend(gather(context.model, context.batches(), context.stage), self.value("threshold"))

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        model.requires_grad_(False)
        return []


class _Held:
    """A weight as the stage found it, and what of its changes is kept."""

    def __init__(self, start: Tensor, onto: Tensor | None, rows: Tensor | None) -> None:
        self.start, self.onto, self.rows = start, onto, rows

    @classmethod
    def of(cls, spaces: Subspaces, name: str, part: StackedMatrix) -> _Held | None:
        onto, rows = spaces.projector(name, part), spaces.rows(name)
        return None if onto is None and rows is None else cls(part.base.detach().clone(), onto, rows)

    def free(self, change: Tensor) -> Tensor:
        """The part of a change that earlier inputs do not see."""
        if self.rows is not None:
            return change * (1 - self.rows.to(change.device))[:, None]
        assert self.onto is not None
        return change - change @ self.onto.to(change.device)


def _matrices(model: Flame) -> dict[str, StackedMatrix]:
    return {name: part for name, part in model.named_modules() if isinstance(part, StackedMatrix)}
