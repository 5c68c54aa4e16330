"""Elastic weight consolidation: importance is the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from flame_moe.continual.methods.base import Setting, over
from flame_moe.continual.methods.quadratic import Quadratic
from flame_moe.nn.model import Output
from flame_moe.training.problem import Problem


class EWC(Quadratic):
    """I = mean over samples of (d loss / d theta)^2, the empirical Fisher information (Kirkpatrick et al. 2017, arXiv
    1612.00796), of the task's own loss on true labels; online, with decay (Schwarz et al. 2018, arXiv 1805.06370).
    """

    name: ClassVar[str] = "ewc"
    defaults: ClassVar[Mapping[str, float]] = {"strength": 100.0, "decay": 0.9, "samples": 256}
    grid: ClassVar[tuple[Setting, ...]] = over("strength", 10.0, 1000.0)

    def quantity(self, problem: Problem, output: Output, target: Tensor) -> Tensor:
        return problem.losses(output.logits, target).sum()

    def measure(self, gradient: Tensor) -> Tensor:
        return gradient.square()
