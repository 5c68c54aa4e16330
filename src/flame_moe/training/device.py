"""Where and in which precision a model is trained: one device, float32 or bfloat16 by autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from flame_moe.errors import RecipeError
from flame_moe.schema import TrainConfig


def choose_device(config: TrainConfig) -> torch.device:
    """The device that a recipe asks for; with "auto" a GPU if there is one.

    Raises:
        RecipeError: if it asks for a GPU and PyTorch finds none.
    """
    if config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        what, mend = "PyTorch finds no CUDA device", "Use train.accelerator = 'cpu' or 'auto'."
        raise RecipeError(what, where="train.accelerator", mend=mend)
    return torch.device("cuda", torch.cuda.current_device())


def autocast(device: torch.device, config: TrainConfig) -> AbstractContextManager[None]:
    """Products in bfloat16 with train.precision = "bf16-mixed"; routing, norms and losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16-mixed")
