"""What every continual-learning method promises, and that each one's protection reaches the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_moe.analysis.footprint import footprint
from flame_moe.batch import FlexiBatch
from flame_moe.continual import Learner
from flame_moe.continual.methods import METHODS, Commit, Method, MethodState, StageContext, make_method
from flame_moe.continual.methods.distillation import distillation, readable
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.continual.methods.gpm import GPM
from flame_moe.continual.methods.inflora import InfLoRA
from flame_moe.continual.methods.lora import ranks_within, stored_by_flame
from flame_moe.continual.methods.quadratic import Quadratic
from flame_moe.continual.methods.seed import SEED, divergence
from flame_moe.continual.subspace import Subspaces, extended, free_directions
from flame_moe.continual.truncation import Plan
from flame_moe.data.loader import make_batch
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, RecipeError
from flame_moe.nn.block import Block
from flame_moe.nn.columns import LowRankExperts
from flame_moe.nn.experts import ExpertPool, Joined
from flame_moe.nn.gating import Router
from flame_moe.nn.model import Flame
from flame_moe.nn.moe import Sequences, mixture
from flame_moe.nn.slices import LowRank
from flame_moe.nn.stacked import StackedLinear, StackedMatrix, growables
from flame_moe.runs import check, extend, run
from flame_moe.schema import MethodConfig, Recipe, Stage, Task
from flame_moe.training.hooks import Seen
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import seed_torch
from tests.test_continual import Inspect, Logits, Stages, bits, everyone
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

    def add_routers(self, model: Flame, stage: int, modalities: Sequence[str], new: Sequence[str]) -> None:
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


FEW: dict[str, dict[str, Any]] = {"ewc": {"samples": 4}, "mas": {"samples": 4}, "seed": {"samples": 24}}
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 32}
"""What makes the conformance suite quick: it asserts nothing about what is learned."""


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
    return bits(everyone(learned(tiny_store, STREAM[:1], {"name": "flame"}, train=QUICK), tiny_store)["death"])


class Conformed(Stages):
    """A stream learned by one method, with what was frozen in each stage watched."""

    def __init__(self, plan: Recipe, store: Store) -> None:
        self.learner = Learner(plan)
        self.first: dict[str, Logits] = {}
        self.after: list[dict[str, Logits]] = []
        self.watched: list[Inspect] = []
        for stage in plan.stages:
            watch = Inspect(self.learner)
            self.learner.learn(store, stage, monitor=watch)
            watch.learner = self.learner
            self.watched.append(watch)
            self.after.append(everyone(self.learner, store))
            self.first = {**self.after[-1], **self.first}


@pytest.fixture(scope="module", params=list(METHODS))
def method(request: pytest.FixtureRequest, tiny_store: Store) -> Conformed:
    """The stream, learned by each continual method: what follows holds for all of them."""
    return Conformed(recipe(method={"name": request.param, **FEW.get(request.param, {})}, train=QUICK), tiny_store)


def test_what_is_frozen_in_a_stage_does_not_move_by_one_bit(method: Conformed) -> None:
    for index, watch in enumerate(method.watched):
        assert watch.ended == watch.frozen, index
        assert set(watch.gradients) <= set(watch.requires), index
    assert method.watched[1].frozen


def test_heads_grow_with_the_tasks_and_only_those_of_the_stage_train(method: Conformed) -> None:
    joint = method.learner.method.name == "joint"
    for stage, watch in zip(STREAM, method.watched, strict=True):
        heads = {
            name.split("heads.")[1].split(".")[0]
            for name in watch.requires
            if "heads." in name and "routers" not in name
        }
        assert heads == set(stage) or joint


def test_every_method_is_found_by_its_name(method: Conformed) -> None:
    assert METHODS[method.learner.method.name] is type(method.learner.method)


def test_every_method_learns_every_stage(method: Conformed) -> None:
    assert [set(found) for found in method.after] == [
        {"death"},
        {"death", "stage"},
        {"death", "stage", "days", "codes"},
    ]
    assert all(np.isfinite(z).all() for z in method.after[-1].values())


def test_every_method_leaves_the_model_frozen_between_stages(method: Conformed) -> None:
    model = method.learner.model
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(p.delta is not None for _, p in growables(model) if isinstance(p, StackedMatrix))


def test_every_method_has_the_same_first_stage(method: Conformed, first_stage: bytes) -> None:
    assert bits(method.after[0]["death"]) == first_stage


def test_every_method_goes_on_from_a_save_as_if_it_had_not_stopped(
    method: Conformed, tiny_store: Store, tmp_path: Path
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


FORGET_FREE = {"flame", "separate", "frozen", "lora", "lora_equal", "olora", "inflora", "moral", "progressive"}


def test_methods_on_a_frozen_backbone_change_no_earlier_logit_by_one_bit(method: Conformed) -> None:
    name = method.learner.method.name
    same = {
        (stage, task): bits(logits) == bits(method.first[task])
        for stage, after in enumerate(method.after)
        for task, logits in after.items()
        if method.learner.cursor(task) < stage
    }
    assert all(same.values()) if name in FORGET_FREE else not all(same.values()), same


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
        learner = learned(tiny_store, TWO[:1], {"name": kind, "decay": decay, "samples": 8})
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
        learner = learned(tiny_store, TWO[:1], {"name": "ewc", "strength": strength, "samples": 8})
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


@pytest.fixture(scope="module")
def subspace_inputs() -> tuple[Tensor, Tensor]:
    """Inputs (n, 6) in four directions, one of them weak, and their second moment."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(200, 4, generator=draw) * torch.tensor([3.0, 2.0, 1.0, 0.01])
    z = z @ torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q[:4]
    return z, z.T @ z / len(z)


