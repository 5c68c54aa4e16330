"""What every continual-learning method promises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flame_moe.batch import FlexiBatch
from flame_moe.continual import Learner
from flame_moe.continual.methods import METHODS, Commit, MethodState, StageContext, make_method
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, DataError, RecipeError
from flame_moe.nn.model import Flame
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.runs import check, extend, run
from flame_moe.schema import SIZED, MethodConfig, Recipe
from flame_moe.training.hooks import Seen
from flame_moe.training.problem import Problem
from tests.methods import FEW, QUICK, TWO, learned
from tests.test_continual import Inspect, Logits, Stages, bits, everyone
from tests.tiny import STREAM, recipe


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


def test_a_rank_or_an_energy_that_is_given_decides_how_much_is_kept() -> None:
    assert set(SIZED) == {name for name, method in METHODS.items() if "keep" in method.keys}
    usual = MethodConfig()
    assert (usual.truncation, usual.keep, usual.budget) == ("loss", "budget", 0.1)
    assert MethodConfig(rank=3).keep == "rank"
    assert MethodConfig(energy=0.9).keep == "energy"
    assert MethodConfig(warmup=0.0).keep == "rank"
    assert MethodConfig(keep="budget", rank=3).keep == "budget"
    assert MethodConfig(name="lora_equal", rank=3).keep == "rank"
    assert MethodConfig(name="lora", rank=3).keep == usual.keep
    assert (MethodConfig(preset="paper").truncation, MethodConfig(preset="paper").keep) == ("weight", "rank")
    for config in (usual, MethodConfig(rank=3), MethodConfig(preset="reference", rank=4)):
        assert MethodConfig.parse(config.plain(), where="method") == config
    with pytest.raises(RecipeError, match="'rank' and 'energy' are given"):
        MethodConfig.parse({"rank": 3, "energy": 0.9}, where="method")


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
    learner.method.state = lambda: wrong
    with pytest.raises(CheckpointError):
        Learner.load(learner.save(tmp_path / "model"))
