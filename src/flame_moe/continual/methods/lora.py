"""Low-rank adaptation: each stage trains low-rank factors on a frozen backbone, from zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch

from flame_moe.continual.methods.base import Commit
from flame_moe.continual.methods.flame import born
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.errors import RecipeError
from flame_moe.nn.model import Flame
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import Growable, StackedMatrix, StageVector, growables
from flame_moe.schema import MethodConfig


class LoRA(Frozen):
    """W = W0 + sum over stages of A B on every stacked matrix that the stage's tasks reach (Hu et al. 2021, arXiv
    2106.09685): A (out x rank) starts at zero, B (rank x in) is drawn uniformly from +-1/sqrt(in); no scaling, no
    dropout; biases, norms and queries stay. Everything else is as in `Frozen`. A task reads the factors up to its own
    stage, so earlier tasks cannot change.

    Factors of a stage that would cost at least as much as the dense matrix are stored as one.
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
            *lead, out, width = part.shape
            rank = self._ranks[name]
            part.grow(stage)
            bound = 1.0 / math.sqrt(width)
            part.compress(
                LowRank(torch.zeros(*lead, out, rank), torch.empty(*lead, rank, width).uniform_(-bound, bound))
            )

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        commits = []
        for name, part in growables(model):
            if isinstance(part, StackedMatrix) and part.delta_stage is not None:
                update = part.update()
                if isinstance(update, LowRank):
                    rank = update.a.shape[-1]
                    if rank * sum(part.shape[-2:]) >= math.prod(part.shape[-2:]):
                        part.compress(update.dense())
                if part.commit() is not None:
                    commits.append(Commit.of(name, part.slice(stage), 0.0))
        return [*super().commit(model, stage), *commits]


class LoRAEqual(LoRA):
    """LoRA whose stage stores as many numbers as FLAME would with this rank, slices and copies of biases, norms and
    queries together, up to less than one more rank of one weight: ranks grow evenly until nothing more fits.
    """

    name: ClassVar[str] = "lora_equal"

    def ranks(self, model: Flame, stage: int, modalities: Iterable[str]) -> dict[str, int]:
        names = list(modalities)
        assert self.config.rank is not None
        return ranks_within(_reached(model, stage, names), stored_by_flame(model, stage, names, self.config.rank))


def stored_by_flame(model: Flame, stage: int, modalities: Iterable[str], rank: int) -> int:
    """Numbers that a stage of FLAME stores for what its tasks reach and what was there before it.

    Args:
        model: with the stage's modalities; those that appear in it are stored alike by every method.
        stage: its index.
        modalities: all that its tasks read.
        rank: to which updates are cut.
    """
    parts = [part for _, part in model.growables(modalities) if not born(part, stage)]
    vectors = sum(part.at(stage).numel() for part in parts if isinstance(part, StageVector))
    return vectors + sum(_numbers(part.shape, rank) for part in parts if isinstance(part, StackedMatrix))


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