def test_a_basis_takes_as_few_directions_as_hold_the_energy(subspace_inputs: tuple[Tensor, Tensor]) -> None:
    z, second = subspace_inputs
    singular = torch.linalg.svdvals(z).square()
    for threshold in (0.5, 0.9, 0.99, 0.99999999):
        basis = extended(torch.zeros(6, 0), second, threshold)
        shares = singular.cumsum(0) / singular.sum()
        assert basis.shape[1] == int((shares < threshold).sum()) + 1
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=1e-5, atol=1e-5)
        held = (z @ basis).square().sum() / z.square().sum()
        assert float(held) >= threshold - 1e-5
    first = torch.eye(6)[:, :2]
    both = extended(first, second, 0.99)
    assert torch.equal(both[:, :2], first)
    torch.testing.assert_close(both.T @ both, torch.eye(both.shape[1]), rtol=1e-5, atol=1e-5)
    assert float((z @ both).square().sum() / z.square().sum()) >= 0.99 - 1e-5


def test_free_directions_avoid_the_basis_and_follow_the_inputs(subspace_inputs: tuple[Tensor, Tensor]) -> None:
    z, second = subspace_inputs
    basis = torch.eye(6)[:, :2]
    rows = free_directions(basis, second, 2)
    torch.testing.assert_close(rows @ rows.T, torch.eye(2), rtol=1e-5, atol=1e-5)
    assert float((rows @ basis).abs().max()) < 1e-6
    left = torch.linalg.svd(z - z @ basis @ basis.T).Vh[:2]
    torch.testing.assert_close((rows @ left.T).abs(), torch.eye(2), rtol=1e-3, atol=1e-3)
    short = free_directions(torch.eye(6)[:, :5], second, 3)
    assert torch.equal(short[1:], torch.zeros(2, 6))
    torch.testing.assert_close(short[0].abs(), torch.eye(6)[5], rtol=1e-5, atol=1e-5)


