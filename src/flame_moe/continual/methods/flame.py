"""FLAME-CL: compress each stage's change into a frozen low-rank slice (paper Eq. 3-4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from flame_moe.continual.methods.base import Commit, Round, StageContext
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.continual.methods.growth import born, unfreeze
from flame_moe.continual.moments import gather, tables
from flame_moe.continual.sensitivity import squared_gradients
from flame_moe.continual.truncation import Plan, by_weight, fresh, truncate
from flame_moe.errors import RecipeError
from flame_moe.nn.layers import biases
from flame_moe.nn.model import Flame
from flame_moe.nn.slices import Slice, balanced
from flame_moe.nn.stacked import Growable, StackedMatrix, growables
from flame_moe.schema import MethodConfig


class FlameCL(Frozen):
    """Stage 0 trains everything. A later stage trains, with all else frozen,

    - a zero-initialised full-rank update on every stacked matrix that its tasks reach, and a copy of small vectors;
    - new router heads for its modalities, new heads for its tasks;
    - the whole path of a modality that appears for the first time; of a pre-trained encoder that is the only stage.

    The updates are truncated when the stage is trained, or after a share `warmup` of its epochs; then their factors
    train on. The commit freezes all of it. Earlier tasks read older cursors and cannot change.
    """

    name: ClassVar[str] = "flame"
    keys: ClassVar[tuple[str, ...]] = (
        *("preset", "truncation", "keep", "rank", "energy", "budget", "bias_correction", "warmup", "recalibrate"),
        *("base_rank", "router", "router_heads", "load", "warm_start"),
    )

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        c = config
        self.plan = Plan(c.truncation, c.keep, c.rank, c.energy, c.budget, c.bias_correction)

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
        names = model.modalities if self.config.router_heads == "all" else modalities
        model.add_router_heads(names, stage, combine=self.config.router, load=self.config.load)

    def start(self, model: Flame, name: str, part: Growable, stage: int) -> None:
        part.grow(stage)
        if self._from_zero and isinstance(part, StackedMatrix):
            part.compress(fresh(part.shape, self.config.rank or 0))

    def rounds(self, stage: int, epochs: int) -> Sequence[Round]:
        share, tail = self.config.warmup, self.config.recalibrate
        if stage == 0:
            return (Round(epochs),)
        before = epochs - tail
        least = 2 if 0 < share < 1 else 1
        if before < least:
            what = f"{epochs} epochs cannot be divided into a warm-up, refinement and {tail} epochs of recalibration"
            raise RecipeError(what, where="method", mend="Give more epochs, or another 'warmup' or 'recalibrate'.")
        dense = round(share * before)
        dense = min(max(dense, 1), before - 1) if least == 2 else dense
        parts = (Round(dense), Round(before - dense, compressed=True), Round(tail, compressed=True, routing_only=True))
        return tuple(part for part in parts if part.epochs)

    def enter(self, context: StageContext, part: Round) -> None:
        model = context.model
        model.requires_grad_(False)
        unfreeze(model, context.stage, context.tasks)
        if part.routing_only:
            for name, parameter in model.named_parameters():
                where = name.split(".")
                if where[0] != "heads" and where[2] != "routers":
                    parameter.requires_grad_(False)

    def compresses(self, stage: int) -> bool:
        return stage > 0 and not self._from_zero

    def compress(self, context: StageContext) -> list[Commit]:
        """Truncate all updates of the stage; the bias takes the mean of what they lose, if it is to."""
        model, stage = context.model, context.stage
        parts = {name: p for name, p in growables(model) if isinstance(p, StackedMatrix) and p.delta_stage == stage}
        if self._from_zero:
            return [Commit.of(name, part.update(), 0.0) for name, part in parts.items()]
        with torch.no_grad():
            deltas = {name: part.delta for name, part in parts.items() if part.delta is not None and part.delta.any()}
            seen = (batch for _, batch in context.sampled("truncation"))
            moments = gather(model, seen, stage, deltas) if self.plan.reads_inputs else {}
            changed = {name: parts[name] for name in deltas}
            squares = squared_gradients(context, changed) if self.plan.reads_gradients else {}
            vectors = biases(model)
            found = truncate(deltas, self.plan, moments, squares=squares, biased=vectors)
            for name, part in parts.items():
                # An update of exact zeros is worth nothing, and ends here.
                got = found.get(name)
                part.compress(None if got is None else self._kept(got.part))
                if got is not None and got.shift is not None:
                    vectors[name].copies[str(stage)].add_(got.shift)
        return [Commit.of(name, t.part, t.relative_error, t.functional_error) for name, t in found.items()]

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        commits = []
        skipped = tables(model)
        for name, part in growables(model):
            part.commit()
            if isinstance(part, StackedMatrix) and born(part, stage) and part.base.numel() and part not in skipped:
                commits += [] if self.config.base_rank is None else [_cut(name, part, self.config.base_rank)]
        model.requires_grad_(False)
        return commits

    def _kept(self, part: Slice) -> Slice:
        return part if part is None or self.config.warmup == 1 else balanced(part)

    @property
    def _from_zero(self) -> bool:
        """Whether updates are factors from their first step."""
        return self.config.warmup == 0 and not self.plan.keeps_all


def _cut(name: str, part: StackedMatrix, rank: int) -> Commit:
    """Truncate the base of a weight that was trained for the first time."""
    before = part.base.detach().clone()
    kept = part.cut_base(by_weight(rank))
    return Commit.of(name, kept, float((before - part.effective(part.base_stage)).norm() / before.norm()))
