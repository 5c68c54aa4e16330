"""Train, truncate, refine: what each round trains, what is recorded, and that a stage may stop anywhere."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flame_moe.continual import Learner
from flame_moe.continual.methods import StageContext, make_method
from flame_moe.continual.methods.flame import FlameCL
from flame_moe.continual.moments import gather
from flame_moe.continual.rounds import Change
from flame_moe.data.store import Store
from flame_moe.errors import RecipeError
from flame_moe.nn.gating import Router
from flame_moe.nn.layers import biases
from flame_moe.nn.slices import LowRank, ranks_of, tensors
from flame_moe.nn.stacked import StackedMatrix, growables
from flame_moe.recorder import Recorder
from flame_moe.results import Results
from flame_moe.schema import MethodConfig, Recipe, Stage
from flame_moe.training.engine import validate
from flame_moe.training.monitor import Monitor
from tests.tiny import recipe

TWO = (("death",), ("days",))
REFINE: dict[str, Any] = {"warmup": 0.5, "recalibrate": 1, "truncation": "activation", "bias_correction": True}
FORMS: dict[str, dict[str, Any]] = {
    "refined": REFINE,
    "energy": {"truncation": "activation", "keep": "energy", "energy": 0.8, "warmup": 0.5},
    "budget": {"truncation": "activation", "keep": "budget", "budget": 0.3, "bias_correction": True},
    "loss": {"truncation": "loss", "keep": "budget", "budget": 0.3, "warmup": 0.5},
    "from zero": {"warmup": 0.0},
    "reference": {"preset": "reference", "rank": 2, "base_rank": 2},
}


def stream(method: dict[str, Any], **changes: Any) -> Recipe:
    return recipe((("death",), ("stage",), ("days",)), method=method, train={"epochs": 4}, **changes)


class CutOffError(RuntimeError):
    """The machine stops."""


class Crash(Monitor):
    """Stops after so many epochs of the stage, or in the middle of the one after."""

    def __init__(self, epochs: int, steps: int = 1) -> None:
        self.left, self.steps = epochs, steps

    def epoch(self, record: dict[str, Any]) -> None:
        self.left -= 1

    def step(self) -> None:
        if self.left == 0:
            self.steps -= 1
            if self.steps == 0:
                raise CutOffError


class Rounds(Monitor):
    """What trains in each round, and how the epochs are numbered."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.trained: list[set[str]] = []
        self.epochs: list[int] = []

    def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
        self.trained.append({name for name, p in self.learner.model.named_parameters() if p.requires_grad})

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs.append(record["epoch"])


def logits(learner: Learner, store: Store) -> dict[str, bytes]:
    """Of every task on all samples that it can read."""
    found = {}
    for name, task in learner.tasks.items():
        found[name] = learner.predict(store, name, store.indices(modalities=task.modalities)).logits.tobytes()
    return found


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("form", list(FORMS))
def test_no_form_of_the_method_changes_an_older_task(form: str, tiny_store: Store, tmp_path: Path) -> None:
    plan = stream(FORMS[form])
    learner, first = Learner(plan), dict[str, bytes]()
    for stage in plan.stages:
        learner.learn(tiny_store, stage)
        now = logits(learner, tiny_store)
        assert {name: now[name] for name in first} == first
        first = now
        assert not any(p.requires_grad for p in learner.model.parameters())
    loaded = Learner.load(learner.save(tmp_path / "model"))
    assert logits(loaded, tiny_store) == first
    assert loaded.stages == learner.stages


@pytest.fixture(scope="module")
def base(tiny_store: Store) -> Learner:
    """A model with one stage."""
    plan = recipe(TWO, train={"epochs": 4})
    learner = Learner(plan)
    learner.learn(tiny_store, plan.stages[0])
    return learner


def after(base: Learner, method: dict[str, Any]) -> Learner:
    """The model with one stage, to go on by FLAME in some form."""
    return base.with_method(MethodConfig(**{"name": "flame", "rank": 2, **method}))


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("form", ["refined", "energy", "from zero"])
def test_a_stage_that_stops_in_any_round_ends_as_if_it_had_not(
    base: Learner, form: str, epochs: int, tiny_store: Store, tmp_path: Path
) -> None:
    """Crashes at the first step after so many epochs: within rounds, and right after the updates were cut."""
    whole, cut = after(base, FORMS[form]), after(base, FORMS[form])
    again = copy.deepcopy(cut)
    stage = Stage(tasks=("days",))
    whole.learn(tiny_store, stage)
    with pytest.raises(CutOffError):
        cut.learn(tiny_store, stage, monitor=Crash(epochs), state_folder=tmp_path / "resume")
    again.learn(tiny_store, stage, state_folder=tmp_path / "resume")
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert plain(again) == plain(whole)