def _outside_of(spaces: Subspaces, name: str, part: StackedMatrix, change: Tensor) -> float:
    """Largest entry of a change along any protected direction, as a share of its largest entry."""
    worst = 0.0
    for which, matrix in enumerate(change.reshape(-1, *change.shape[-2:])):
        basis = spaces.bases.get(f"{name}|{which}")
        if basis is not None:
            worst = max(worst, float((matrix @ basis).abs().max()) if basis.shape[1] else 0.0)
    return worst / max(float(change.abs().max()), 1e-12)


def test_gradient_projection_moves_weights_only_where_old_inputs_are_not(tiny_store: Store) -> None:
    """With strong decay and AdamW, neither of which respects a projected gradient."""
    stages = (("block",), ("death",), ("dose", "days"))
    learner = learned(tiny_store, stages[:2], {"name": "gpm"}, train={"weight_decay": 1.0})
    assert isinstance(learner.method, GPM)
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    spaces = Subspaces(learner.method.spaces.bases)
    learner.learn(tiny_store, Stage(tasks=stages[2]))
    moved, projected = set(), 0
    for name, part in growables(learner.model):
        if isinstance(part, StackedMatrix) and f"{name}.base" in before:
            change = part.base - before[f"{name}.base"]
            rows = spaces.rows(name)
            if rows is not None:
                assert not change[rows > 0].any()
            else:
                assert _outside_of(spaces, name, part, change) < 1e-3, name
                projected += f"{name}|0" in spaces.bases
            moved |= {name} if change.any() else set()
    assert "blocks.0.pool.fc1" in moved
    assert projected > 5
    for name, p in learner.model.named_parameters():
        if name in before and not name.endswith(".base"):
            assert torch.equal(p, before[name]), name


def test_gradients_are_projected_before_the_optimizer_sees_them(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "gpm"})
    assert isinstance(learner.method, GPM)
    context = context_of(learner, tiny_store, ("days",))
    part = context.model.get_submodule("blocks.0.pool.fc1")
    assert isinstance(part, StackedMatrix)
    raw = torch.randn(part.shape)
    part.base.grad = raw.clone()
    learner.method.adjust_gradients(context.model)
    assert part.base.grad is not None
    for which in range(part.matrices):
        m = learner.method.spaces.bases[f"blocks.0.pool.fc1|{which}"]
        torch.testing.assert_close(part.base.grad[which], raw[which] - raw[which] @ m @ m.T, rtol=1e-4, atol=1e-5)


def test_inflora_trains_one_factor_in_directions_free_of_earlier_inputs(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "inflora"})
    assert isinstance(learner.method, InfLoRA)
    spaces = Subspaces(learner.method.spaces.bases)
    context = context_of(learner, tiny_store, STREAM[2])
    trainable = {n for n, p in context.model.named_parameters() if p.requires_grad}
    assert "blocks.0.pool.fc1.delta_a" in trainable
    assert not any(name.endswith("delta_b") for name in trainable)
    designed = context.model.get_parameter("blocks.0.pool.fc1.delta_b").clone()
    learner = learned(tiny_store, STREAM[:2], {"name": "inflora"})
    learner.learn(tiny_store, Stage(tasks=STREAM[2]))
    part = learner.model.get_submodule("blocks.0.pool.fc1")
    assert isinstance(part, StackedMatrix)
    update = part.slice(2)
    assert isinstance(update, LowRank)
    assert torch.equal(update.b, designed)
    checked = 0
    for name, matrix in growables(learner.model):
        if isinstance(matrix, StackedMatrix) and 2 in matrix.stages:
            kept = matrix.slice(2)
            dense = kept if isinstance(kept, Tensor) else kept.dense()
            assert _outside_of(spaces, name, matrix, dense.view(matrix.shape)) < 1e-4, name
            checked += 1
    assert checked > 5


