"""One loop: reproducible, resumable, safe against bad numbers, and each option does what it says."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flame_moe.batch import FlexiBatch, drop_cells, drop_modalities
from flame_moe.continual import Learner
from flame_moe.data.loader import Loader
from flame_moe.data.store import Store
from flame_moe.errors import CheckpointError, NonFiniteError
from flame_moe.nn import Flame
from flame_moe.nn.losses import class_weights, task_loss
from flame_moe.schema import Recipe, Task, TrainConfig
from flame_moe.training import engine, problem
from flame_moe.training.engine import to_values
from flame_moe.training.monitor import Monitor
from flame_moe.training.optim import AdamW, learning_rate, parameter_groups
from flame_moe.training.problem import Problem
from flame_moe.training.seeding import derive
from tests.tiny import batch_of, flame, full_batch, recipe, sample

JOINT = (("death", "days"),)


class CutOff(BaseException):
    """The power fails."""


class Crash(Monitor):
    """Fails at the end of an epoch, at a step, or when the stage is trained."""

    def __init__(self, *, epoch: int | None = None, step: int | None = None, at_end: bool = False) -> None:
        self.at_epoch, self.at_step, self.at_end, self.steps = epoch, step, at_end, 0

    def end(self) -> None:
        if self.at_end:
            raise CutOff

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.at_step:
            raise CutOff

    def epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] == self.at_epoch:
            raise CutOff


class Watch(Monitor):
    """Keeps the weights of every epoch."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.weights: list[dict[str, Tensor]] = []
        self.ended = 0

    def epoch(self, record: dict[str, Any]) -> None:
        self.weights.append({k: t.clone() for k, t in self.learner.model.state_dict().items()})

    def end(self) -> None:
        self.ended += 1


def learned(recipe: Recipe, store: Store, **options: Any) -> Learner:
    learner = Learner(recipe)
    for stage in recipe.stages:
        learner.learn(store, stage, **options)
    return learner


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def without_clock(learner: Learner) -> list[Any]:
    return [[{k: v for k, v in e.items() if k != "seconds"} for e in s.history] for s in learner.stages]


def test_the_seed_decides_everything(tiny_store: Store) -> None:
    one, two, other = (learned(recipe(JOINT, seed=s), tiny_store) for s in (3, 3, 4))
    assert same(one.model.state_dict(), two.model.state_dict())
    assert without_clock(one) == without_clock(two)
    assert not same(one.model.state_dict(), other.model.state_dict())


def test_random_numbers_of_other_places_do_not_matter(tiny_store: Store) -> None:
    one = learned(recipe(JOINT), tiny_store)
    torch.manual_seed(99)
    torch.rand(7)
    assert same(one.model.state_dict(), learned(recipe(JOINT), tiny_store).model.state_dict())
    assert derive(0, "a", 1) != derive(0, "a", 2)
    assert derive(0, "a") == derive(0, "a")


def test_every_epoch_draws_its_own_random_numbers(tiny_store: Store) -> None:
    seeds: list[int] = []

    class Listen(Monitor):
        def step(self) -> None:
            seeds.append(torch.initial_seed())

    learned(recipe(JOINT, train={"epochs": 3}), tiny_store, monitor=Listen())
    assert len(set(seeds)) == 3


HARD: dict[str, Any] = {"epochs": 3, "modality_dropout": 0.3, "select": "per_task"}
EASY: dict[str, Any] = {"epochs": 3, "sampling": "temperature", "schedule": "constant"}


@pytest.mark.parametrize("train", [HARD, EASY], ids=["hard", "easy"])
@pytest.mark.parametrize("crash", [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}, {"step": 6}, {"at_end": True}])
def test_resuming_after_a_crash_gives_the_same_weights_as_not_crashing(
    tiny_store: Store, tmp_path: Path, crash: dict[str, int], train: dict[str, Any]
) -> None:
    plan = recipe(JOINT, train=train)
    whole, cut, second = learned(plan, tiny_store), Learner(plan), Learner(plan)
    with pytest.raises(CutOff):
        cut.learn(tiny_store, plan.stages[0], monitor=Crash(**crash), state_folder=tmp_path / "resume")
    second.learn(tiny_store, plan.stages[0], state_folder=tmp_path / "resume")
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert without_clock(second) == without_clock(whole)
    assert set(second.variants) == set(whole.variants)
    for task, variant in whole.variants.items():
        assert same(second.variants[task].model.state_dict(), variant.model.state_dict())