def plain(learner: Learner) -> str:
    """The record of the last stage, without clocks."""
    stage = learner.stages[-1]
    history = [{key: value for key, value in e.items() if key != "seconds"} for e in stage.history]
    rows = [history, [c._asdict() for c in stage.commits], [c._asdict() for c in stage.changes], stage.best_epoch]
    return json.dumps(rows)


def test_each_round_trains_what_it_should(base: Learner, tiny_store: Store) -> None:
    learner = after(base, REFINE)
    watch = Rounds(learner)
    record = learner.learn(tiny_store, Stage(tasks=("days",)), monitor=watch)
    dense, factors, routing = watch.trained
    kinds = [{name.split(".")[-1] for name in names if "delta" in name} for names in watch.trained]
    assert kinds[0] == {"delta"}
    assert kinds[1] >= {"delta_a", "delta_b"}
    assert kinds[2] == set()
    rest = {name for name in dense if "delta" not in name}
    assert {name for name in factors if "delta" not in name} == rest
    assert routing == {name for name in dense if name.startswith("heads.") or ".routers." in name}
    assert watch.epochs == [0, 1, 2, 3]
    assert record.epochs_run == len(record.history) == 4
    assert record.best_epoch == 3


def test_factors_from_zero_are_all_that_ever_trains(base: Learner, tiny_store: Store) -> None:
    learner = after(base, {"warmup": 0.0})
    watch = Rounds(learner)
    record = learner.learn(tiny_store, Stage(tasks=("days",)), monitor=watch)
    assert len(watch.trained) == 1
    for name, part in growables(learner.model):
        if isinstance(part, StackedMatrix) and f"{name}.delta_a" in watch.trained[0]:
            assert f"{name}.delta" not in watch.trained[0]
            assert ranks_of(part.slice(1), part.matrices) == (2,) * part.matrices
    assert {c.relative_error for c in record.commits} == {0.0}
    assert record.changes == ()


class Watching(FlameCL):
    """FLAME that keeps what it saw when it cut the updates."""

    def compress(self, context: StageContext) -> Any:
        model, stage = context.model, context.stage
        parts = {n: p for n, p in growables(model) if isinstance(p, StackedMatrix) and p.delta is not None}
        self.deltas = {n: p.delta.detach().clone() for n, p in parts.items() if p.delta is not None}
        batches = (b for problem in context.problems.values() for b in problem.train.batches(None))
        self.moments = gather(model, batches, stage)
        self.biases = {n: v.at(stage).detach().clone() for n, v in biases(model).items()}
        self.before = {name: validate(model, problem) for name, problem in context.problems.items()}
        return super().compress(context)


@pytest.fixture(scope="module")
def watched(base: Learner, tiny_store: Store) -> tuple[Learner, Watching]:
    learner = after(base, {"truncation": "activation", "bias_correction": True})
    method = Watching(learner.method.config)
    learner.method = method
    learner.learn(tiny_store, Stage(tasks=("days",)))
    return learner, method


def test_what_a_commit_lost_is_recorded_as_it_was(watched: tuple[Learner, Watching]) -> None:
    """Against the updates and inputs just before, matrix by matrix."""
    learner, method = watched
    parts = dict(growables(learner.model))
    with_bias = biases(learner.model)
    commits = {c.matrix: c for c in learner.stages[1].commits}
    assert commits
    assert any(c.functional_error for c in commits.values())
    for name, commit in commits.items():
        part, delta, moment = parts[name], method.deltas[name], method.moments[name]
        assert isinstance(part, StackedMatrix)
        kept = part.slice(1)
        gone = delta - (kept if isinstance(kept, Tensor) else kept.dense())
        assert commit.relative_error == pytest.approx(float(gone.norm() / delta.norm()), rel=1e-5)
        assert commit.parameters == sum(t.numel() for t in tensors(kept).values())
        assert commit.rank == (kept.a.shape[-1] if isinstance(kept, LowRank) else None)
        lost = total = 0.0
        for e in range(part.matrices):
            one, all_ = gone.reshape(-1, *gone.shape[-2:])[e].double(), delta.reshape(-1, *gone.shape[-2:])[e].double()
            c = moment.second[e]
            left = c - torch.outer(moment.mean[e], moment.mean[e]) if name in with_bias else c
            lost += float(moment.seen[e] * torch.einsum("oi,ij,oj->", one, left, one))
            total += float(moment.seen[e] * torch.einsum("oi,ij,oj->", all_, c, all_))
        assert commit.functional_error == pytest.approx((max(lost, 0.0) / total) ** 0.5, rel=1e-3, abs=1e-4)


