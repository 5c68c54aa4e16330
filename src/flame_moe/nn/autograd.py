"""Operations whose way back is written by hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def applied(function: type[Function], *given: Any) -> Tensor:
    """What `function` makes of its arguments, with its own gradient: `Function.apply`, which PyTorch leaves untyped."""
    out: Tensor = function.apply(*given)
    return out
