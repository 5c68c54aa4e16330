"""Layers whose weights grow: a linear map and a layer norm, read at a task's cursor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame_moe.nn.stacked import StackedMatrix, StageVector


class StackedLinear(nn.Module):
    """x W(cursor)^T + b(cursor).

    Args:
        width_in: features of x.
        width_out: features of the result.
        stage: the stage in which the layer is trained first.
        bias: whether to add a bias.
        bound: see `StackedMatrix`.
    """

    affine: ClassVar[Mapping[str, str]] = {"weight": "bias"}

    def __init__(
        self, width_in: int, width_out: int, *, stage: int, bias: bool = True, bound: float | None = None
    ) -> None:
        super().__init__()
        self.weight = StackedMatrix(width_out, width_in, stage=stage, bound=bound)
        start = torch.zeros(width_out) if bound is not None else uniform_bias(width_out, fan_in=width_in)
        self.bias = StageVector(start, stage) if bias else None

    def forward(self, x: Tensor, cursor: int, mask: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out); what comes out where `mask` (...) is false, on padding, is of no use."""
        self.weight.observe(x, mask)
        return F.linear(x, self.weight.effective(cursor), None if self.bias is None else self.bias.at(cursor))


class StackedNorm(nn.Module):
    """Layer normalisation over the last axis with one affine copy per stage."""

    def __init__(self, width: int, *, stage: int) -> None:
        super().__init__()
        self.width = width
        self.weight = StageVector(torch.ones(width), stage)
        self.bias = StageVector(torch.zeros(width), stage)

    def forward(self, x: Tensor, cursor: int) -> Tensor:
        """(..., width) -> (..., width)."""
        return F.layer_norm(x, (self.width,), self.weight.at(cursor), self.bias.at(cursor))


def biases(module: nn.Module) -> dict[str, StageVector]:
    """The bias that is added to what each stacked matrix below `module` gives, by the name of the matrix.

    A layer says in `affine` which of its matrices has which bias; a convolution before a norm, or a table, has none.
    """
    found = {}
    for name, layer in module.named_modules():
        for weight, bias in getattr(layer, "affine", {}).items():
            vector = getattr(layer, bias)
            if isinstance(vector, StageVector):
                found[f"{name}.{weight}" if name else weight] = vector
    return found


def uniform_bias(*shape: int, fan_in: int) -> Tensor:
    """How a bias of this shape begins: uniform in +-1 / sqrt(fan_in), as PyTorch's own layers."""
    limit = 1.0 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-limit, limit)
