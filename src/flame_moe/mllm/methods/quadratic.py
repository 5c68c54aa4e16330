"""Methods that pull each weight of the adapter to where earlier tasks left it, the harder the more it mattered."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from flame_moe.mllm.methods.base import Grid, Part, Settings, TaskData, sampled
from flame_moe.mllm.methods.sequential import Sequential
from flame_moe.mllm.stream.encode import Batch, Encoded
from flame_moe.mllm.stream.score import answer_loss


class Quadratic(Sequential):
    """strength / 2 sum over weights of importance (weight - anchor)^2; importance adds up over tasks."""

    def __init__(self, model: Any, settings: Settings, seed: int, foundation: Encoded | None = None) -> None:
        super().__init__(model, settings, seed, foundation)
        self.importance = {name: torch.zeros_like(p) for name, p in self.adapter().items()}
        self.anchor: dict[str, Tensor] = {}

    @abstractmethod
    def measured(self, logits: Tensor, batch: Batch) -> Tensor:
        """What is differentiated, for one sample."""

    @abstractmethod
    def mattering(self, gradient: Tensor) -> Tensor:
        """What one sample's gradient says of importance."""

    def after(self, task: TaskData) -> None:
        which = sampled(task.train, self.settings.importance_samples, self.seed, "importance", task.name)
        own = self.adapter()
        for row in which:
            batch = task.train.batch(row[None], self.embedding)
            gradients = torch.autograd.grad(self.measured(self.call(batch), batch), list(own.values()))
            for name, gradient in zip(own, gradients, strict=True):
                self.importance[name] += self.mattering(gradient) / len(which)
        self.anchor = {name: p.detach().clone() for name, p in own.items()}

    def term(self) -> Tensor:
        pulls = [(self.importance[name] * (p - self.anchor[name]).square()).sum() for name, p in self.adapter().items()]
        return self.settings.strength / 2 * torch.stack(pulls).sum()

    def stored(self) -> dict[Part, int]:
        kept = super().stored()
        return kept | {"memory": 2 * kept["experts"]}


class Ewc(Quadratic):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): the diagonal Fisher information, at the given answers."""

    name = "ewc"
    label = "EWC"
    grid: ClassVar[Grid] = {"strength": (1e1, 1e2, 1e3, 1e4)}

    def measured(self, logits: Tensor, batch: Batch) -> Tensor:
        return answer_loss(logits, batch.labels) * (batch.labels[:, 1:] >= 0).sum()

    def mattering(self, gradient: Tensor) -> Tensor:
        return gradient.square()


class Mas(Quadratic):
    """Memory aware synapses (Aljundi et al. 2018): |gradient of the squared norm of the answers' logits|."""

    name = "mas"
    label = "MAS"
    grid: ClassVar[Grid] = {"strength": (1e-2, 1e-1, 1.0, 1e1, 1e2)}

    def measured(self, logits: Tensor, batch: Batch) -> Tensor:
        return logits[:, :-1][batch.labels[:, 1:] >= 0].float().square().mean(-1).sum()

    def mattering(self, gradient: Tensor) -> Tensor:
        return gradient.abs()
