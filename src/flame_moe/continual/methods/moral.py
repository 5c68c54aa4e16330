"""MoRAL-style low-rank experts: a mixture of LoRA experts beside a frozen layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from flame_moe.continual.methods.frozen import Frozen
from flame_moe.continual.methods.progressive import routed_blocks
from flame_moe.errors import RecipeError
from flame_moe.nn.columns import LowRankExperts
from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig, Modality, Task


class MoRAL(Frozen):
    """A later stage adds `experts` low-rank experts of rank `rank` beside each block's frozen pool, and a gate that
    scores them and those of earlier stages at every step (Yang et al. 2024, arXiv 2402.11260). The paper puts them
    beside the feed-forward layers of a language model; the pool is this network's. Everything else is as in `Frozen`. A
    task reads the low-rank experts up to its own stage, so earlier tasks cannot change.
    """

    name: ClassVar[str] = "moral"
    keys: ClassVar[tuple[str, ...]] = ("rank",)
    defaults: ClassVar[Mapping[str, float]] = {"experts": 4}

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if config.rank is None or config.rank < 1:
            raise RecipeError(f"the method '{self.name}' needs a rank of at least 1", where="method.rank")

    def add(
        self, model: Flame, stage: int, tasks: Sequence[Task], modalities: Sequence[str], new: Sequence[Modality]
    ) -> None:
        if stage:
            assert self.config.rank is not None
            experts, rank = int(self.value("experts")), min(self.config.rank, model.config.width)
            for block in routed_blocks(model, self.name):
                earlier = experts * len(block.columns)
                block.columns[str(stage)] = LowRankExperts(model.config, experts, rank, stage, earlier)
        super().add(model, stage, tasks, modalities, new)
