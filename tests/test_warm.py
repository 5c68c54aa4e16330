"""Warm start: a new stage begins as the earlier task whose samples are routed alike, and that is on record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_moe.continual import Learner
from flame_moe.continual.warm import WarmStart, choose_source, fingerprint, start_warm
from flame_moe.data.loader import make_batch
from flame_moe.data.store import Store
from flame_moe.recorder import _stage_record
from flame_moe.training.monitor import Monitor
from tests.tiny import recipe

WARM = {"warm_start": True}


class First(Monitor):
    """The model's numbers before the first step of a stage."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.state: dict[str, Tensor] = {}

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        self.state = {name: t.detach().clone() for name, t in self.learner.model.state_dict().items()}


def stream(store: Store, *stages: tuple[str, ...], **more: Any) -> tuple[Learner, First]:
    learner = Learner(recipe(stages, train={"epochs": 1}, **more))
    first = First(learner)
    for stage in learner.recipe.stages:
        learner.learn(store, stage, monitor=first)
    return learner, first


@pytest.fixture(scope="module")
def warm(tiny_store: Store) -> tuple[Learner, First]:
    """days reads vitals and image: it shares one modality with each earlier task."""
    return stream(tiny_store, ("death",), ("stage",), ("days",), method=WARM)


def test_the_fingerprint_is_the_share_of_training_samples_that_each_expert_gets(
    warm: tuple[Learner, First], tiny_store: Store
) -> None:
    learner, _ = warm
    task = learner.tasks["death"]
    counts = {name: np.zeros(4) for name in task.modalities}
    seen = dict.fromkeys(task.modalities, 0)
    learner.model.eval()
    for index in tiny_store.indices("death", "train", modalities=task.modalities):
        with torch.no_grad():
            routed = learner.model(make_batch(tiny_store, learner.preprocessor, task, [index]), 0).routing[0]
        for name, routing in routed.items():
            counts[name][routing.chosen[0].numpy()] += 1
            seen[name] += 1
    for name, got in learner.stages[0].fingerprints["death"].items():
        assert np.allclose(got, counts[name] / seen[name], atol=1e-6)
        assert sum(got) == pytest.approx(2.0)


def test_the_most_similar_earlier_task_is_chosen_by_the_cosine(warm: tuple[Learner, First], tiny_store: Store) -> None:
    learner, _ = warm
    (start,) = learner.stages[2].warm
    expected = {}
    for name, shared in (("death", "vitals"), ("stage", "image")):
        reader, cursor = learner.tasks[name], learner.cursor(name)
        ours = fingerprint(
            learner.model, learner.preprocessor, tiny_store, learner.tasks["days"], reader, [shared], cursor
        )[shared]
        theirs = learner.stages[cursor].fingerprints[name][shared]
        expected[name] = float(np.dot(ours, theirs) / np.linalg.norm(ours) / np.linalg.norm(theirs))
    best = max(expected, key=lambda name: (round(expected[name], 6), learner.cursor(name)))
    assert start.source == best
    assert start.similarity == pytest.approx(expected[best], abs=1e-6)
    assert start.modalities == ({"death": "vitals", "stage": "image"}[best],)
    assert not start.linear


def test_routers_and_the_shared_part_of_the_head_begin_as_those_of_the_source(warm: tuple[Learner, First]) -> None:
    learner, first = warm
    (start,) = learner.stages[2].warm
    assert start.source is not None
    (name,), cursor = start.modalities, learner.cursor(start.source)
    for part in ("query", "gate", "noise"):
        place = f"blocks.0.routers.{name}.heads"
        assert torch.equal(first.state[f"{place}.2.{part}"], first.state[f"{place}.{cursor}.{part}"])
        other = "image" if name == "vitals" else "vitals"
        fresh = f"blocks.0.routers.{other}.heads"
        assert part == "noise" or not torch.equal(
            first.state[f"{fresh}.2.{part}"], first.state[f"{fresh}.{1 - cursor}.{part}"]
        )
    i, j = learner.tasks[start.source].modalities.index(name), learner.tasks["days"].modalities.index(name)
    assert torch.equal(first.state["heads.days.absent"][j], first.state[f"heads.{start.source}.absent"][i])
    assert not torch.equal(first.state["heads.days.absent"][1 - j], first.state[f"heads.{start.source}.absent"][1 - i])


