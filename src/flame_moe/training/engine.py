"""One training loop for every stage and every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from flame_moe.batch import FlexiBatch, drop_cells, drop_modalities
from flame_moe.data.loader import Loader, to_device
from flame_moe.data.sampling import steps, steps_per_epoch
from flame_moe.errors import NonFiniteError
from flame_moe.nn.model import Flame
from flame_moe.schema import Task, TrainConfig
from flame_moe.training.device import autocast, choose_device
from flame_moe.training.hooks import Hooks, Seen
from flame_moe.training.metrics import PRIMARY, evaluate_predictions
from flame_moe.training.monitor import Monitor
from flame_moe.training.optim import AdamW, learning_rate, make_optimizer
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import generator, seed_torch
from flame_moe.training.state import TrainingState, snapshot, trainable


class Prediction(NamedTuple):
    """What a model says of the samples of a loader, in their order.

    Attributes:
        logits: (n, outputs) float32, standardised for regression.
        values: probabilities (n,), (n, C) or (n, L); or values in natural units (n, V).
        target: (n, target_width) float32.
        ids: n sample ids.
    """

    logits: NDArray[np.float32]
    values: NDArray[np.float64]
    target: NDArray[np.float32]
    ids: tuple[str, ...]


class Fitted(NamedTuple):
    """The outcome of `fit`: records per epoch, the epoch chosen, and the weights of each task's own best epoch."""

    history: list[dict[str, Any]]
    best_epoch: int
    per_task: dict[str, dict[str, Tensor]]


def fit(
    model: Flame,
    problems: Mapping[str, Problem],
    config: TrainConfig,
    *,
    stage: int,
    seed: int,
    monitor: Monitor,
    hooks: Hooks | None = None,
    first: int = 0,
    resume: TrainingState | None = None,
    save: Callable[[TrainingState], None] | None = None,
) -> Fitted:
    """Train whatever requires a gradient on the problems jointly, and leave the model at the chosen epoch.

    Each step sums the task losses of its batches, auxiliary losses included. An epoch draws its randomness from
    (seed, stage, epoch) alone, so a run that resumes after a crash ends with the same weights.

    Args:
        model: the network; what is frozen stays as it is.
        problems: task name -> what to learn.
        config: how.
        stage: the stage being learned.
        seed: of the recipe.
        monitor: who is told of progress.
        hooks: what the method adds to every step.
        first: number of the first epoch, where the stage has trained before; it decides what is drawn.
        resume: state to go on from.
        save: called with the state after every epoch.

    Raises:
        NonFiniteError: if a loss or gradient is NaN or infinite, before the weights are touched.
        RecipeError: if the device that is asked for is not there.
    """
    device = choose_device(config.accelerator)
    model.to(device)
    optimizer = make_optimizer(model, config)
    session = _Session(device, optimizer, model, problems, config, stage, first, hooks or Hooks())
    state = resume or TrainingState.fresh(problems)
    state.load_into(model, optimizer)
    monitor.begin(list(problems), config.epochs, session.per_epoch, state.epoch)
    for epoch in range(state.epoch, config.epochs):
        if config.patience is not None and epoch - state.best_epoch > config.patience:
            break
        began = time.perf_counter()
        seed_torch(seed, "stage", stage, "epoch", first + epoch)
        train = session.epoch(epoch, seed, monitor)
        val = {name: validate(model, p) for name, p in problems.items()}
        record = {
            "epoch": first + epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "train": train,
            "val": val,
            "seconds": time.perf_counter() - began,
        }
        state.finish_epoch(model, optimizer, record, _scores(problems, val), config)
        monitor.epoch(record)
        if save is not None:
            save(state)
    monitor.end()
    if config.select != "last":
        state.load_best(model)
    best = state.best_epoch if config.select != "last" else state.epoch - 1
    return Fitted(state.history, first + best, state.per_task)


