"""Where a stage's training stands: enough to go on after a crash as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flame_moe.errors import CheckpointError
from flame_moe.schema import TrainConfig
from flame_moe.training.optim import AdamW


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy on the CPU of everything trainable; the rest of the model cannot have changed."""
    return {name: p.detach().cpu().clone() for name, p in trainable(model).items()}


@dataclass
class TrainingState:
    """State after `epoch` whole epochs.

    Attributes:
        epoch: epochs done.
        best_epoch: the epoch with the best mean validation score so far, -1 before the first.
        best_score: that score.
        best: weights of that epoch.
        now: weights after the last epoch.
        moments: optimizer state, "<parameter>/<name>" -> tensor.
        history: one record per epoch.
        task_scores: best validation score per task.
        per_task: weights of each task's own best epoch, kept only for select = "per_task".
    """

    task_scores: dict[str, float]
    epoch: int = 0
    best_epoch: int = -1
    best_score: float = float("-inf")
    best: dict[str, Tensor] = field(default_factory=dict)
    now: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    per_task: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, tasks: Iterable[str]) -> TrainingState:
        """Nothing learned yet."""
        return cls(task_scores=dict.fromkeys(tasks, float("-inf")))

    def finish_epoch(
        self,
        model: nn.Module,
        optimizer: AdamW,
        record: dict[str, Any],
        scores: Mapping[str, float],
        config: TrainConfig,
    ) -> None:
        """Take in the epoch that just ended."""
        self.now = snapshot(model)
        self.moments = _moments(model, optimizer)
        score = sum(scores.values()) / len(scores)
        record["score"] = score
        if score > self.best_score:
            self.best_score, self.best_epoch, self.best = score, self.epoch, self.now
        for task, value in scores.items():
            if value > self.task_scores[task]:
                self.task_scores[task] = value
                if config.select == "per_task":
                    self.per_task[task] = self.now
        self.history.append(record)
        self.epoch += 1

    def load_into(self, model: nn.Module, optimizer: AdamW) -> None:
        """Put weights and optimizer back where they were after the last whole epoch."""
        if self.epoch == 0:
            return
        put(model, self.now)
        for name, parameter in trainable(model).items():
            keys = [key for key in self.moments if key.rsplit("/", 1)[0] == name]
            if keys:
                found = {key.rsplit("/", 1)[1]: self.moments[key].clone() for key in keys}
                optimizer.state[parameter] = {k: t.to(parameter.device) for k, t in found.items()}

    def load_best(self, model: nn.Module) -> None:
        """Put the weights of the best epoch into the model."""
        put(model, self.best)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors; with `meta` this is the whole state."""
        groups = {"now": self.now, "best": self.best, "moments": self.moments}
        groups |= {f"task:{task}": weights for task, weights in self.per_task.items()}
        # safetensors refuses tensors that share memory, and "best" may be "now".
        return {f"{group}|{name}": t.clone() for group, part in groups.items() for name, t in part.items()}

    def meta(self) -> dict[str, Any]:
        """The JSON part of the state."""
        return {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "task_scores": self.task_scores,
            "history": self.history,
        }

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> TrainingState:
        """The inverse of `tensors` and `meta`."""
        state = cls(**{key: meta[key] for key in ("task_scores", "epoch", "best_epoch", "best_score", "history")})
        for key, tensor in tensors.items():
            group, name = key.split("|", 1)
            if group.startswith("task:"):
                state.per_task.setdefault(group.removeprefix("task:"), {})[name] = tensor
            else:
                {"now": state.now, "best": state.best, "moments": state.moments}[group][name] = tensor
        return state


def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters of the same names.

    Raises:
        CheckpointError: if the model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in parameters:
                raise CheckpointError(f"the model has no parameter '{name}' to go on with", mend="Start the run anew.")
            parameters[name].copy_(tensor)


def _moments(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().clone()
        for name, parameter in trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