def test_the_penalty_of_o_lora_is_zero_for_orthogonal_factors(tiny_store: Store) -> None:
    learner = learned(tiny_store, (("death",), ("days",)), {"name": "olora", "strength": 3.0, "rank": 1})
    context = context_of(learner, tiny_store, ("codes",))
    found = learner.method.penalty(context.model, [])
    assert found is not None
    expected = 0.0
    for _, part in growables(context.model):
        if isinstance(part, StackedMatrix) and part.delta_stage == 2 and 1 in part.stages:
            old, new = part.slice(1), part.update()
            if isinstance(old, LowRank) and isinstance(new, LowRank):
                for a, b in zip(old.b.reshape(-1, part.shape[-1]), new.b.reshape(-1, part.shape[-1]), strict=True):
                    expected += 3.0 * float((a @ b).detach()) ** 2
    assert found.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    found.backward()
    assert context.model.get_parameter("blocks.0.pool.fc1.delta_b").grad is not None
    for _, part in growables(context.model):
        if isinstance(part, StackedMatrix) and part.delta_stage == 2 and 1 in part.stages:
            old, new = part.slice(1), part.update()
            if isinstance(old, LowRank) and isinstance(new, LowRank):
                with torch.no_grad():
                    along = old.b * (new.b * old.b).sum(-1, keepdim=True) / old.b.square().sum(-1, keepdim=True)
                    new.b.sub_(along)
    orthogonal = learner.method.penalty(context.model, [])
    assert orthogonal is not None
    assert orthogonal.item() < 1e-9


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_lora_at_equal_parameters_stores_as_much_as_flame_and_no_more(tiny_store: Store, rank: int) -> None:
    """What both store is counted on models, not by the formula; every update and every copy is made to be kept."""

    def stored(method: dict[str, Any]) -> tuple[int, Learner]:
        learner = learned(tiny_store, TWO[:1], method)
        before = {name for name, _ in growables(learner.model)}
        context = context_of(learner, tiny_store, ("days",))
        with torch.no_grad():
            for p in context.model.parameters():
                if p.requires_grad:
                    p += 0.01 * torch.randn_like(p)
        learner.method.compress(context)
        learner.method.commit(context.model, 1)
        grown = [part for name, part in growables(context.model) if name in before]
        numbers = sum(t.numel() for p in grown for n, t in p.state_dict().items() if "slice1" in n or n == "copies.1")
        return numbers, learner

    flame, _ = stored({"name": "flame", "rank": rank})
    equal, learner = stored({"name": "lora_equal", "rank": rank})
    steps, ranks = [], []
    for _, part in growables(learner.model):
        if isinstance(part, StackedMatrix) and 1 in part.stages:
            kept = part.slice(1)
            if isinstance(kept, LowRank):
                ranks.append(kept.a.shape[-1])
                steps.append(part.matrices * sum(part.shape[-2:]))
    assert 0 <= flame - equal < max(steps)
    assert min(ranks) >= rank
    assert max(ranks) - min(ranks) <= 3
    assert equal > stored({"name": "lora", "rank": rank})[0]


def test_lora_at_equal_parameters_follows_a_budget_and_refuses_an_energy(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "flame"})
    context_of(learner, tiny_store, ("days",))
    dense = stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(rank=None))
    vectors = stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(rank=0))
    half = stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(keep="budget", budget=0.5))
    assert half == vectors + (dense - vectors) // 2
    assert stored_by_flame(learner.model, 1, ("vitals", "image"), Plan(keep="budget", budget=700)) == vectors + 700
    with pytest.raises(RecipeError, match="energy"):
        make_method(MethodConfig(name="lora_equal", keep="energy"))


