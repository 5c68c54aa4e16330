"""What a model costs: live while serving, stored in the checkpoint. Only what a forward reads is counted."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from flame_moe.nn.block import Block
from flame_moe.nn.gating import Router
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix, StageVector

PARTS = ("encoders", "experts", "attention", "routers", "heads")


class PartSize(NamedTuple):
    """Size of one part of the model.

    Attributes:
        part: encoders (with their norms), experts, attention, routers or heads.
        live_parameters: numbers that a forward at the newest cursor reads: one dense matrix per stacked weight, one
            copy of each small vector, one head per router, and all task heads.
        stored_parameters: numbers in the checkpoint: bases, slices, all copies and all heads.
        bytes_per_number: of the stored type.
    """

    part: str
    live_parameters: int
    stored_parameters: int
    bytes_per_number: int


def footprint(model: Flame) -> list[PartSize]:
    """Sizes of the parts, in the order of `PARTS`; a part that does not exist has size 0."""
    live, stored = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    owners: dict[str, list[nn.Module]] = {
        "encoders": [model.paths],
        "heads": [model.heads],
        "experts": [block.pool for block in blocks if block.pool is not None],
        "attention": [block.layers for block in blocks],
        "routers": [block.routers for block in blocks],
    }
    for part, modules in owners.items():
        for module in modules:
            live[part] += _live(module)
            stored[part] += sum(t.numel() for t in module.state_dict().values())
    size = next(model.parameters()).element_size()
    return [PartSize(part, live[part], stored[part], size) for part in PARTS]


def _live(module: nn.Module) -> int:
    if isinstance(module, StackedMatrix):
        return math.prod(module.shape)
    if isinstance(module, StageVector):
        return next(iter(module.copies.values())).numel()
    if isinstance(module, Router):
        return sum(p.numel() for p in next(iter(module.heads.values())).parameters())
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return own + sum(_live(child) for child in module.children())
