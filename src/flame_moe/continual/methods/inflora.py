"""InfLoRA: the input directions of a stage's factors are chosen before it trains, where earlier tasks have none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from flame_moe.continual.methods.base import Setting, StageContext, over
from flame_moe.continual.methods.growth import unfreeze
from flame_moe.continual.methods.lora import LoRA
from flame_moe.continual.methods.spaces import KeepsSpaces
from flame_moe.continual.moments import Moment, gather
from flame_moe.continual.subspace import free_directions
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import StackedMatrix


class InfLoRA(KeepsSpaces, LoRA):
    """LoRA with B fixed: its rows are the directions in which the stage's own inputs have most energy, outside the
    space that holds a share `threshold` of the energy of earlier stages' inputs (Liang and Li 2024, arXiv 2404.00228;
    that space is kept as in gradient projection memory, without the paper's dual for large ones). Only A trains.

    Tables of embeddings stay frozen: their inputs are rows, of which none can be picked without being changed.
    """

    name: ClassVar[str] = "inflora"
    grid: ClassVar[tuple[Setting, ...]] = over("threshold", 0.9, 0.99, rates=(3.0, 10.0))

    def prepare(self, context: StageContext) -> None:
        if context.stage == 0:
            return
        modules = context.model.named_modules()
        growing = {n: p for n, p in modules if isinstance(p, StackedMatrix) and p.delta_stage == context.stage}
        moments = _inputs(context, growing)
        for name, part in growing.items():
            moment = moments.get(name)
            if moment is None or moment.one_hot:
                part.compress(None)
                continue
            *lead, out, width = part.shape
            rank = self._ranks[name]
            bases = [self.spaces.bases.get(f"{name}|{which}") for which in range(part.matrices)]
            rows = [free_directions(m, c.cpu(), rank) for m, c in zip(bases, moment.second, strict=True)]
            part.compress(LowRank(torch.zeros(*lead, out, rank), torch.stack(rows).view(*lead, rank, width)))
        unfreeze(context.model, context.stage, context.tasks)
        for part in growing.values():
            if part.delta_stage is not None:
                part.get_parameter("delta_b").requires_grad_(False)

    def conclude(self, context: StageContext) -> None:
        self.spaces.extend(_inputs(context, None), self.value("threshold"))


def _inputs(context: StageContext, names: Mapping[str, StackedMatrix] | None) -> dict[str, Moment]:
    return gather(context.model, context.batches(), context.stage, names)
