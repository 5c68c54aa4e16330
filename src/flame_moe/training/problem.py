"""A task with everything that training it needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flame_moe.data.loader import Loader
from flame_moe.nn.losses import task_loss
from flame_moe.schema import Task


@dataclass(frozen=True)
class Problem:
    """A task to learn.

    Attributes:
        task: the task.
        cursor: the stage at whose weights it is read.
        train: batches to learn from.
        val: batches to choose by.
        scale: (mean, std), each (target_width,), of regression targets on the training split; else None.
        class_weight: see `flame_moe.nn.losses.class_weights`.
    """

    task: Task
    cursor: int
    train: Loader
    val: Loader
    scale: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    class_weight: Tensor | None

    def losses(self, logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
        """Loss of each sample, (B,), against targets in natural units."""
        if self.scale is not None:
            mean, std = (torch.as_tensor(s, device=target.device) for s in self.scale)
            target = (target - mean) / std
        weight = None if self.class_weight is None else self.class_weight.to(target.device)
        return task_loss(self.task, logits, target, weight, smoothing)
