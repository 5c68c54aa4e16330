"""What a forward really reads: watched while it runs, not derived from names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flame_moe.batch import FlexiBatch
from flame_moe.nn.model import Flame


class _Watch(TorchDispatchMode):
    """Notes the memory of every tensor that any operation takes."""

    def __init__(self) -> None:
        # PyTorch leaves the constructor of its dispatch modes without annotations.
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        self.memory |= {_memory(leaf) for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)}
        return func(*args, **options)


def reads(model: Flame, batch: FlexiBatch, cursor: int) -> tuple[Tensor, list[str]]:
    """Logits in evaluation mode, and the names of all parameters and buffers that computing them read.

    Works on a copy, so that cached sums of slices are made anew and the slices themselves are seen.

    Args:
        model: the network; not changed.
        batch: a modality that is in no sample of it is not read.
        cursor: the stage whose weights are read.

    Returns:
        (B, outputs) float32 logits on the CPU; names in the order of the model.
    """
    twin = copy.deepcopy(model).cpu().eval()
    with torch.no_grad(), _Watch() as watch:
        logits = twin(batch, cursor).logits
    return logits.float(), [name for name, t in tensors_of(twin) if t.numel() and _memory(t) in watch.memory]


def tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer with its name, those that are not saved included."""
    return [*model.named_parameters(), *model.named_buffers()]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
