"""Lifelong-MoE: grow experts and the gate's columns, freeze the old ones, hold on to old outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from flame_moe.continual.methods.distillation import Distils
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.continual.methods.progressive import routed_blocks
from flame_moe.nn.columns import MoreExperts
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import Settled
from flame_moe.schema import Modality, Task


class LifelongMoE(Distils, Frozen):
    """A later stage adds `experts` experts to each block and as many columns to the gates of its modalities; old
    experts and old columns are frozen, a sequence may go to old and new ones. Encoders, attention and their norms are
    shared and train on in place, held by strength * distillation of the earlier tasks on the stage's own batches (Chen
    et al. 2023, arXiv 2305.12281). So earlier tasks do change. They are read with the experts and columns of their own
    stage; the paper, which has no task identity, reads all.
    """

    name: ClassVar[str] = "lifelong_moe"
    defaults: ClassVar[Mapping[str, float]] = {"experts": 2, **Distils.defaults}

    def add(
        self, model: Flame, stage: int, tasks: Sequence[Task], modalities: Sequence[str], new: Sequence[Modality]
    ) -> None:
        if stage:
            for block in routed_blocks(model, self.name):
                block.columns[str(stage)] = MoreExperts(model.config, int(self.value("experts")), stage)
        super().add(model, stage, tasks, modalities, new)

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        total = model.config.experts + stage * int(self.value("experts"))
        model.add_router_heads(modalities, stage, combine="append", experts=total)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        super().begin(model, stage, tasks, modalities)
        if stage:
            for name, parameter in model.named_parameters():
                if name.startswith("paths.") or name.split(".")[2] == "layers":
                    parameter.requires_grad_(True)
            for part in model.modules():
                if isinstance(part, Settled) and part.stage < stage:
                    part.module.requires_grad_(False)