def test_a_later_stage_resumes_like_the_first(tiny_store: Store, tmp_path: Path) -> None:
    plan = recipe((("death",), ("stage",)), train={"epochs": 3})
    whole, cut = learned(plan, tiny_store), Learner(plan)
    cut.learn(tiny_store, plan.stages[0])
    saved = cut.save(tmp_path / "model")
    with pytest.raises(CutOff):
        cut.learn(tiny_store, plan.stages[1], monitor=Crash(epoch=2), state_folder=tmp_path / "resume")
    again = Learner.load(saved)
    again.learn(tiny_store, plan.stages[1], state_folder=tmp_path / "resume")
    assert same(again.model.state_dict(), whole.model.state_dict())


def test_the_state_of_another_stage_is_refused(tiny_store: Store, tmp_path: Path) -> None:
    plan = recipe((("death",), ("stage",), ("codes",)))
    learner = Learner(plan)
    learner.learn(tiny_store, plan.stages[0], state_folder=tmp_path / "resume")
    with pytest.raises(CheckpointError, match=r"stage 0 \(death\), not of stage 1 \(stage\)"):
        learner.learn(tiny_store, plan.stages[1], state_folder=tmp_path / "resume")


def test_the_state_of_other_tasks_is_refused(tiny_store: Store, tmp_path: Path) -> None:
    plan = recipe((("death",), ("stage",)))
    with pytest.raises(CutOff):
        Learner(plan).learn(tiny_store, plan.stages[0], monitor=Crash(epoch=1), state_folder=tmp_path / "resume")
    with pytest.raises(CheckpointError, match=r"stage 0 \(death\), not of stage 0 \(stage\)"):
        Learner(plan).learn(tiny_store, plan.stages[1], state_folder=tmp_path / "resume")