def test_the_bias_takes_the_mean_of_what_was_lost(watched: tuple[Learner, Watching]) -> None:
    learner, method = watched
    part, bias = learner.model.blocks[0].pool.fc1, learner.model.blocks[0].pool.fc1_bias
    kept = part.slice(1)
    assert isinstance(kept, LowRank)
    gone = (method.deltas["blocks.0.pool.fc1"] - kept.dense()).double()
    moved = torch.einsum("eoi,ei->eo", gone, method.moments["blocks.0.pool.fc1"].mean)
    expected = method.biases["blocks.0.pool.fc1"] + moved.float()
    assert torch.allclose(bias.at(1), expected, atol=1e-6)
    assert float(moved.abs().max()) > 0


def test_the_change_of_the_metrics_is_that_of_the_commit(
    watched: tuple[Learner, Watching], tiny_store: Store, base: Learner
) -> None:
    learner, method = watched
    (change,) = learner.stages[1].changes
    assert isinstance(change, Change)
    assert change.task == "days"
    assert change.before == method.before["days"]
    problem = learner._problem(tiny_store, learner.tasks["days"], 1)
    assert change.after == validate(learner.model, problem)
    assert base.stages[0].changes == ()


def test_results_hold_what_the_commit_lost_and_did(tiny_store: Store) -> None:
    plan = recipe(TWO, method={"truncation": "activation", "keep": "energy", "energy": 0.7})
    learner = Learner(plan)
    recorder = Recorder(plan, stores=dict.fromkeys(("death", "days"), tiny_store))
    for stage in plan.stages:
        recorder.learn(learner, tiny_store, stage)
    results = Results.parse(json.loads(recorder.results().model_dump_json()), where="test")
    last = learner.stages[1]
    (row,) = results.truncations
    assert (row.stage, row.task, row.split) == (1, "days", "val")
    assert row.before == last.changes[0].before
    assert row.after == last.changes[0].after
    full = next(e for e in results.evaluations if e.phase == "full_rank")
    committed = next(e for e in results.evaluations if (e.phase, e.split, e.task) == ("committed", "val", "days"))
    assert full.metrics == pytest.approx({name: row.before[name] for name in full.metrics})
    assert committed.metrics == pytest.approx({name: row.after[name] for name in committed.metrics})
    assert [c.model_dump(exclude={"stage"}) for c in results.commits] == [c._asdict() for c in last.commits]
    assert all(c.functional_error is not None and c.functional_error**2 <= 0.3 + 1e-6 for c in results.commits)


@pytest.mark.parametrize("mode", ["weight", "activation", "loss"])
def test_a_budget_holds_for_the_whole_stage(base: Learner, tiny_store: Store, mode: str) -> None:
    learner = after(base, {"truncation": mode, "keep": "budget", "budget": 300})
    record = learner.learn(tiny_store, Stage(tasks=("days",)))
    slices = [p.slice(1) for _, p in growables(learner.model) if isinstance(p, StackedMatrix) and 1 in p.stages]
    stored = sum(t.numel() for part in slices for t in tensors(part).values())
    assert 0 < stored <= 300
    assert sum(c.parameters for c in record.commits) == stored
    assert any(c.ranks for c in record.commits)