def test_the_last_layer_is_taken_over_between_tasks_of_the_same_kind(warm: tuple[Learner, First]) -> None:
    learner, _ = warm
    model = Learner(recipe()).model
    for name in ("vitals", "static"):
        model.add_modality(learner.model.modalities[name], 0)
    model.add_router_heads(["vitals", "static"], 0)
    model.add_task(learner.tasks["death"])
    later = learner.tasks["death"].model_copy(update={"name": "later", "modalities": ("static", "vitals")})
    model.add_router_heads(["vitals", "static"], 1)
    model.add_task(later)
    start_warm(model, 1, [WarmStart("later", "death", 1.0, ("vitals", "static"), True)], {"death": 0})
    old, new = model.heads["death"].linear, model.heads["later"].linear
    assert torch.equal(new.weight[:, 8:], old.weight[:, :8])
    assert torch.equal(new.weight[:, :8], old.weight[:, 8:])
    assert torch.equal(new.bias, old.bias)


def test_without_a_shared_modality_nothing_is_taken_over_and_that_is_on_record(tiny_store: Store) -> None:
    for plan, model in ((("death", "stage"), {}), (("death", "days"), {"preset": "no_moe"})):
        hot, first = stream(tiny_store, *((task,) for task in plan), method=WARM, model=model)
        cold, begun = stream(tiny_store, *((task,) for task in plan), model=model)
        assert hot.stages[1].warm == (WarmStart(plan[1], None, None, (), False),)
        assert first.state.keys() == begun.state.keys()
        assert all(torch.equal(first.state[name], begun.state[name]) for name in first.state)
        assert not cold.stages[1].warm


def test_of_equally_similar_tasks_more_shared_modalities_then_the_later_stage_decides(
    warm: tuple[Learner, First], tiny_store: Store
) -> None:
    learner, _ = warm
    task, model, fitted = (
        learner.tasks["days"].model_copy(update={"name": "codes"}),
        learner.model,
        learner.preprocessor,
    )
    ours = {
        (name, c): fingerprint(model, fitted, tiny_store, task, learner.tasks["days"], [name], c)[name]
        for name, c in (("vitals", 0), ("image", 1), ("vitals", 2), ("image", 2))
    }
    both = {name: ours[name, 2] for name in ("vitals", "image")}
    cursors = {"death": 0, "stage": 1, "days": 2}
    exact = {"death": {"vitals": ours["vitals", 0]}, "stage": {"image": ours["image", 1]}}
    assert choose_source(model, fitted, tiny_store, task, exact, cursors).source == "stage"
    swapped = dict(reversed(exact.items()))
    assert choose_source(model, fitted, tiny_store, task, swapped, cursors).source == "stage"
    found = choose_source(model, fitted, tiny_store, task, {"days": both, **exact}, cursors)
    assert (found.source, found.modalities) == ("days", ("vitals", "image"))
    assert found.similarity == pytest.approx(1.0)
    assert choose_source(model, fitted, tiny_store, task, {}, {}).source is None


def test_a_warm_start_goes_on_from_a_save_and_is_in_the_results(
    warm: tuple[Learner, First], tiny_store: Store, tmp_path: Any
) -> None:
    learner, _ = warm
    plan = learner.recipe
    again = Learner(plan)
    for i, stage in enumerate(plan.stages):
        again.learn(tiny_store, stage)
        again = Learner.load(again.save(tmp_path / str(i)))
    assert again.stages[2].warm == learner.stages[2].warm
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    (row,) = _stage_record(learner.stages[2], None, None).warm_start
    assert row.source == learner.stages[2].warm[0].source


def test_without_warm_start_a_stage_leaves_no_fingerprint(tiny_store: Store) -> None:
    cold, _ = stream(tiny_store, ("death",), ("days",))
    assert not cold.stages[0].fingerprints
    assert not cold.stages[1].warm
