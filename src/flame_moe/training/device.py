"""Where and in which precision a model is trained: one device, float32 or bfloat16 by autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import get_args

import torch

from flame_moe.errors import RecipeError
from flame_moe.schema import Accelerator, TrainConfig


def choose_device(accelerator: str, where: str = "train.accelerator") -> torch.device:
    """The device that is asked for; with "auto" a GPU if there is one.

    Args:
        accelerator: cpu, cuda or auto.
        where: it was asked, for the message.

    Raises:
        RecipeError: if there is no such word, or a GPU is asked for and PyTorch finds none.
    """
    if accelerator not in get_args(Accelerator):
        raise RecipeError(f"there is no '{accelerator}'", where=where, mend=f"Give {', '.join(get_args(Accelerator))}.")
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RecipeError("PyTorch finds no CUDA device", where=where, mend="Give 'cpu' or 'auto'.")
    return torch.device("cuda", torch.cuda.current_device())


def autocast(device: torch.device, config: TrainConfig) -> AbstractContextManager[None]:
    """Products in bfloat16 with train.precision = "bf16-mixed"; routing, norms and losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16-mixed")
