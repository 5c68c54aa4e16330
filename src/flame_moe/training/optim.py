"""AdamW with decay on matrices only, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) in PyTorch's fused form, without the class around it.

    The class of `torch.optim` imports PyTorch's compiler when it is first made, which takes longer than everything
    else between the command and the first batch. Steps are bitwise those of `torch.optim.AdamW(..., fused=True)`.

    Args:
        groups: of `parameter_groups`.
        lr: learning rate of every group until it is changed.

    Attributes:
        param_groups: dicts with `params`, `lr`, `weight_decay` and whatever else they came with.
        state: parameter -> `step` (), `exp_avg` and `exp_avg_sq` of its shape, all on its device; once it was updated.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        self.param_groups = [{**group, "lr": lr} for group in groups]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            if not with_gradient:
                continue
            states = [self._of(p) for p in with_gradient]
            adamw(
                with_gradient,
                [p.grad for p in with_gradient if p.grad is not None],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )

    def _of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        if parameter not in self.state:
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": step, **moments}
        return self.state[parameter]


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over everything that is trainable now."""
    return AdamW(parameter_groups(model, config.weight_decay, config.pretrained_lr / config.lr), config.lr)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up over the first share of the steps, then constant or a cosine to zero."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    done = (step - warm) / max(1, steps - warm)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
