"""O-LoRA: the factors of a stage avoid the input directions of the stages before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from flame_moe.continual.methods.base import Setting, over
from flame_moe.continual.methods.lora import LoRA
from flame_moe.nn.model import Flame
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import StackedMatrix
from flame_moe.training.hooks import Seen


class OLoRA(LoRA):
    """LoRA with the penalty strength * sum over matrices and earlier stages i of ||B_i B_t^T||_F^2 (Wang et al. 2023,
    arXiv 2310.14152; B is that paper's A). The paper has one model for all tasks, where overlap means
    forgetting; here a task reads the factors up to its own stage, and the penalty only asks new ones to be different.
    """

    name: ClassVar[str] = "olora"
    defaults: ClassVar[Mapping[str, float]] = {"strength": 0.5}
    grid: ClassVar[tuple[Setting, ...]] = over("strength", 0.5, 5.0, rates=(3.0, 10.0))

    def penalty(self, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        terms = []
        for part in model.modules():
            if isinstance(part, StackedMatrix) and part.delta_stage is not None:
                new = part.update()
                for old in map(part.slice, part.stages):
                    if isinstance(new, LowRank) and isinstance(old, LowRank):
                        terms.append((old.b @ new.b.mT).square().sum())
        return self.value("strength") * torch.stack(terms).sum() if terms else None
