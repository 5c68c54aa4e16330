"""Low-rank adaptation: each stage trains low-rank factors on a frozen backbone, from zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from flame_moe.continual.methods.base import Commit
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.continual.methods.growth import born
from flame_moe.continual.truncation import Plan, fresh
from flame_moe.errors import RecipeError
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import Growable, StackedMatrix, StageVector, growables
from flame_moe.schema import MethodConfig


class LoRA(Frozen):
    """W = W0 + sum over stages of A B on every stacked matrix that the stage's tasks reach (Hu et al. 2021, arXiv
    2106.09685): A (out x rank) starts at zero, B (rank x in) is drawn uniformly from +-1/sqrt(in); no scaling, no
    dropout; biases, norms and queries stay. Everything else is as in `Frozen`. A task reads the factors up to its own
    stage, so earlier tasks cannot change.

    Where factors would cost at least as much as the dense matrix, that is trained and stored.
    """

    name: ClassVar[str] = "lora"
    keys: ClassVar[tuple[str, ...]] = ("rank",)

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if config.rank is None or config.rank < 1:
            raise RecipeError(f"the method '{self.name}' needs a rank of at least 1", where="method.rank")

    def ranks(self, model: Flame, stage: int, modalities: Iterable[str]) -> dict[str, int]:
        """Rank of the factors of each weight that the stage's tasks reach."""
        assert self.config.rank is not None
        shapes = _reached(model, stage, modalities)
        return {name: min(self.config.rank, *shape[-2:]) for name, shape in shapes.items()}

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        self._ranks = self.ranks(model, stage, modalities) if stage else {}
        super().begin(model, stage, tasks, modalities)

    def start(self, model: Flame, name: str, part: Growable, stage: int) -> None:
        if isinstance(part, StackedMatrix):
            part.grow(stage)
            part.compress(fresh(part.shape, self._ranks[name]))

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        parts = {n: p for n, p in growables(model) if isinstance(p, StackedMatrix) and p.delta_stage is not None}
        commits = [Commit.of(name, part.update(), 0.0) for name, part in parts.items()]
        return [*commits, *super().commit(model, stage)]


class LoRAEqual(LoRA):
    """LoRA whose stage stores as many numbers as FLAME would with this rank or budget, slices and copies of biases,
    norms and queries together, up to less than one more rank of one weight: ranks grow evenly until nothing more fits.
    """

    name: ClassVar[str] = "lora_equal"
    keys: ClassVar[tuple[str, ...]] = ("keep", "rank", "budget")

    def __init__(self, config: MethodConfig) -> None:
        Frozen.__init__(self, config)
        if config.keep == "energy":
            what = "what FLAME stores with keep = 'energy' is known only when it has learned"
            raise RecipeError(what, where="method.keep", mend="Give 'lora_equal' a rank or a budget.")

    def ranks(self, model: Flame, stage: int, modalities: Iterable[str]) -> dict[str, int]:
        names, c = list(modalities), self.config
        plan = Plan(keep=c.keep, rank=c.rank, budget=c.budget)
        return ranks_within(_reached(model, stage, names), stored_by_flame(model, stage, names, plan))


def stored_by_flame(model: Flame, stage: int, modalities: Iterable[str], plan: Plan) -> int:
    """Numbers that a stage of FLAME stores for what its tasks reach and what was there before it.

    Args:
        model: with the stage's modalities; those that appear in it are stored alike by every method.
        stage: its index.
        modalities: all that its tasks read.
        plan: how it compresses updates, by a rank or a budget; a budget is counted as if it were used up.
    """
    parts = [part for _, part in model.growables(modalities) if not born(part, stage)]
    vectors = sum(part.at(stage).numel() for part in parts if isinstance(part, StageVector))
    shapes = [part.shape for part in parts if isinstance(part, StackedMatrix)]
    dense = sum(math.prod(shape) for shape in shapes)
    if plan.keep == "budget":
        return vectors + min(dense, int(plan.budget * dense) if plan.budget < 1 else int(plan.budget))
    return vectors + (dense if plan.rank is None else sum(_numbers(shape, plan.rank) for shape in shapes))


def ranks_within(shapes: Mapping[str, torch.Size], budget: int) -> dict[str, int]:
    """Ranks, as even as can be, whose factors store at most `budget` numbers; each at least 1.

    Args:
        shapes: weight -> (..., out, in), a stack of matrices of one rank.
        budget: numbers altogether.
    """
    ranks = dict.fromkeys(shapes, 1)
    left, grows = budget - sum(_numbers(shape, 1) for shape in shapes.values()), True
    while grows:
        grows = False
        for name, shape in shapes.items():
            step = _numbers(shape, ranks[name] + 1) - _numbers(shape, ranks[name])
            if ranks[name] < min(shape[-2:]) and step <= left:
                ranks[name], left, grows = ranks[name] + 1, left - step, True
    return ranks


def _reached(model: Flame, stage: int, modalities: Iterable[str]) -> dict[str, torch.Size]:
    parts = {name: part for name, part in model.growables(modalities) if not born(part, stage)}
    return {name: part.shape for name, part in parts.items() if isinstance(part, StackedMatrix)}


def _numbers(shape: torch.Size, rank: int) -> int:
    """What an update of a stack of matrices stores at a rank."""
    *lead, out, width = shape
    return math.prod(lead) * min(rank * (out + width), out * width)
