"""What a model costs: while serving, in the checkpoint, and by the two accountings of continual-learning papers.

Accounting A counts what predicting every task learned so far reads; B the part of it that the method answers for: the
weights that a stage may change, with every slice and copy that stages have left. Heads, routers and what never grows
are not in B. Both leave out what no prediction reads, such as the noise of the routers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from flame_moe.nn.block import Block
from flame_moe.nn.fusion import Head
from flame_moe.nn.gating import Router, RouterHead
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import Settled, StackedMatrix, StageVector, growables

PARTS = ("encoders", "experts", "attention", "routers", "heads")


class PartSize(NamedTuple):
    """Size of one part of the model.

    Attributes:
        part: encoders (with their norms), experts, attention, routers or heads.
        live_parameters: numbers that a forward at the newest cursor reads: one dense matrix per stacked weight, one
            copy of each small vector, one head per router (all where they are combined), and all task heads.
        stored_parameters: numbers in the checkpoint: bases, slices, all copies and all heads.
        inference_parameters: those of the stored numbers that a forward of any task reads (accounting A).
        method_parameters: those of them in weights that can grow (accounting B).
        bytes_per_number: of the stored type.
    """

    part: str
    live_parameters: int
    stored_parameters: int
    inference_parameters: int
    method_parameters: int
    bytes_per_number: int


def footprint(model: Flame) -> list[PartSize]:
    """Sizes of the parts, in the order of `PARTS`; a part that does not exist has size 0."""
    networks = model.networks()
    blocks = [block for network in networks for block in network.blocks if isinstance(block, Block)]
    owners: dict[str, list[nn.Module]] = {
        "encoders": [network.paths for network in networks],
        "heads": [network.heads for network in networks],
        "experts": [p for block in blocks for p in (block.pool, block.columns) if p is not None],
        "attention": [block.layers for block in blocks],
        "routers": [block.routers for block in blocks],
    }
    size = next(model.parameters()).element_size()
    return [
        PartSize(
            part,
            live_parameters=sum(map(_live, owners[part])),
            stored_parameters=sum(map(_stored, owners[part])),
            inference_parameters=sum(map(_read, owners[part])),
            method_parameters=sum(map(_grown, owners[part])),
            bytes_per_number=size,
        )
        for part in PARTS
    ]


def _stored(module: nn.Module) -> int:
    return sum(t.numel() for t in module.state_dict().values())


def _read(module: nn.Module) -> int:
    return _stored(module) - sum(_unread(child) for child in module.modules())


def _unread(module: nn.Module) -> int:
    """What no prediction reads: a router's noise, and the vector for the absence of a task's only modality."""
    if isinstance(module, RouterHead):
        return module.noise.numel()
    return module.absent.numel() if isinstance(module, Head) and len(module.modalities) == 1 else 0


def _grown(module: nn.Module) -> int:
    return sum(_stored(part) for _, part in growables(module) if not isinstance(part, Settled))


def _live(module: nn.Module) -> int:
    if isinstance(module, StackedMatrix):
        return math.prod(module.shape)
    if isinstance(module, StageVector):
        return next(iter(module.copies.values())).numel()
    if isinstance(module, Router):
        return sum(map(_read, module.read(max(int(stage) for stage in module.heads))))
    if isinstance(module, Head):
        return _read(module)
    own = sum(p.numel() for p in module.parameters(recurse=False))
    return own + sum(_live(child) for child in module.children())
