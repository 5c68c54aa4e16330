"""SEED-style selective fine-tuning: a stage trains the one expert in which its classes are already farthest apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn

from flame_moe.batch import FlexiBatch
from flame_moe.continual.methods.base import MethodState, StageContext
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.continual.methods.progressive import routed_blocks
from flame_moe.data.loader import to_device
from flame_moe.errors import CheckpointError
from flame_moe.nn.block import Block
from flame_moe.nn.gating import Routing
from flame_moe.nn.model import Flame
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.nn.pooling import masked_mean
from flame_moe.nn.stacked import StackedMatrix, StageVector
from flame_moe.schema import MethodConfig, Task
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import generator

Samples = list[Tensor]
"""Representations (n, d) of the samples of each group of a task."""


class SEED(Frozen):
    """Of each block's experts only one trains in a later stage, in place: the one in whose representations the groups
    of the stage's training samples overlap least, by the mean symmetric Kullback-Leibler divergence between Gaussians
    fitted to each group (Rypesc et al. 2024, arXiv 2401.10191). Groups are classes; of a multilabel task with and
    without each label; of a regression below and above the median. Everything else is as in `Frozen`, with router heads
    per stage, so an earlier task changes only as far as it uses that expert.

    The paper's experts are whole networks that vote by their Gaussians; here they are the pool's, and heads decide.
    """

    name: ClassVar[str] = "seed"
    defaults: ClassVar[Mapping[str, float]] = {"samples": 256}

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.chosen: dict[int, tuple[int, ...]] = {}
        self._held: list[tuple[nn.Parameter, Tensor, int]] = []

    def prepare(self, context: StageContext) -> None:
        if context.stage == 0:
            return
        blocks = routed_blocks(context.model, self.name)
        scores = self.separation(context)
        self.chosen[context.stage] = tuple(int(score.argmax()) for score in scores)
        self._held = []
        for block, expert in zip(blocks, self.chosen[context.stage], strict=True):
            for parameter in _of_pool(block):
                parameter.requires_grad_(True)
                self._held.append((parameter, parameter.detach().clone(), expert))

    def separation(self, context: StageContext) -> list[Tensor]:
        """Per block the mean divergence between the stage's groups in each expert, (E,)."""
        model = context.model
        totals: list[Tensor] = []
        for problem in context.problems.values():
            draw = generator(context.seed, "separation", context.stage, problem.task.name)
            chosen = draw.permutation(problem.train.indices)[: int(self.value("samples"))]
            few = replace(problem, train=replace(problem.train, indices=chosen))
            per_block, target = _representations(model, few)
            groups = _groups(problem.task, target)
            found = [torch.stack([divergence([x[g] for g in groups]) for x in experts]) for experts in per_block]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        return totals

    def adjust_gradients(self, model: Flame) -> None:
        for parameter, _, expert in self._held:
            if parameter.grad is not None:
                parameter.grad.copy_(_only(expert, parameter.grad))

    @torch.no_grad()
    def after_step(self, model: Flame) -> None:
        for parameter, start, expert in self._held:
            others = torch.arange(len(parameter), device=parameter.device) != expert
            parameter[others] = start.to(parameter.device)[others]

    def conclude(self, context: StageContext) -> None:
        self._held = []

    def state(self) -> MethodState:
        return MethodState(meta={"chosen": {str(stage): list(experts) for stage, experts in self.chosen.items()}})

    def restore(self, model: Flame, state: MethodState) -> None:
        chosen = {int(stage): tuple(int(e) for e in experts) for stage, experts in state.meta["chosen"].items()}
        if any(not 0 <= e < model.config.experts for experts in chosen.values() for e in experts):
            raise CheckpointError("the experts that were trained are not of this model")
        self.chosen = chosen