@dataclasses.dataclass(frozen=True)
class Poisoned(Loader):
    """A loader that spoils one observed cell of one sample."""

    victim: str = ""
    poison: float = math.nan

    def batches(self, *args: Any, **options: Any) -> Iterator[FlexiBatch]:
        for batch in super().batches(*args, **options):
            if self.victim in batch.ids:
                row = batch.ids.index(self.victim)
                for part in batch.modalities.values():
                    at = (part.rows == row).nonzero().flatten()
                    part.values[at, 0] = self.poison
                    if part.observed is not None:
                        part.observed[at, 0] = True
            yield batch


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_before_the_update(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    plan = recipe((("death",),), train={"batch_size": 64})
    indices = tiny_store.indices("death", "train", modalities=("vitals", "static"))
    victim = tiny_store.ids(indices)[3]
    build = Learner._problem

    def poisoned(self: Learner, store: Store, task: Task, cursor: int) -> Problem:
        sound = build(self, store, task, cursor)
        fields = {f.name: getattr(sound.train, f.name) for f in dataclasses.fields(Loader)}
        return dataclasses.replace(sound, train=Poisoned(**fields, victim=victim, poison=poison))

    monkeypatch.setattr(Learner, "_problem", poisoned)
    learner, before = Learner(plan), {}
    trained = learner.model

    class Begin(Monitor):
        def begin(self, tasks: list[str], epochs: int, steps: int, done: int) -> None:
            before.update({k: t.clone() for k, t in trained.state_dict().items()})

    with pytest.raises(NonFiniteError, match=rf"task 'death', samples {victim}\]") as caught:
        learner.learn(tiny_store, plan.stages[0], monitor=Begin())
    assert "no weight was changed" in str(caught.value)
    assert same(trained.state_dict(), before)
    assert learner.stages == []


def test_a_gradient_that_is_no_number_stops_before_the_update(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss may be finite while its slope is not: sqrt at zero."""
    monkeypatch.setattr(problem, "task_loss", lambda t, z, *args: task_loss(t, z, *args) + (z.sum() * 0).sqrt())
    for clip in (1.0, None):
        learner = Learner(recipe((("death",),), train={"clip": clip}))
        before: dict[str, Tensor] = {}
        trained = learner.model

        class Begin(Monitor):
            def begin(self, *args: Any, kept: dict[str, Tensor] = before, of: Flame = trained) -> None:
                kept.update({k: t.clone() for k, t in of.state_dict().items()})

        with pytest.raises(NonFiniteError, match=r"gradient's norm is nan; no weight was changed.*tasks death"):
            learner.learn(tiny_store, learner.recipe.stages[0], monitor=Begin())
        assert same(trained.state_dict(), before)


def scripted(monkeypatch: pytest.MonkeyPatch, scores: dict[str, list[float]]) -> None:
    """Let validation report these scores, epoch by epoch."""
    turns = {task: iter(values) for task, values in scores.items()}
    metric = {"death": "auroc", "days": "r2"}
    monkeypatch.setattr(
        engine, "validate", lambda model, problem: {metric[problem.task.name]: next(turns[problem.task.name])}
    )


def test_early_stopping_waits_its_patience_and_keeps_the_best(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {"death": [0.5, 0.7, 0.6, 0.65, 0.9, 0.9]})
    plan = recipe((("death",),), train={"epochs": 6, "patience": 2})
    learner = Learner(plan)
    watch = Watch(learner)
    stage = learner.learn(tiny_store, plan.stages[0], monitor=watch)
    assert (stage.epochs_run, stage.best_epoch, watch.ended) == (4, 1, 1)
    assert same(learner.model.state_dict(), watch.weights[1])


def test_each_selection_policy_keeps_its_own_epoch(tiny_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"death": [0.9, 0.5, 0.4], "days": [0.1, 0.6, 0.2]}
    for select, epoch in (("joint", 1), ("last", 2), ("per_task", 1)):
        scripted(monkeypatch, scores)
        plan = recipe(JOINT, train={"epochs": 3, "select": select})
        learner = Learner(plan)
        watch = Watch(learner)
        stage = learner.learn(tiny_store, plan.stages[0], monitor=watch)
        assert stage.best_epoch == epoch
        assert same(learner.model.state_dict(), watch.weights[epoch])
        assert set(learner.variants) == ({"death", "days"} if select == "per_task" else set())
        for task, own in (("death", 0), ("days", 1)):
            if learner.variants:
                assert same(learner.variants[task].model.state_dict(), watch.weights[own])


def test_a_validation_score_that_is_undefined_is_no_evidence(
    tiny_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {"death": [math.nan, 0.6, math.nan]})
    plan = recipe((("death",),), train={"epochs": 3})
    assert Learner(plan).learn(tiny_store, plan.stages[0]).best_epoch == 1


def test_decay_falls_on_matrices_only() -> None:
    model = flame()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ([names[id(p)] for p in g["params"]] for g in parameter_groups(model, 0.3))
    assert sorted(decayed + free) == sorted(names.values())
    assert all(name.endswith(".base") or name == "heads.everything.linear.weight" for name in decayed)
    assert not any("embed" in name for name in decayed)
    assert all("embed" in name or not name.endswith(".base") for name in free)
    assert [g["weight_decay"] for g in parameter_groups(model, 0.3)] == [0.3, 0.0]


def test_frozen_weights_are_in_no_group() -> None:
    model = flame().requires_grad_(False)
    assert [g["params"] for g in parameter_groups(model, 0.3)] == [[], []]


def test_steps_are_bitwise_those_of_pytorch() -> None:
    sides = []
    for _ in range(2):
        torch.manual_seed(0)
        sides.append([torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), (2, 2), ())])
    ours_p, theirs_p = sides

    def groups(p: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:], "weight_decay": 0.0}]

    ours, theirs = AdamW(groups(ours_p), 1e-2), torch.optim.AdamW(groups(theirs_p), lr=1e-2, fused=True)
    for step in range(6):
        ours.zero_grad()
        theirs.zero_grad()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        for i, (a, b) in enumerate(zip(ours_p, theirs_p, strict=True)):
            if (step + i) % 3:  # some have no gradient in some steps
                a.grad = torch.randn_like(a)
                b.grad = a.grad.clone()
        ours.step()
        theirs.step()
        assert all(torch.equal(a, b) for a, b in zip(ours_p, theirs_p, strict=True)), step
    assert any(not torch.equal(a, torch.zeros_like(a)) for a in ours_p)
    for a, b in zip(ours_p, theirs_p, strict=True):
        assert ours.state[a].keys() == theirs.state[b].keys()
        assert all(torch.equal(t, theirs.state[b][name]) for name, t in ours.state[a].items())


def test_a_step_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch; from flame_moe.training.optim import AdamW; p = torch.nn.Parameter(torch.ones(2))\n"
        "o = AdamW([{'params': [p], 'weight_decay': 0.0}], 0.1); p.sum().backward(); o.step(); o.zero_grad()\n"
        "assert float(p[0]) < 1; sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_learning_rate_warms_up_and_follows_half_a_cosine() -> None:
    config = TrainConfig(lr=2.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    flat = TrainConfig(lr=2.0, warmup=0.0, schedule="constant")
    assert [learning_rate(flat, step, 100) for step in (0, 50, 100)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("sampling", ["round_robin", "proportional", "temperature"])
def test_every_schedule_trains_every_task(tiny_store: Store, sampling: str) -> None:
    learner = learned(recipe((("death", "stage", "codes", "days"),), train={"sampling": sampling}), tiny_store)
    losses = [e["train"] for e in learner.stages[0].history]
    assert all(math.isfinite(e[task]) for e in losses for task in ("death", "stage", "codes", "days", "auxiliary"))


def test_training_lowers_the_loss(tiny_store: Store) -> None:
    plan = recipe((("death",),), train={"epochs": 12}, model={"dropout": 0.0})
    history = learned(plan, tiny_store).stages[0].history
    assert history[-1]["train"]["death"] < 0.8 * history[0]["train"]["death"]


def test_bfloat16_trains_float32_weights(tiny_store: Store) -> None:
    learner = learned(recipe(JOINT, train={"precision": "bf16-mixed"}), tiny_store)
    assert all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in learner.model.state_dict().values())
    plain = learned(recipe(JOINT), tiny_store)
    assert not same(learner.model.state_dict(), plain.model.state_dict())


@settings(deadline=None, max_examples=40)
@given(rate=st.floats(0, 0.99), seed=st.integers(0, 999), n=st.integers(1, 8))
def test_modality_dropout_leaves_every_sample_something_it_had(rate: float, seed: int, n: int) -> None:
    generator = np.random.default_rng(seed)
    names = ("static", "vitals", "image", "notes")
    keep = [[m for m in names if generator.random() < 0.6] or ["image"] for _ in range(n)]
    batch = batch_of([sample(i, generator, kept) for i, kept in enumerate(keep)])
    torch.manual_seed(seed)
    thin = drop_modalities(batch, rate)
    rows = {name: set(part.rows.tolist()) for name, part in thin.modalities.items()}
    assert set().union(*rows.values()) == set(range(n))
    for name, part in thin.modalities.items():
        whole = batch.modalities[name]
        places = [whole.rows.tolist().index(row) for row in part.rows.tolist()]
        assert torch.equal(part.values, whole.values[places])
        assert torch.equal(part.lengths, whole.lengths[places])
    if rate == 0:
        assert thin is batch


def test_modality_dropout_drops_at_its_rate() -> None:
    generator = np.random.default_rng(0)
    batch = batch_of([sample(i, generator, ("vitals", "image", "notes", "static")) for i in range(500)])
    torch.manual_seed(0)
    assert len(drop_modalities(batch, 0.3).modalities["image"].rows) == pytest.approx(350, abs=35)


def task(kind: str, loss: str = "plain", classes: tuple[str, ...] = ("a", "b", "c")) -> Task:
    return Task.model_validate({"name": "t", "kind": kind, "loss": loss, "modalities": ("m",), "classes": classes})


def test_losses_are_their_closed_forms() -> None:
    z, label = [0.3, -1.2, 2.0], 2
    p = [math.exp(x) / sum(math.exp(y) for y in z) for x in z]
    logits, target = torch.tensor([z]), torch.tensor([[float(label)]])
    weight = torch.tensor([0.2, 0.3, 0.9])
    assert float(task_loss(task("multiclass"), logits, target)) == pytest.approx(-math.log(p[2]), rel=1e-5)
    weighted = float(task_loss(task("multiclass", "weighted"), logits, target, weight))
    assert weighted == pytest.approx(-0.9 * math.log(p[2]), rel=1e-5)
    focal = float(task_loss(task("multiclass", "focal"), logits, target, weight))
    assert focal == pytest.approx(-0.9 * (1 - p[2]) ** 2 * math.log(p[2]), rel=1e-5)
    smooth = float(task_loss(task("multiclass"), logits, target, smoothing=0.3))
    assert smooth == pytest.approx(-sum((0.1 + 0.7 * (c == 2)) * math.log(p[c]) for c in range(3)), rel=1e-5)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_binary_losses_are_their_closed_forms(label: float) -> None:
    z, weight = 0.7, torch.tensor([0.25, 0.75])
    p = 1 / (1 + math.exp(-z))
    truth = p if label else 1 - p
    w = 0.75 if label else 0.25
    logits, target, classes = torch.tensor([[z]]), torch.tensor([[label]]), ("no", "yes")
    assert float(task_loss(task("binary", classes=classes), logits, target)) == pytest.approx(-math.log(truth))
    weighted = float(task_loss(task("binary", "weighted", classes), logits, target, weight))
    assert weighted == pytest.approx(-w * math.log(truth), rel=1e-5)
    focal = float(task_loss(task("binary", "focal", classes), logits, target, weight))
    assert focal == pytest.approx(-w * (1 - truth) ** 2 * math.log(truth), rel=1e-5)


def test_the_focal_factor_is_held_constant() -> None:
    logits = torch.tensor([[0.7]], requires_grad=True)
    task_loss(task("binary", "focal", ("no", "yes")), logits, torch.ones(1, 1), torch.tensor([1.0, 1.0])).backward()
    p = 1 / (1 + math.exp(-0.7))
    assert float(logits.grad) == pytest.approx((1 - p) ** 2 * (p - 1), rel=1e-5)


def test_multilabel_and_regression_losses_are_means() -> None:
    logits, target = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 0.0]])
    parts = [-math.log(1 / (1 + math.exp(-0.5))), -math.log(1 / (1 + math.exp(-1.0)))]
    assert float(task_loss(task("multilabel", classes=("x", "y")), logits, target)) == pytest.approx(sum(parts) / 2)
    squared = float(task_loss(task("regression", classes=("x", "y")), logits, target))
    assert squared == pytest.approx((0.25 + 1.0) / 2)


def test_class_weights_are_their_closed_forms() -> None:
    counts = torch.tensor([90.0, 10.0])
    assert class_weights(task("binary", classes=("no", "yes")), counts) is None
    weighted = class_weights(task("binary", "weighted", ("no", "yes")), counts)
    focal = class_weights(task("binary", "focal", ("no", "yes")), counts)
    assert weighted is not None
    assert focal is not None
    assert weighted.tolist() == pytest.approx([100 / 180, 100 / 20])
    assert focal.tolist() == pytest.approx([0.1, 0.9])
    multilabel = class_weights(task("multilabel", "weighted", ("x", "y")), torch.tensor([[60.0, 99.0], [40.0, 1.0]]))
    assert multilabel is not None
    assert multilabel.tolist() == [pytest.approx([100 / 120, 100 / 198]), pytest.approx([100 / 80, 50.0])]


def test_a_class_that_never_occurs_has_a_finite_weight() -> None:
    weights = class_weights(task("multiclass", "weighted"), torch.tensor([5.0, 5.0, 0.0]))
    assert weights is not None
    assert bool(torch.isfinite(weights).all())


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5))
def test_probabilities_are_probabilities_for_any_logit(z: list[float]) -> None:
    logits = np.array([z, z[::-1]], dtype=np.float32)
    binary = to_values(task("binary", classes=("no", "yes")), logits[:, :1])
    assert binary.shape == (2,)
    labels = to_values(task("multilabel", classes=tuple(f"l{i}" for i in range(len(z)))), logits)
    classes = to_values(task("multiclass"), logits)
    assert np.isfinite(labels).all()
    assert ((labels >= 0) & (labels <= 1)).all()
    assert np.allclose(classes.sum(1), 1.0)
    scaled = to_values(task("regression"), logits, (np.float32([3.0]), np.float32([2.0])))
    assert np.allclose(scaled, logits.astype(float) * 2 + 3)


def test_hidden_cells_were_observed_and_shares_differ_between_samples() -> None:
    batch = full_batch(n=200, lengths=(6, 7))
    thin = drop_cells(batch, 0.8)
    assert thin.modalities["image"] is batch.modalities["image"]
    before, after = batch.modalities["vitals"].observed, thin.modalities["vitals"].observed
    assert before is not None
    assert after is not None
    assert not (after & ~before).any()
    share = 1 - after.flatten(1).sum(1) / before.flatten(1).sum(1)
    assert float(share.mean()) == pytest.approx(0.4, abs=0.05)
    assert float(share.min()) < 0.1
    assert float(share.max()) > 0.6
    assert drop_cells(batch, 0.0) is batch
