"""Continual methods at work on the small store: what several test files need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from flame_moe.continual import Learner
from flame_moe.continual.methods import Method, StageContext
from flame_moe.data.store import Store
from flame_moe.nn.model import Flame
from flame_moe.schema import Stage
from flame_moe.training.hooks import Seen
from flame_moe.training.seeding import seed_torch
from tests.tiny import recipe

TWO = (("death",), ("days",))

FEW: dict[str, dict[str, Any]] = {"ewc": {"samples": 4}, "mas": {"samples": 4}, "seed": {"samples": 24}}
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 32}
"""What makes the conformance suite quick: it asserts nothing about what is learned."""


def learned(store: Store, stages: Sequence[Sequence[str]], method: dict[str, Any], **more: Any) -> Learner:
    learner = Learner(recipe(stages, method=method, **more))
    for stage in learner.recipe.stages:
        learner.learn(store, stage)
    return learner


def stopped(learner: Learner, monkeypatch: pytest.MonkeyPatch, store: Store, stage: Sequence[str]) -> list[Seen]:
    """What the method saw in the first step of a stage, after which the stage was given up."""
    found: list[Seen] = []

    def stop(self: Method, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        found.extend(seen)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(learner.method), "penalty", stop)
        with pytest.raises(KeyboardInterrupt):
            learner.learn(store, Stage(tasks=tuple(stage)))
    return found


def context_of(learner: Learner, store: Store, tasks: Sequence[str]) -> StageContext:
    """The context of the learner's next stage, which it has begun, on modalities that it knows."""
    index = len(learner.stages)
    described = [store.tasks[name] for name in tasks]
    names = list(dict.fromkeys(m for task in described for m in task.modalities))
    new = [store.modalities[name] for name in names if name not in learner.model.modalities]
    learner._adopt(store, new, described)
    seed_torch(learner.recipe.seed, "initial", index)
    learner.method.add(learner.model, index, described, names, new)
    learner.method.begin(learner.model, index, tasks, names)
    problems = {task.name: learner._problem(store, task, index) for task in described}
    context = learner._context(index, tasks, names, [m.name for m in new], problems, {})
    learner.method.prepare(context)
    return context


def moved_by(learner: Learner, store: Store, tasks: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after a stage."""
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.learn(store, Stage(tasks=tuple(tasks)))
    return before, {name: p.detach().clone() for name, p in learner.model.named_parameters()}
