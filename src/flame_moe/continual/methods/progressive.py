"""Progressive networks: a fresh column of experts per stage that looks sideways at those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from flame_moe.continual.methods.frozen import Frozen
from flame_moe.errors import RecipeError
from flame_moe.nn.block import Block
from flame_moe.nn.columns import Progressive
from flame_moe.nn.model import Flame
from flame_moe.schema import Modality, Task


class ProgressiveNetworks(Frozen):
    """A later stage adds `experts` experts to each block with routers of their own, and adapters from all earlier
    columns (Rusu et al. 2016, arXiv 1606.04671). Encoders and attention are shared and frozen; everything else is as in
    `Frozen`. A task reads the columns up to its own stage, so earlier tasks cannot change.

    What is stored grows by a pool and two maps per block and stage, and a stage costs the forward pass of all columns.
    """

    name: ClassVar[str] = "progressive"
    defaults: ClassVar[Mapping[str, float]] = {"experts": 4}

    def add(
        self, model: Flame, stage: int, tasks: Sequence[Task], modalities: Sequence[str], new: Sequence[Modality]
    ) -> None:
        experts = int(self.value("experts"))
        if stage:
            for block in routed_blocks(model, self.name):
                earlier = 1 + len(block.columns)
                block.columns[str(stage)] = Progressive(model.config, experts, stage, earlier)
        super().add(model, stage, tasks, modalities, new)

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        model.add_router_heads(modalities, stage, experts=int(self.value("experts")) if stage else None)


def routed_blocks(model: Flame, method: str) -> list[Block]:
    """The blocks of a model whose sequences are routed.

    Raises:
        RecipeError: if there are none, and a method cannot do without.
    """
    if model.preset.experts != "routed":
        what = f"the method '{method}' adds experts, and with preset '{model.config.preset}' nothing is routed"
        raise RecipeError(what, where="model.preset", mend="Use a preset with routers, or another method.")
    return [block for block in model.blocks if isinstance(block, Block)]
