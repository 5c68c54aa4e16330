"""Task losses and the auxiliary losses of the routers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flame_moe.nn.gating import Routing, sparse, sums
from flame_moe.schema import Task

_FOCUS = 2.0


def squared_variation(v: Tensor) -> Tensor:
    """CV^2: unbiased variance over squared mean, (..., E) -> (...); 0 for one expert, finite gradient when balanced."""
    if v.shape[-1] < 2:
        return v.sum(-1) * 0.0
    return v.var(-1, unbiased=True) / (v.mean(-1).square() + 1e-10)


def balance_loss(routings: Sequence[Routing]) -> Tensor:
    """CV^2 of importance (sum of gates) plus CV^2 of load, summed over routers.

    Args:
        routings: one per router, at least one.
    """
    if len({r.clean.shape[1] for r in routings}) > 1:
        return torch.stack([balance_loss([r]) for r in routings]).sum()
    importance = sums(sparse(routings), tuple(len(r.gates) for r in routings))
    return squared_variation(torch.cat([importance, torch.stack([r.load for r in routings])])).sum()


def interaction_loss(routings: Sequence[Routing], mode: str, *, clean: bool = True) -> Tensor | float:
    """Cross-modal interaction: sign * mean over modality pairs of cos(p_m, p_m').

    "spread" pushes modalities to different experts, "concentrate" to the same ones.

    Args:
        routings: one per modality of the batch.
        mode: "spread", "concentrate" or "none".
        clean: take p_m from the noise-free dense probabilities; false: from the noisy sparse gates, as published code.
    """
    if mode == "none" or len(routings) < 2:
        return 0.0
    # Of sums over samples, for only their direction matters.
    rows = torch.cat([r.clean for r in routings]) if clean else sparse(routings)
    p = F.normalize(sums(rows, tuple(len(r.clean) for r in routings)), dim=1)
    m = len(routings)
    pairs = (p.sum(0).square().sum() - p.square().sum()) / (m * (m - 1))
    return pairs if mode == "spread" else -pairs


def task_loss(
    task: Task, logits: Tensor, target: Tensor, class_weight: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Loss per sample, (B,).

    binary and multilabel: cross-entropy of sigmoids (mean over labels); multiclass: softmax cross-entropy;
    regression: squared error of standardised targets (mean over values). "weighted" multiplies by the weight of the
    true class; "focal" also by (1 - p)^2 of the true class, held constant (no gradient through it).

    Args:
        task: what is predicted and which loss it asks for.
        logits: (B, outputs).
        target: (B, target_width).
        class_weight: (2,) binary, (C,) multiclass, (2, L) multilabel; needed for "weighted" and "focal".
        smoothing: label smoothing for classification.
    """
    if task.kind == "regression":
        return (logits - target).square().mean(1)
    if task.kind == "multiclass":
        label = target[:, 0].long()
        loss = F.cross_entropy(logits, label, reduction="none", label_smoothing=smoothing)
        weight = None if class_weight is None else class_weight[label]
        truth = torch.softmax(logits, 1).gather(1, label[:, None])[:, 0]
        return _focus(task, loss, weight, truth)
    soft = target * (1 - smoothing) + 0.5 * smoothing
    loss = F.binary_cross_entropy_with_logits(logits, soft, reduction="none")
    p = torch.sigmoid(logits)
    truth = torch.where(target > 0.5, p, 1 - p)
    weight = None
    if class_weight is not None:
        negative, positive = class_weight[0], class_weight[1]
        weight = torch.where(target > 0.5, positive, negative)
    return _focus(task, loss, weight, truth).mean(1)


def class_weights(task: Task, counts: Tensor) -> Tensor | None:
    """Weights of the classes from training counts; None where the task's loss asks for none.

    "weighted": N / (C n_c), so that every class counts alike; "focal": 1 - n_c / N, the published choice.

    Args:
        task: the task.
        counts: (2,) binary, (C,) multiclass, (2, L) multilabel: training samples per class.
    """
    if task.loss == "plain" or task.kind == "regression":
        return None
    total = counts.sum(0, keepdim=True)
    if task.loss == "focal":
        return 1 - counts / total
    return total / (counts.shape[0] * counts.clamp(min=1))


def _focus(task: Task, loss: Tensor, weight: Tensor | None, truth: Tensor) -> Tensor:
    if task.loss == "focal":
        loss = loss * (1 - truth.detach()).pow(_FOCUS)
    return loss if weight is None else loss * weight
