"""Holding on to what the model of the stage before says of new samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.continual.methods.base import Method, Setting, StageContext, over
from flame_moe.nn.model import Flame
from flame_moe.schema import MethodConfig, Task
from flame_moe.training.hooks import Seen


class Teacher:
    """The model as it was before the stage, in evaluation mode, and the tasks that it knows.

    Args:
        context: of the stage, before it trains.
    """

    def __init__(self, context: StageContext) -> None:
        self.model = copy.deepcopy(context.model).eval().requires_grad_(False)
        self.cursors: Mapping[str, int] = {name: context.cursors[name] for name in context.old_tasks}

    def loss(self, model: Flame, seen: Sequence[Seen], temperature: float) -> Tensor | None:
        """Mean distillation loss of every earlier task on every batch of the step that it can read, summed; or None.

        An earlier task is asked about the samples of a batch that have any of its modalities; it does without those
        that the batch does not hold.
        """
        terms = []
        for batch in (s.batch for s in seen):
            for name, cursor in self.cursors.items():
                part = readable(batch, model.tasks[name])
                if part is not None:
                    with torch.no_grad():
                        soft = self.model.to(part.target.device)(part, cursor).logits
                    terms.append(distillation(model.tasks[name], model(part, cursor).logits, soft, temperature))
        return torch.stack(terms).sum() if terms else None


class Distils(Method):
    """Adds strength * the distillation loss of all earlier tasks to every step of a stage (`Teacher`)."""

    defaults: ClassVar[Mapping[str, float]] = {"strength": 1.0, "temperature": 2.0}
    grid: ClassVar[tuple[Setting, ...]] = over("strength", 1.0, 3.0)

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._teacher: Teacher | None = None

    def prepare(self, context: StageContext) -> None:
        self._teacher = Teacher(context) if context.old_tasks else None

    def penalty(self, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        if self._teacher is None:
            return None
        loss = self._teacher.loss(model, seen, self.value("temperature"))
        return None if loss is None else self.value("strength") * loss

    def conclude(self, context: StageContext) -> None:
        self._teacher = None


def readable(batch: FlexiBatch, task: Task) -> FlexiBatch | None:
    """The samples of a batch that have any of a task's modalities, as a batch of that task without targets."""
    parts = {name: batch.modalities[name] for name in task.modalities if name in batch.modalities}
    if not parts:
        return None
    device = batch.target.device
    there = torch.zeros(batch.size, dtype=torch.bool, device=device)
    for part in parts.values():
        there[part.rows] = True
    place = there.cumsum(0) - 1
    chosen = there.nonzero()[:, 0].tolist()
    return FlexiBatch(
        task=task.name,
        size=len(chosen),
        modalities={name: part._replace(rows=place[part.rows]) for name, part in parts.items()},
        target=torch.full((len(chosen), task.target_width), torch.nan, device=device),
        ids=tuple(batch.ids[i] for i in chosen),
    )


def distillation(task: Task, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over samples of T^2 KL(teacher || student) at temperature T (Hinton et al. 2015, arXiv 1503.02531); for
    binary and multilabel tasks of each output's two classes, averaged; for regression the squared difference.

    Args:
        task: whose outputs these are.
        student, teacher: (B, outputs) logits, or standardised values of a regression.
        temperature: T > 0.
    """
    if task.kind == "regression":
        return (student - teacher).square().mean()
    s, t = student / temperature, teacher / temperature
    if task.kind != "multiclass":
        s, t = torch.stack([s, torch.zeros_like(s)], -1), torch.stack([t, torch.zeros_like(t)], -1)
    s, t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    return temperature**2 * F.kl_div(s, t, reduction="none", log_target=True).sum(-1).mean()
