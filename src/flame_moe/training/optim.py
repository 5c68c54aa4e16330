"""AdamW with decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flame_moe.nn.encoders.codes import StackedEmbedding
from flame_moe.nn.encoders.time_attention import TimeEmbedding
from flame_moe.nn.fusion import Head
from flame_moe.nn.stacked import Settled, StackedMatrix
from flame_moe.schema import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float, pretrained: float = 1.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups: linear maps with decay, everything else without; pre-trained ones apart.

    Without are routers, queries, norms, biases and times, and tables of embeddings, whose rows would shrink in every
    step that does not read them; and pre-trained encoders, which would be drawn to zero, not to where they came from.
    `rate` of a group is its learning rate as a multiple of the schedule's: `pretrained` for the pre-trained, else 1.
    """
    matrices: set[int] = set()
    for module in model.modules():
        if isinstance(module, StackedMatrix):
            matrices |= {id(p) for p in module.parameters(recurse=False)}
        if isinstance(module, Head):
            matrices.add(id(module.linear.weight))
    for module in model.modules():
        if isinstance(module, TimeEmbedding | StackedEmbedding):
            matrices -= {id(p) for p in module.parameters()}
    settled = {id(p) for module in model.modules() if isinstance(module, Settled) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    apart = [p for p in trainable if id(p) in settled]
    own = [p for p in trainable if id(p) not in settled]
    groups = [
        {"params": [p for p in own if id(p) in matrices], "weight_decay": weight_decay, "rate": 1.0},
        {"params": [p for p in own if id(p) not in matrices], "weight_decay": 0.0, "rate": 1.0},
    ]
    if apart:
        groups.append({"params": apart, "weight_decay": 0.0, "rate": pretrained})
    return groups


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over everything that is trainable now."""
    groups = parameter_groups(model, config.weight_decay, config.pretrained_lr / config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up over the first share of the steps, then constant or a cosine to zero."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    done = (step - warm) / max(1, steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