def test_ranks_grow_evenly_until_nothing_more_fits() -> None:
    shapes = {"a": torch.Size((4, 10, 6)), "b": torch.Size((8, 8)), "c": torch.Size((3, 1))}
    # One more rank costs 64, 16 and, beyond the dense 3 numbers of c, nothing.
    assert ranks_within(shapes, 0) == {"a": 1, "b": 1, "c": 1}
    assert ranks_within(shapes, 64 + 16 + 3) == {"a": 1, "b": 1, "c": 1}
    assert ranks_within(shapes, 2 * 64 + 2 * 16 + 3) == {"a": 2, "b": 2, "c": 1}
    assert ranks_within(shapes, 2 * 64 + 3 * 16 + 3 + 15) == {"a": 2, "b": 3, "c": 1}
    assert ranks_within(shapes, 10**6) == {"a": 6, "b": 8, "c": 1}


def block_of(model: Flame) -> Block:
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block


def moved_by(learner: Learner, store: Store, tasks: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after a stage."""
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    learner.learn(store, Stage(tasks=tuple(tasks)))
    return before, {name: p.detach().clone() for name, p in learner.model.named_parameters()}


def test_pools_that_are_joined_equal_one_pool_that_has_all_their_experts() -> None:
    small, large, both = (ExpertPool(e, 4, 6, 3, 0.0) for e in (2, 3, 5))
    with torch.no_grad():
        for name, p in both.named_parameters():
            p.copy_(torch.cat([small.get_parameter(name), large.get_parameter(name)]))
    for counts in ([2, 0, 3, 1, 4], [0, 0, 3, 1, 6], [5, 5, 0, 0, 0]):
        near = torch.randn(10, 3, 4)
        torch.testing.assert_close(Joined([small, large])(near, counts, 0), both(near, counts, 0))


def test_gate_columns_are_scored_side_by_side_and_only_new_ones_are_added() -> None:
    router = Router(4, 3, 2, "softmax")
    router.add_head(0)
    router.add_head(1, experts=5, combine="append")
    router.add_head(3, experts=9, combine="append")
    assert [len(head.gate) for head in (router.head(s) for s in (0, 1, 3))] == [3, 2, 4]
    x, mask = torch.randn(6, 1, 4), torch.ones(6, 1, dtype=torch.bool)
    router.eval()
    for cursor, stages in ((0, (0,)), (1, (0, 1)), (2, (0, 1)), (3, (0, 1, 3))):
        gate = torch.cat([router.head(s).gate for s in stages])
        expected = torch.softmax(x[:, 0] @ gate.T, dim=1)
        torch.testing.assert_close(router(x, mask, cursor).clean, expected)
    new = Router(4, 3, 2, "softmax")
    new.add_head(2, experts=7, combine="append")
    assert len(new.head(2).gate) == 7


def test_lifelong_moe_adds_experts_and_columns_and_keeps_the_old_ones(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM[:2], {"name": "lifelong_moe", "experts": 3}, train={"weight_decay": 1.0})
    before, after = moved_by(learner, tiny_store, STREAM[2])
    for name, tensor in before.items():
        where = name.split(".")
        if where[2] in ("pool", "columns", "routers"):
            assert torch.equal(after[name], tensor), name
    reached = [n for n in before if n.split(".")[2] == "layers" and n.split(".")[3] == "vitals" and n.endswith("base")]
    assert reached
    assert all(not torch.equal(after[name], before[name]) for name in reached)
    for modality in ("vitals", "image", "notes"):
        router = block_of(learner.model).routers[modality]
        assert isinstance(router, Router)
        assert sum(len(head.gate) for head in router.read(2)) == 4 + 2 * 3
    assert any(not torch.equal(p, torch.zeros_like(p)) for n, p in after.items() if n.startswith("blocks.0.columns.2"))


def test_a_progressive_column_adds_what_earlier_columns_say_through_its_adapters(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM, {"name": "progressive", "experts": 3})
    block = block_of(learner.model.eval())
    z = Sequences(torch.randn(5, 4, 8), torch.ones(5, 4, dtype=torch.bool))
    for name, cursor in (("vitals", 2), ("image", 2), ("image", 1)):
        got, routing = block._mix({name: z}, cursor)
        said: list[Tensor] = []
        for stage in range(cursor + 1):
            if not block.routes(name, stage):
                said.append(torch.zeros_like(z.x))
                continue
            column = block.columns[str(stage)] if stage else None
            pool = block.pool if column is None else column.pool
            assert isinstance(pool, ExpertPool)
            y = mixture({name: z}, {name: block.route(name, z, stage)}, pool, stage)[name]
            if column is not None:
                down, up = column.down, column.up
                assert isinstance(down, StackedLinear)
                assert isinstance(up, StackedLinear)
                y = y + up(torch.nn.functional.gelu(down(torch.cat(said, -1), stage)), stage)
            said.append(y)
        torch.testing.assert_close(got[name], said[-1])
        assert routing[name].clean.shape[1] == 3
    assert not block.routes("vitals", 1)


def test_low_rank_experts_equal_a_loop_over_steps(tiny_store: Store) -> None:
    learner = learned(tiny_store, STREAM, {"name": "moral", "experts": 3, "rank": 2})
    block = block_of(learner.model.eval())
    z = Sequences(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert block.pool is not None
    frozen = mixture({"notes": z}, {"notes": block.route("notes", z, 2)}, block.pool, 2)["notes"]
    first, second = block.columns["1"], block.columns["2"]
    assert isinstance(first, LowRankExperts)
    assert isinstance(second, LowRankExperts)
    assert first.a.base.any()
    expected = frozen.clone()
    for n in range(2):
        for t in range(3):
            x = z.x[n, t]
            scores = second.gate.base @ x
            assert len(scores) == 6
            best = scores.argsort(descending=True)[:2]
            weights = torch.softmax(scores[best], dim=0)
            for weight, i in zip(weights, best.tolist(), strict=True):
                owner, place = (first, i) if i < 3 else (second, i - 3)
                expected[n, t] += weight * (owner.a.base[place] @ (owner.b.base[place] @ x))
    torch.testing.assert_close(block._mix({"notes": z}, 2)[0]["notes"], expected)


def test_low_rank_experts_change_nothing_before_they_are_trained(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "moral"})
    context = context_of(learner, tiny_store, ("days",))
    block = block_of(context.model.eval())
    z = Sequences(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert block.pool is not None
    plain = mixture({"vitals": z}, {"vitals": block.route("vitals", z, 1)}, block.pool, 1)
    torch.testing.assert_close(block._mix({"vitals": z}, 1)[0]["vitals"], plain["vitals"], rtol=0, atol=0)


def test_the_divergence_of_gaussians_is_its_closed_form_and_grows_with_distance() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 1, generator=draw), 2.0 * torch.randn(4000, 1, generator=draw) + 3.0
    # KL(p||q) + KL(q||p) of N(0, 1) and N(3, 4): (1/4 + 4 + 9 (1 + 1/4)) / 2 - 1
    assert float(divergence([a, b])) == pytest.approx((0.25 + 4 + 9 * 1.25) / 2 - 1, rel=0.1)
    near = [torch.randn(200, 3, generator=draw) for _ in range(3)]
    far = [x + 2.0 * i for i, x in enumerate(near)]
    assert float(divergence(far)) > 5 * float(divergence(near)) > 0
    pairs = [float(divergence([far[i], far[j]])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(divergence(far)) == pytest.approx(float(np.mean(pairs)))
    assert float(divergence([near[0], near[0][:1]])) == 0.0


def test_seed_trains_the_expert_that_separates_best_and_no_other(tiny_store: Store) -> None:
    """Planted: all experts but one say the same of every sample."""
    learner = learned(tiny_store, TWO[:1], {"name": "seed"}, train={"weight_decay": 1.0})
    pool = block_of(learner.model).pool
    assert pool is not None
    with torch.no_grad():
        pool.fc2.base[[0, 1, 3]] = 0.0
    before, after = moved_by(learner, tiny_store, ("days",))
    assert isinstance(learner.method, SEED)
    assert learner.method.chosen == {1: (2,)}
    for name, tensor in before.items():
        if name.startswith("blocks.0.pool."):
            assert torch.equal(after[name][[0, 1, 3]], tensor[[0, 1, 3]]), name
        elif ".pool." not in name:
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(after["blocks.0.pool.fc1.base"][2], before["blocks.0.pool.fc1.base"][2])
    assert not torch.equal(after["blocks.0.pool.fc2_bias.copies.0"][2], before["blocks.0.pool.fc2_bias.copies.0"][2])


def test_a_separate_model_does_not_depend_on_what_was_learned_before(tiny_store: Store) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": "separate"})
    other = learned(tiny_store, (("stage",),), {"name": "separate"})
    for one in (learner, other):
        one.learn(tiny_store, Stage(tasks=("days",)))
    assert bits(everyone(learner, tiny_store)["days"]) == bits(everyone(other, tiny_store)["days"])
    assert "days" not in learner.model.heads
    assert "image" not in learner.model.paths
    own = learner.model.apart["days"]
    assert isinstance(own, Flame)
    size = sum(p.stored_parameters for p in footprint(learner.model))
    assert size == sum(t.numel() for t in learner.model.state_dict().values())
    assert size > sum(t.numel() for t in own.state_dict().values()) > 0


@pytest.mark.parametrize("kind", ["progressive", "moral", "lifelong_moe", "seed"])
def test_methods_of_experts_refuse_a_model_without_routers(tiny_store: Store, kind: str) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": kind}, model={"preset": "no_moe"})
    with pytest.raises(RecipeError, match=f"the method '{kind}' .* preset 'no_moe'"):
        learner.learn(tiny_store, Stage(tasks=("days",)))


def test_every_method_can_be_compared_with_every_other(tiny_store: Store, tmp_path: Path) -> None:
    names = [name for name in METHODS if name != "flame"]
    check(recipe(compare=names), tiny_store)
    for name in METHODS:
        check(recipe(method={"name": name}, compare=[other for other in METHODS if other != name]), tiny_store)
    chosen = ["replay", "separate", "inflora"]
    plan = recipe(TWO, train={**QUICK, "bootstrap": 0}, compare=chosen)
    found = run(plan, tmp_path / "run", store=tiny_store).results
    assert [other.name for other in found.comparison] == chosen
    drift = {
        other.name: [d.bitwise_equal for d in other.drift if d.after_stage == 1 and d.task == "death"]
        for other in found.comparison
    }
    assert drift == {"replay": [False], "separate": [True], "inflora": [True]}


@pytest.mark.parametrize("name", ["replay", "inflora", "progressive", "separate"])
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(tiny_store: Store, tmp_path: Path, name: str) -> None:
    quick = {**QUICK, "bootstrap": 0}
    run(recipe(TWO[:1], train=quick, method={"name": name}), tmp_path / "run", store=tiny_store)
    longer = extend(tmp_path / "run", TWO[1], store=tiny_store).learner
    straight = learned(tiny_store, TWO, {"name": name}, train=quick)
    two = straight.model.state_dict()
    assert all(torch.equal(tensor, two[key]) for key, tensor in longer.model.state_dict().items())


@pytest.mark.parametrize("name", ["ewc", "gpm", "inflora", "replay", "seed"])
def test_a_damaged_state_of_a_method_is_refused_with_a_sentence(tiny_store: Store, tmp_path: Path, name: str) -> None:
    learner = learned(tiny_store, TWO[:1], {"name": name, **FEW.get(name, {})}, train=QUICK)
    state = learner.method.state()
    key = next(iter(state.tensors), None)
    wrong = MethodState({"nobody|0": torch.zeros(3, 1)}, {}) if key else MethodState({}, {"other": 1})
    learner.method.state = lambda: wrong  # type: ignore[method-assign]
    with pytest.raises(CheckpointError):
        Learner.load(learner.save(tmp_path / "model"))