@dataclass(frozen=True)
class _Session:
    """What the epochs of one stage share."""

    device: torch.device
    optimizer: AdamW
    model: Flame
    problems: Mapping[str, Problem]
    config: TrainConfig
    stage: int
    first: int
    hooks: Hooks

    @property
    def loaders(self) -> dict[str, Loader]:
        return {name: problem.train for name, problem in self.problems.items()}

    @property
    def per_epoch(self) -> int:
        return steps_per_epoch(self.loaders, self.config.sampling)

    def epoch(self, epoch: int, seed: int, monitor: Monitor) -> dict[str, float | None]:
        """One pass over the schedule; mean loss per task, and of the auxiliary losses."""
        config, per_epoch = self.config, self.per_epoch
        place = ("stage", self.stage, "epoch", self.first + epoch)
        draw = generator(seed, *place)
        replayed = self.hooks.replay(generator(seed, *place, "replay"))
        totals: dict[str, list[float]] = {name: [] for name in (*self.problems, "auxiliary")}
        self.model.train()
        for i, batches in enumerate(steps(self.loaders, config.sampling, config.temperature, draw)):
            rate = learning_rate(config, epoch * per_epoch + i, config.epochs * per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["rate"]
            self._step(batches, None if replayed is None else next(replayed), epoch, totals)
            monitor.step()
        return {name: float(np.mean(values)) if values else None for name, values in totals.items()}

    def _step(
        self,
        batches: list[FlexiBatch],
        replayed: tuple[Problem, FlexiBatch] | None,
        epoch: int,
        totals: dict[str, list[float]],
    ) -> None:
        """One update from one batch of each of some tasks; nothing is changed if anything is not finite."""
        self.optimizer.zero_grad()
        seen = [self._see(self.problems[batch.task], batch, totals) for batch in batches]
        if replayed is not None:
            seen.append(self._see(*replayed, totals))
        loss = torch.stack([s.loss for s in seen]).sum()
        with autocast(self.device, self.config):
            penalty = self.hooks.penalty(self.model, seen)
        (loss if penalty is None else loss + penalty).backward()
        self.hooks.adjust_gradients(self.model)
        limit = math.inf if self.config.clip is None else self.config.clip
        reached = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = clip_grad_norm_(reached, limit, foreach=True)
        _refuse_gradient(norm, [s.batch for s in seen], epoch)
        self.optimizer.step()
        self.hooks.after_step(self.model)

    def _see(self, problem: Problem, batch: FlexiBatch, totals: dict[str, list[float]]) -> Seen:
        """Forward pass and loss of one batch; stops on NaN or Inf, naming task and samples."""
        ready = to_device(_thin(batch, self.config), self.device)
        with autocast(self.device, self.config):
            output = self.model(ready, problem.cursor)
        output = output._replace(logits=output.logits.float(), aux=output.aux.float())
        each = problem.losses(output.logits, ready.target, self.config.label_smoothing)
        loss = each.mean()
        if not bool(torch.isfinite(loss + output.aux)):
            finite = torch.isfinite(each).tolist()
            bad = [name for name, good in zip(batch.ids, finite, strict=True) if not good] or list(batch.ids)
            raise NonFiniteError(
                f"the loss is {(loss + output.aux).item()}; no weight was changed by it",
                where=f"task '{batch.task}', samples {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}",
                mend="Look at these samples' values, or lower train.lr.",
            )
        if batch.task in totals:
            totals[batch.task].append(float(loss.detach()))
        totals["auxiliary"].append(float(output.aux.detach()))
        return Seen(problem, ready, output, problem.task.weight * loss + output.aux)


def _thin(batch: FlexiBatch, config: TrainConfig) -> FlexiBatch:
    """Hide modalities and cells at random, so that the model learns to do without them."""
    return drop_cells(drop_modalities(batch, config.modality_dropout), config.cell_dropout)


def _refuse_gradient(norm: Tensor, batches: list[FlexiBatch], epoch: int) -> None:
    """Stop before the update if a finite loss has a gradient that is not."""
    if bool(torch.isfinite(norm)):
        return
    raise NonFiniteError(
        f"the gradient's norm is {norm.item()}; no weight was changed by it",
        where=f"epoch {epoch}, tasks {', '.join(batch.task for batch in batches)}",
        mend="Lower train.lr, or train with train.precision = '32-true'.",
    )


def predict(
    model: Flame,
    batches: Iterable[FlexiBatch],
    task: Task,
    cursor: int,
    scale: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
) -> Prediction:
    """Run the model over batches in evaluation mode (no noise, no dropout), at the weights of `cursor`."""
    logits: list[NDArray[np.float32]] = []
    targets: list[NDArray[np.float32]] = []
    ids: list[str] = []
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            logits.append(model(to_device(batch, device), cursor).logits.float().cpu().numpy())
            targets.append(batch.target.cpu().numpy())
            ids.extend(batch.ids)
    model.train(was_training)
    raw = np.concatenate(logits) if logits else np.zeros((0, task.outputs), np.float32)
    target = np.concatenate(targets) if targets else np.zeros((0, task.target_width), np.float32)
    return Prediction(raw, to_values(task, raw, scale), target, tuple(ids))


def to_values(
    task: Task, logits: NDArray[np.float32], scale: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
) -> NDArray[np.float64]:
    """Logits to probabilities: (n,) binary, (n, C) multiclass, (n, L) multilabel; or to natural units (n, V)."""
    z = logits.astype(np.float64)
    if task.kind == "regression":
        return z if scale is None else z * scale[1] + scale[0]
    if task.kind == "multiclass":
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)
    p = np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))))
    return p[:, 0] if task.kind == "binary" else p


def validate(model: Flame, problem: Problem) -> dict[str, float]:
    """Validation metrics of one task without intervals, and "loss", its mean task loss without smoothing."""
    got = predict(model, problem.val.batches(None), problem.task, problem.cursor, problem.scale)
    task = problem.task
    target = got.target if task.target_width > 1 or task.kind == "regression" else got.target[:, 0]
    scores = evaluate_predictions(task.kind, target, got.values, classes=task.classes, bootstrap=0)
    loss = problem.losses(torch.from_numpy(got.logits), torch.from_numpy(got.target)).mean()
    return {"loss": float(loss), **scores.metrics}


def _scores(problems: Mapping[str, Problem], val: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Each task's primary metric; NaN (one class only) counts as no evidence, 0."""
    return {name: float(np.nan_to_num(val[name][PRIMARY[p.task.kind]])) for name, p in problems.items()}


__all__ = ["Fitted", "Prediction", "fit", "predict", "snapshot", "to_values", "trainable", "validate"]
