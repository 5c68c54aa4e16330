"""What every continual-learning method promises, and that each one's protection reaches the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.continual import Learner
from flame_moe.continual.methods import METHODS, Commit, Method, MethodState, StageContext, make_method
from flame_moe.continual.methods.distillation import distillation, readable
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.continual.methods.quadratic import Quadratic
from flame_moe.data.loader import make_batch
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, RecipeError
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.schema import MethodConfig, Stage, Task
from flame_moe.training.hooks import Seen
from flame_moe.training.problem import Problem
from tests.test_continual import Stages, bits, everyone
from tests.tiny import STREAM, recipe

TWO = (("death",), ("days",))


class Watched(FineTune):
    """Fine-tuning that writes down what is asked of it, and uses every hook."""

    name = "watched"
    memory_of = 3

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self.calls: list[str] = []
        self.replayed: set[str] = set()
        self.concluded = 0
        self.contexts: list[StageContext] = []

    def add_routers(self, model: Flame, stage: int, modalities: Iterable[str], new: Iterable[str]) -> None:
        self.calls.append("add_routers")
        super().add_routers(model, stage, modalities, new)

    def begin(self, model: Flame, stage: int, tasks: Iterable[str], modalities: Iterable[str]) -> None:
        self.calls.append("begin")
        super().begin(model, stage, tasks, modalities)

    def prepare(self, context: StageContext) -> None:
        self.calls.append("prepare")
        self.earlier = context.earlier
        self.contexts.append(context)

    def replay(self, draw: np.random.Generator) -> Iterator[tuple[Problem, FlexiBatch]] | None:
        self.calls.append("replay")
        return self._endless(draw) if self.earlier else None

    def _endless(self, draw: np.random.Generator) -> Iterator[tuple[Problem, FlexiBatch]]:
        while True:
            for problem in self.earlier.values():
                for batch in problem.train.batches(draw):
                    self.replayed |= set(batch.ids)
                    yield problem, batch

    def penalty(self, model: Flame, seen: Sequence[Seen]) -> Tensor | None:
        self.calls.append("penalty")
        assert all(not s.output.logits.isnan().any() and s.loss.requires_grad for s in seen)
        self.tasks_seen = [s.problem.task.name for s in seen]
        return None

    def adjust_gradients(self, model: Flame) -> None:
        self.calls.append("adjust_gradients")

    def after_step(self, model: Flame) -> None:
        self.calls.append("after_step")

    def conclude(self, context: StageContext) -> None:
        self.calls.append("conclude")
        for name, problem in context.problems.items():
            self.memory[name] = problem.train.store.ids(problem.train.indices[: self.memory_of])
        self.concluded += 1

    def commit(self, model: Flame, stage: int) -> list[Commit]:
        self.calls.append("commit")
        return super().commit(model, stage)

    def state(self) -> MethodState:
        return MethodState({"concluded": torch.tensor(self.concluded)}, {"memory": self.memory})

    def restore(self, model: Flame, state: MethodState) -> None:
        self.concluded = int(state.tensors["concluded"])
        self.memory = {name: tuple(ids) for name, ids in state.meta["memory"].items()}


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    monkeypatch.setitem(METHODS, "watched", Watched)
    return Watched


def learned(store: Store, stages: Sequence[Sequence[str]], method: dict[str, Any], **more: Any) -> Learner:
    learner = Learner(recipe(stages, method=method, **more))
    for stage in learner.recipe.stages:
        learner.learn(store, stage)
    return learner


def test_a_stage_asks_its_method_in_the_documented_order(tiny_store: Store, watched: type[Watched]) -> None:
    learner = learned(tiny_store, TWO, {"name": "watched"}, train={"epochs": 1, "batch_size": 64})
    method = learner.method
    assert isinstance(method, Watched)
    step = ["penalty", "adjust_gradients", "after_step"]
    stage = ["add_routers", "begin", "prepare", "replay", *step, "conclude", "commit"]
    assert method.calls == stage * 2
    assert method.tasks_seen == ["days", "death"]
    second = method.contexts[1]
    assert (second.stage, second.tasks, second.old_tasks) == (1, ("days",), ("death",))
    assert (second.modalities, second.new_modalities) == (("vitals", "image"), ("image",))
    assert second.cursors == {"death": 0, "days": 1}


def test_a_method_reads_again_what_it_remembered_and_nothing_else(tiny_store: Store, watched: type[Watched]) -> None:
    method = learned(tiny_store, TWO, {"name": "watched"}).method
    assert isinstance(method, Watched)
    first = tiny_store.indices("death", "train", modalities=("vitals", "static"))[:3]
    assert method.replayed == set(tiny_store.ids(first))


def test_samples_that_are_not_there_any_more_are_refused_before_anything_changes(
    tiny_store: Store, watched: type[Watched]
) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "watched"})
    learner.method.memory["death"] = ("nobody",)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    with pytest.raises(DataError, match="reads samples of 'death' again, and the store lacks sample 'nobody'"):
        learner.learn(tiny_store, recipe(TWO).stages[1])
    assert all(torch.equal(t, before[name]) for name, t in learner.model.state_dict().items())


def test_what_a_method_remembers_is_saved_and_comes_back_as_it_was_after_a_failure(
    tiny_store: Store, watched: type[Watched], tmp_path: Path
) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "watched"})
    assert isinstance(learner.method, Watched)
    loaded = Learner.load(learner.save(tmp_path / "model"))
    assert isinstance(loaded.method, Watched)
    assert (loaded.method.concluded, loaded.method.memory) == (1, learner.method.memory)

    def fail(_: Learner) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loaded.learn(tiny_store, recipe(TWO).stages[1], before_commit=fail)
    assert isinstance(loaded.method, Watched)
    assert (loaded.method.concluded, loaded.method.memory) == (1, learner.method.memory)


def test_a_state_that_the_method_does_not_know_is_refused(tiny_store: Store) -> None:
    method = make_method(MethodConfig(name="finetune"))
    with pytest.raises(CheckpointError, match="'finetune' keeps no state"):
        method.restore(Flame(recipe().model), MethodState({"x": torch.zeros(1)}))


def test_a_copy_with_another_method_concludes_the_first_stage(tiny_store: Store, watched: type[Watched]) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "flame"})
    with pytest.raises(DataError, match="'watched' concludes from the first stage's samples"):
        learner.with_method(MethodConfig(name="watched"))
    twin = learner.with_method(MethodConfig(name="watched"), tiny_store)
    straight = learned(tiny_store, TWO[:1], {"name": "watched"})
    for one in (twin, straight):
        one.learn(tiny_store, recipe(TWO).stages[1])
    assert twin.method.memory == straight.method.memory
    two = straight.model.state_dict()
    assert all(torch.equal(t, two[name]) for name, t in twin.model.state_dict().items())
    with pytest.raises(RecipeError, match="2 stages were learned by 'watched'"):
        straight.with_method(MethodConfig(name="flame"))


def test_a_key_that_the_method_does_not_read_is_refused_with_those_it_reads() -> None:
    with pytest.raises(RecipeError, match=r"'finetune' does not read 'rank' \[method\.rank\].*no key but its name"):
        make_method(MethodConfig(name="finetune", rank=3))
    assert make_method(MethodConfig(name="flame", rank=3)).config.rank == 3


def test_every_methods_grid_has_three_settings_that_it_accepts() -> None:
    for name, method in METHODS.items():
        assert len(method.grid) == 3, name
        assert len({str(setting) for setting in method.grid}) == 3, name
        for setting in method.grid:
            assert setting.lr > 0
            make_method(MethodConfig.parse({"name": name, **setting.keys}, where=name))


@pytest.fixture(scope="module")
def first_stage(tiny_store: Store) -> bytes:
    return bits(everyone(learned(tiny_store, STREAM[:1], {"name": "flame"}), tiny_store)["death"])


@pytest.fixture(scope="module", params=list(METHODS))
def method(request: pytest.FixtureRequest, tiny_store: Store) -> Stages:
    """The stream, learned by each continual method: what follows holds for all of them."""
    return Stages(recipe(method={"name": request.param}), tiny_store)


def test_every_method_is_found_by_its_name(method: Stages) -> None:
    assert METHODS[method.learner.method.name] is type(method.learner.method)


def test_every_method_learns_every_stage(method: Stages) -> None:
    assert [set(found) for found in method.after] == [
        {"death"},
        {"death", "stage"},
        {"death", "stage", "days", "codes"},
    ]
    assert all(np.isfinite(z).all() for z in method.after[-1].values())


def test_every_method_leaves_the_model_frozen_between_stages(method: Stages) -> None:
    model = method.learner.model
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(p.delta is not None for _, p in growables(model) if isinstance(p, StackedMatrix))


def test_every_method_has_the_same_first_stage(method: Stages, first_stage: bytes) -> None:
    assert bits(method.after[0]["death"]) == first_stage


def test_every_method_goes_on_from_a_save_as_if_it_had_not_stopped(
    method: Stages, tiny_store: Store, tmp_path: Path
) -> None:
    plan = method.learner.recipe
    learner = Learner(plan)
    for i, stage in enumerate(plan.stages):
        learner.learn(tiny_store, stage)
        learner = Learner.load(learner.save(tmp_path / str(i)))
    one, two = learner.model.state_dict(), method.learner.model.state_dict()
    assert list(one) == list(two)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert {t: bits(z) for t, z in everyone(learner, tiny_store).items()} == {
        t: bits(z) for t, z in method.after[-1].items()
    }


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
    learner._add(index, described, names, new)
    learner.method.begin(learner.model, index, tasks, names)
    problems = {task.name: learner._problem(store, task, index) for task in described}
    context = learner._context(index, tasks, names, [m.name for m in new], problems, {})
    learner.method.prepare(context)
    return context


def by_hand(learner: Learner, store: Store, kind: str) -> dict[str, Tensor]:
    """Importances for 'death', one training sample after the other, from the definition."""
    model, task = learner.model, learner.tasks["death"]
    indices = store.indices("death", "train", modalities=task.modalities)
    shared = {n: p for n, p in model.named_parameters() if not n.startswith("heads.")}
    total = {name: torch.zeros_like(p) for name, p in shared.items()}
    model.eval().requires_grad_(True)
    for index in indices:
        batch = make_batch(store, learner.preprocessor, task, [index])
        z = model(batch, 0).logits[0, 0]
        sign = 2 * float(batch.target[0, 0]) - 1
        value = torch.log1p(torch.exp(-sign * z)) if kind == "ewc" else z**2
        model.zero_grad(set_to_none=True)
        value.backward()
        for name, p in shared.items():
            if p.grad is not None:
                total[name] += (p.grad**2 if kind == "ewc" else p.grad.abs()) / len(indices)
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return total


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_the_gradient_of_the_penalty_is_importance_times_distance(tiny_store: Store, kind: str) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": kind, "strength": 7.0})
    expected = by_hand(learner, tiny_store, kind)
    context = context_of(learner, tiny_store, ("days",))
    model = context.model
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    penalty = learner.method.penalty(model, [])
    assert penalty is not None
    assert penalty.item() == 0.0
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    penalty = learner.method.penalty(model, [])
    assert penalty is not None
    penalty.backward()
    kinds = set()
    for name, p in model.named_parameters():
        if name in expected and bool(expected[name].any()):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, 7.0 * expected[name] * (p.detach() - start[name]), rtol=1e-3, atol=1e-6)
            kinds.add("matrix" if name.endswith("base") else "router" if "routers" in name else "vector")
        elif name not in expected:
            assert p.grad is None, name
    assert kinds == {"matrix", "router", "vector"}


@pytest.mark.parametrize("kind", ["ewc", "mas"])
def test_importance_runs_over_stages_with_decay(tiny_store: Store, kind: str) -> None:
    kept = {}
    for decay in (0.0, 0.5):
        learner = learned(tiny_store, TWO[:1], {"name": kind, "decay": decay})
        assert isinstance(learner.method, Quadratic)
        first = {n: t.clone() for n, t in learner.method.importance.items()}
        context = context_of(learner, tiny_store, ("days",))
        learner.method.conclude(context)
        kept[decay] = (first, learner.method.importance)
    (first, without), (_, with_decay) = kept[0.0], kept[0.5]
    for name, tensor in without.items():
        torch.testing.assert_close(with_decay[name], tensor + 0.5 * first.get(name, torch.zeros_like(tensor)))


def test_a_strong_penalty_holds_the_weights_and_none_does_not(tiny_store: Store) -> None:
    moved = {}
    for strength in (0.0, 1e6):
        learner = learned(tiny_store, TWO[:1], {"name": "ewc", "strength": strength})
        before = {n: p.clone() for n, p in learner.model.named_parameters()}
        weights = learner.method.importance  # type: ignore[attr-defined]
        learner.learn(tiny_store, Stage(tasks=TWO[1]))
        after = dict(learner.model.named_parameters())
        moved[strength] = sum(float((weights[n] * (after[n] - before[n]) ** 2).sum()) for n in weights)
    assert moved[1e6] < 0.3 * moved[0.0]


def test_replay_remembers_within_its_budget_and_trains_on_nothing_else(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "replay", "memory": 7})
    memory = {name: set(ids) for name, ids in learner.method.memory.items()}
    assert {name: len(ids) for name, ids in memory.items()} == {"death": 4, "stage": 3}
    for name, ids in memory.items():
        task = learner.tasks[name]
        train = tiny_store.indices(name, "train", modalities=task.modalities)
        assert ids <= set(tiny_store.ids(train))
    seen = stopped(learner, monkeypatch, tiny_store, STREAM[2])
    assert [s.problem.task.name for s in seen[:-1]] == list(STREAM[2])
    assert set(seen[-1].batch.ids) <= memory[seen[-1].problem.task.name]
    assert seen[-1].problem.cursor == learner.cursor(seen[-1].problem.task.name)
    learner.learn(tiny_store, Stage(tasks=STREAM[2]))
    assert {name: len(ids) for name, ids in learner.method.memory.items()} == {
        "death": 2,
        "stage": 2,
        "days": 2,
        "codes": 1,
    }
    assert all(set(learner.method.memory[name]) <= memory[name] for name in memory)


def test_joint_training_sees_every_task_so_far_in_every_step(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "joint"})
    seen = stopped(learner, monkeypatch, tiny_store, STREAM[2])
    assert [(s.problem.task.name, s.problem.cursor) for s in seen] == [
        ("death", 0),
        ("stage", 1),
        ("days", 2),
        ("codes", 2),
    ]
    record = learner.learn(tiny_store, Stage(tasks=STREAM[2]))
    assert set(record.history[0]["val"]) == {"death", "stage", "days", "codes"}


def test_distillation_is_the_divergence_of_softened_predictions() -> None:
    def kl(p: Any, q: Any) -> float:
        return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))

    def soft(z: Any, t: float) -> Any:
        e = np.exp(np.array(z) / t)
        return e / e.sum()

    student, teacher = (
        torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]]),
        torch.tensor([[0.3, 1.0, 2.0], [0.1, 1.0, 2.0]]),
    )
    many = Task(name="x", kind="multiclass", modalities=("static",), classes=("a", "b", "c"))
    expected = np.mean(
        [4 * kl(soft(t, 2.0), soft(s, 2.0)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    )
    assert float(distillation(many, student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)
    labels = many.model_copy(update={"kind": "multilabel"})
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = np.mean([kl(soft([t, 0.0], 1.0), soft([s, 0.0], 1.0)) for s, t in pairs])
    assert float(distillation(labels, student, teacher, 1.0)) == pytest.approx(expected, rel=1e-5)
    value = many.model_copy(update={"kind": "regression"})
    assert float(distillation(value, student, teacher, 2.0)) == pytest.approx(float((student - teacher).pow(2).mean()))


def test_an_old_task_is_asked_about_the_samples_that_have_its_modalities(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO, {"name": "lwf"})
    indices = tiny_store.indices("days", "train", modalities=("vitals", "image"))[:30]
    batch = make_batch(tiny_store, learner.preprocessor, learner.tasks["days"], indices)
    part = readable(batch, learner.tasks["death"])
    assert part is not None
    assert list(part.modalities) == ["vitals"]
    assert part.ids == tuple(batch.ids[i] for i in batch.modalities["vitals"].rows.tolist())
    assert 0 < part.size < batch.size
    alone = learner.tasks["death"].model_copy(update={"modalities": ("vitals",)})
    straight = make_batch(
        tiny_store, learner.preprocessor, alone, [i for i in indices if tiny_store.present("vitals")[i]]
    )
    learner.model.eval()
    torch.testing.assert_close(learner.model(part, 0).logits, learner.model(straight, 0).logits, rtol=1e-4, atol=1e-5)
    assert readable(batch, learner.tasks["death"].model_copy(update={"modalities": ("static",)})) is None


def test_learning_without_forgetting_pulls_back_to_the_model_before_the_stage(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "lwf"})
    context = context_of(learner, tiny_store, ("days",))
    model = context.model.eval()
    problem = context.problems["days"]
    batch = next(iter(problem.train.batches(None)))
    seen = [Seen(problem, batch, model(batch, 1), torch.zeros(()))]
    at_start = learner.method.penalty(model, seen)
    assert at_start is not None
    assert at_start.item() == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    away = learner.method.penalty(model, seen)
    assert away is not None
    away.backward()
    assert away.item() > 0
    assert model.blocks[0].pool.fc1.base.grad.any()  # type: ignore[union-attr]
    learner.method.conclude(context)
    assert learner.method.penalty(model, seen) is None