def test_the_published_reading_cuts_the_base_and_mixes_all_heads(tiny_store: Store) -> None:
    plan = recipe(TWO, method={"preset": "reference", "rank": 2, "base_rank": 2})
    learner = Learner(plan)
    first = learner.learn(tiny_store, plan.stages[0])
    parts = {n: p for n, p in growables(learner.model) if isinstance(p, StackedMatrix)}
    fc1 = parts["blocks.0.pool.fc1"]
    assert fc1.base.numel() == 0
    assert torch.linalg.matrix_rank(fc1.effective(0)).tolist() == [2] * 4
    assert {c.matrix for c in first.commits if c.rank == 2} == {n for n, p in parts.items() if p.stages == (0,)}
    learner.learn(tiny_store, plan.stages[1])
    routers = {n.split(".")[-1]: m for n, m in learner.model.named_modules() if isinstance(m, Router)}
    assert {n: sorted(r.heads) for n, r in routers.items()} == {
        "vitals": ["0", "1"],
        "static": ["0", "1"],
        "image": ["1"],
    }
    assert {h.combine for r in routers.values() for h in r.read(1)} == {"mean"}
    assert len(routers["vitals"].read(1)) == 2


def test_another_method_starts_from_a_base_cut_as_it_says(base: Learner) -> None:
    twin = after(base, {"base_rank": 2})
    assert base.model.blocks[0].pool.fc1.base.numel()
    assert not twin.model.blocks[0].pool.fc1.base.numel()
    assert {c.rank for c in twin.stages[0].commits} <= {2, None}


def test_presets_are_values_of_keys_and_give_way_to_them() -> None:
    paper, code = MethodConfig(preset="paper"), MethodConfig(preset="reference", base_rank=4)
    assert (paper.rank, paper.base_rank, paper.router) == (32, None, "own")
    assert (code.rank, code.base_rank, code.router, code.router_heads, code.load) == (32, 4, "mean", "all", "count")
    assert MethodConfig.parse(code.plain(), where="") == code
    assert isinstance(make_method(code), FlameCL)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"keep": "rank", "energy": 0.5}, "'energy' is set but keep = 'rank' decides"),
        ({"keep": "energy", "budget": 0.5}, "'budget' is set but keep = 'energy' decides"),
        ({"keep": "budget", "budget": 10.5}, "give a whole number, or a share below 1"),
        ({"keep": "energy", "warmup": 0.0}, "a rank has to size them"),
        ({"preset": "papper"}, "Did you mean 'paper'"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(TWO, method=method)


def test_too_few_epochs_to_divide_are_refused_before_anything_changes(base: Learner, tiny_store: Store) -> None:
    learner = after(base, {"warmup": 0.5, "recalibrate": 3})
    with pytest.raises(RecipeError, match="4 epochs cannot be divided"):
        learner.learn(tiny_store, Stage(tasks=("days",)))
    assert len(learner.stages) == 1
    assert not any(isinstance(p, StackedMatrix) and p.delta_stage for _, p in growables(learner.model))


@pytest.mark.parametrize(
    ("warmup", "tail", "epochs", "expected"),
    [
        (1.0, 0, 5, [(5, False, False)]),
        (0.5, 0, 5, [(2, False, False), (3, True, False)]),
        (0.01, 0, 5, [(1, False, False), (4, True, False)]),
        (0.99, 1, 5, [(3, False, False), (1, True, False), (1, True, True)]),
        (1.0, 2, 5, [(3, False, False), (2, True, True)]),
        (0.0, 1, 5, [(4, True, False), (1, True, True)]),
    ],
)
def test_the_epochs_of_a_stage_are_divided_as_asked(
    warmup: float, tail: int, epochs: int, expected: list[tuple[int, bool, bool]]
) -> None:
    method = make_method(MethodConfig(warmup=warmup, recalibrate=tail))
    assert [tuple(part) for part in method.rounds(1, epochs)] == expected
    assert [tuple(part) for part in method.rounds(0, epochs)] == [(epochs, False, False)]


def test_the_best_epoch_of_each_task_is_compressed_like_the_joint_one(base: Learner, tiny_store: Store) -> None:
    learner = after(base, {"truncation": "activation"})
    learner.recipe = learner.recipe.model_copy(
        update={"train": learner.recipe.train.model_copy(update={"select": "per_task"})}
    )
    learner.learn(tiny_store, Stage(tasks=("days",)))
    variant = learner.variants["days"]
    # With one task its own best epoch is the joint one.
    assert same(variant.model.state_dict(), learner.model.state_dict())
