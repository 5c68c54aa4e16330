"""Memory-aware synapses: importance is how much the outputs depend on a weight; no labels are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from flame_moe.continual.methods.base import Setting, over
from flame_moe.continual.methods.quadratic import Quadratic
from flame_moe.nn.model import Output
from flame_moe.training.problem import Problem


class MAS(Quadratic):
    """I = mean over samples of |d ||f(x)||^2 / d theta|, f the logits; summed over stages (Aljundi et al. 2018, arXiv
    1711.09601).
    """

    name: ClassVar[str] = "mas"
    defaults: ClassVar[Mapping[str, float]] = {"strength": 1.0, "decay": 1.0, "samples": 256}
    grid: ClassVar[tuple[Setting, ...]] = over("strength", 1.0, 10.0)

    def quantity(self, problem: Problem, output: Output, target: Tensor) -> Tensor:
        return output.logits.square().sum()

    def measure(self, gradient: Tensor) -> Tensor:
        return gradient.abs()