def divergence(groups: Samples) -> Tensor:
    """Mean over pairs of groups of KL(p||q) + KL(q||p) between Gaussians fitted to them; 0 with fewer than two groups.

    Covariances are shrunk towards a multiple of the identity, the more the fewer samples there are for them.

    Args:
        groups: (n, d) each; groups of fewer than two samples are left out.
    """
    fitted = [_gaussian(x.double()) for x in groups if len(x) > 1]
    pairs = [_symmetric(*p, *q) for p, q in combinations(fitted, 2)]
    return torch.stack(pairs).mean() if pairs else torch.zeros((), dtype=torch.float64)


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    n, d = x.shape
    mean, share = x.mean(0), d / (n + d)
    covariance = (x - mean).T @ (x - mean) / n
    eye = torch.eye(d, dtype=x.dtype)
    scale = covariance.trace() / d
    return mean, (1 - share) * covariance + (share * scale + 1e-6 * scale + 1e-12) * eye


def _symmetric(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> Tensor:
    """KL(p||q) + KL(q||p) = (tr(C2^-1 C1) + tr(C1^-1 C2) + (m1 - m2)^T (C1^-1 + C2^-1) (m1 - m2)) / 2 - d."""
    gap = m1 - m2
    first, second = torch.linalg.inv(c1), torch.linalg.inv(c2)
    return 0.5 * ((second @ c1).trace() + (first @ c2).trace() + gap @ (first + second) @ gap) - len(gap)


def _groups(task: Task, target: Tensor) -> list[Tensor]:
    """(n,) bool masks of the groups whose separation counts."""
    if task.kind == "multiclass":
        return [target[:, 0] == c for c in range(len(task.classes))]
    middle = target.median(0).values if task.kind == "regression" else torch.full((target.shape[1],), 0.5)
    above = target > middle
    return [side[:, j] for j in range(target.shape[1]) for side in (~above, above)]


@torch.inference_mode()
def _representations(model: Flame, problem: Problem) -> tuple[list[list[Tensor]], Tensor]:
    """Per block and expert (n, d), what the expert makes of each sample: the mean over steps, then over modalities; and
    the targets (n, width)."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    parts: list[list[list[Tensor]]] = []
    targets = []
    for batch in problem.train.batches(None):
        parts.append(_of_batch(model, to_device(batch, device), problem.cursor))
        targets.append(batch.target)
    model.train(was_training)
    blocks = [[torch.cat(rows).cpu() for rows in zip(*block, strict=True)] for block in zip(*parts, strict=True)]
    return blocks, torch.cat(targets)


def _of_batch(model: Flame, batch: FlexiBatch, cursor: int) -> list[list[Tensor]]:
    found = []
    for block, ready in model.before_experts(batch, cursor):
        found.append([_pooled(block, ready, expert, batch, cursor) for expert in range(model.config.experts)])
    return found


def _pooled(block: Block, ready: Mapping[str, Sequences], expert: int, batch: FlexiBatch, cursor: int) -> Tensor:
    """(B, d), with every sequence sent to one expert."""
    assert block.pool is not None
    everyone = {name: _all_to(expert, len(z.x), block.pool.experts, z.x.device) for name, z in ready.items()}
    mixed = mixture(ready, everyone, block.pool, cursor)
    total = torch.zeros(batch.size, block.config.width, device=batch.target.device)
    count = torch.zeros(batch.size, 1, device=batch.target.device)
    for name, y in mixed.items():
        rows = batch.modalities[name].rows
        total.index_add_(0, rows, masked_mean(y, ready[name].mask))
        count.index_add_(0, rows, torch.ones(len(rows), 1, device=count.device))
    return total / count.clamp(min=1)


def _all_to(expert: int, n: int, experts: int, device: torch.device) -> Routing:
    chosen = torch.full((n, 1), expert, device=device)
    ones = torch.ones(n, 1, device=device)
    return Routing(chosen, ones, ones.expand(n, experts) / experts, torch.zeros(experts, device=device))


def _of_pool(block: Block) -> Iterator[nn.Parameter]:
    """Parameters of the first stage's experts, each with the experts on its first axis."""
    assert block.pool is not None
    for part in block.pool.children():
        if isinstance(part, StackedMatrix):
            yield part.base
        elif isinstance(part, StageVector):
            yield part.copies["0"]


def _only(expert: int, gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[expert] = gradient[expert]
    return kept
